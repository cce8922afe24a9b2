"""OpenRLHF 0.11.2's own trainer with our log-probabilities and losses: equal to its own."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import openrlhf_cases as cases
import pytest
import torch
from openrlhf_stand_ins import load_script, load_workers
from policy_loss_literal import Batch, gradient, make_batch, spread, stats
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_weights
from reasonkern.policy_loss import catalog

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent
# OpenRLHF's entropy, lse - sum(p * z), is a difference of float32 numbers of about 10.
SINGLE = {"rtol": 1e-5, "atol": 4e-6}


@pytest.fixture(scope="module")
def workers() -> ModuleType:
    pytest.importorskip("openrlhf", reason="needs openrlhf==0.11.2")
    return load_workers()


@pytest.fixture(scope="module")
def models(workers: ModuleType) -> ModuleType:
    return sys.modules["openrlhf.models"]


@pytest.fixture(scope="module")
def ours(models: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.openrlhf")


# ---- log-probabilities and entropies


def outcome(actor: Any, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Log-probabilities, entropies of the actions, and the gradient of a function of both."""
    mask = batch["action_mask"]
    logprob, output = actor(**batch, return_output=True, return_entropy=True, **options)
    entropy = output.entropy[:, -cases.A :] * mask
    g = torch.Generator().manual_seed(5)
    a, b = (torch.randn(mask.shape, generator=g) for _ in range(2))
    (a * logprob + b * entropy).sum().backward()
    return [logprob, entropy, *(p.grad for p in actor.model.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_actor_equals_its_own_forward(
    dtype: torch.dtype, temperature: float, packed: bool, models: ModuleType, ours: ModuleType
) -> None:
    options = {"packed": packed, "temperature": temperature, "dtype": dtype}
    batch = cases.padded()
    theirs = outcome(cases.make_actor(models, **options), batch)
    mine = outcome(ours.fuse(cases.make_actor(models, **options)), batch)
    assert mine[0].dtype == mine[1].dtype == torch.float32
    assert_close(mine[:2], theirs[:2], **SINGLE)
    rounding = SINGLE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_close(mine[2:], theirs[2:], **rounding)


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_takes_the_place_of_the_logits(
    fused: bool, models: ModuleType, ours: ModuleType
) -> None:
    """In bfloat16, of which OpenRLHF makes a copy."""
    actor = cases.make_actor(models, dtype=torch.bfloat16)
    if fused:
        ours.fuse(actor)
    logits: list[Tensor] = []
    places: list[int] = []

    def watch(model: Any, inputs: Any, output: Any) -> None:
        logits.append(output.logits)
        output.logits.register_hook(lambda g: places.append(g.data_ptr()))

    actor.model.register_forward_hook(watch)
    logprob, output = actor(**cases.padded(), return_output=True)
    logprob.sum().backward()
    assert (places == [logits[0].data_ptr()]) == fused
    assert (output.logits is None) == fused


def test_ring_attention(
    models: ModuleType, ours: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks gives its slice of the packed rows, 0 elsewhere: the sum is the whole."""
    ring = importlib.import_module("openrlhf.models.ring_attn_utils")
    batch = cases.padded()
    whole = outcome(ours.fuse(cases.make_actor(models, packed=True)), batch)
    rank = 0

    def all_gather(x: Tensor, group: Any) -> Tensor:
        return torch.cat([x if r == rank else torch.zeros_like(x) for r in range(2)])

    monkeypatch.setattr(ring, "all_gather", all_gather)
    monkeypatch.setattr(ring, "update_ring_attn_params", lambda offsets: None)
    distributed = SimpleNamespace(get_rank=lambda group: rank, get_world_size=lambda group: 2)
    monkeypatch.setattr(ring, "dist", distributed)
    assert sum(cases.LENGTHS) % 2  # the ring pads the rows
    for fuse in (lambda actor: actor, ours.fuse):
        parts = []
        for rank in range(2):  # noqa: B007
            parts.append(
                outcome(fuse(cases.make_actor(models, packed=True)), batch, ring_attn_group="r")
            )
        assert_close([a + b for a, b in zip(*parts, strict=True)], whole, **SINGLE)


def test_other_calls_are_its_own(models: ModuleType, ours: ModuleType) -> None:
    """Log-probabilities of all tokens, as for SFT, and logits."""
    batch = cases.padded()
    del batch["action_mask"]
    actor = cases.make_actor(models, temperature=0.7)
    expected = actor(**batch, return_logprobs=True)
    ours.fuse(actor)
    assert torch.equal(actor(**batch, return_logprobs=True), expected)
    assert actor(**batch, return_output=True).logits.shape == (3, max(cases.LENGTHS), cases.Lm.V)
    with torch.no_grad():  # old log-probabilities
        old = actor(**cases.padded())
    assert torch.equal(old, actor(**cases.padded()))


def test_vision_language_models_are_refused(models: ModuleType, ours: ModuleType) -> None:
    actor = cases.make_actor(models)
    actor.is_vlm = True
    with pytest.raises(ValueError, match="actor: expected a language model, got a vision-language"):
        ours.fuse(actor)


# ---- a training step


CORRECTIONS: dict[str, dict[str, Any]] = {
    "TIS": {"level": "token", "mode": "clip", "threshold": [0.8, 1.2]},
    "IcePop": {"level": "token", "mode": "mask", "threshold": [0.8, 1.2]},
    "seq-mask-tis": {"level": "seq", "mode": "mask", "threshold": [0.9, 1.4]},
    "tv": {"level": "token", "mode": "mask", "gating": "tv", "threshold": [0.0, 0.02]},
    "FlashREINFORCE": {
        "level": "seq", "mode": "mask", "gating": "binary_kl", "threshold": [0.0, 2e-3],
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"actor.entropy_coef": 0.1},
    "entropy logged": {"actor.entropy_coef": 0.0},
    "k1": {"algo.kl.use_loss": True, "algo.kl.estimator": "k1"},
    "k3": {"algo.kl.use_loss": True, "algo.kl.estimator": "k3"},
    "unbiased": {"algo.kl.use_loss": True, "algo.kl.unbiased_gradient": True},
    "dual clip": {"actor.dual_clip": 1.3, "actor.loss_agg_mode": "seq-mean-token-mean"},
    "gspo": {"actor.policy_loss_type": "gspo"},
    "all": {
        "actor.entropy_coef": 0.1, "algo.kl.use_loss": True, "algo.advantage.is_correction": "TIS",
    },
}  # fmt: skip


def step(models: ModuleType, workers: ModuleType, args: Any, change: Any, **options: Any) -> Any:
    """A `training_step` of OpenRLHF's trainer: gradients, and what it logs."""
    trainer = cases.make_trainer(workers, cases.make_actor(models, **options), args)
    change(trainer)
    status = trainer.training_step(cases.make_experience(), 0.3, 0)
    return [p.grad for p in trainer.actor.model.parameters()], status


def config(given: dict[str, Any]) -> Any:
    given = dict(given)
    for name, value in CORRECTIONS.get(given.pop("algo.advantage.is_correction", ""), {}).items():
        given[f"algo.advantage.is_correction_{name}"] = value
    return cases.make_args(given)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_step_of_its_own_loss(
    name: str, packed: bool, models: ModuleType, workers: ModuleType, ours: ModuleType
) -> None:
    args = config(CONFIGS[name])
    options = {"temperature": 0.8, "packed": packed}
    expected, logged = step(models, workers, args, lambda trainer: None, **options)
    found, status = step(models, workers, args, lambda t: ours.fuse(t.actor), **options)
    assert_close(found, expected, **SINGLE)
    assert status["weights"] == logged["weights"]
    for key, value in logged["metrics"].items():
        assert_close(status["metrics"][key], value, **SINGLE)


# ---- objectives


def data(seed: int = 1) -> Batch:
    b = make_batch(seed=seed).clean()
    return Batch(**(vars(b) | {"targets": b.targets.clamp_min(0)}))


def call(loss: Any, b: Batch, logp: Tensor, **info: Any) -> tuple[Any, ...]:
    """As `training_step` calls it."""
    advantages = spread(b, b.advantage).contiguous()
    return loss(
        logp, b.old_logprob, advantages, action_mask=b.mask, rollout_log_probs=b.rollout_logprob,
        **info,
    )  # fmt: skip


INFO: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {
        "dp_size": 2,
        "batch_num_tokens": torch.tensor(50.0),
        "global_batch_size": torch.tensor(9.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("info", INFO)
@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_ppo_equals_its_own_loss(
    dual_clip: Any, by_token: bool, correction: Any, info: str, models: ModuleType, ours: ModuleType
) -> None:
    """Loss, gradient and all four metrics; of ours, with masked tokens that hold anything."""
    given = {f"is_correction_{k}": v for k, v in CORRECTIONS.get(correction, {}).items()}
    given["token_level_loss"] = by_token
    objective = Objective.ppo(0.9, 1.15, dual_clip=dual_clip)
    own = models.PolicyLoss(clip_eps_low=0.1, clip_eps_high=0.15, dual_clip=dual_clip, **given)
    b, found = data(), []
    off = torch.where(b.mask, 0.0, float("nan"))
    rows = {name: getattr(b, name) + off for name in ("old_logprob", "rollout_logprob")}
    dirty = Batch(**(vars(b) | rows))
    for loss, each in ((ours.PolicyLoss(objective, **given), dirty), (own, b)):
        logp = stats(b.logits, b.targets)[0].requires_grad_()
        total, *metrics = call(loss, each, logp, **INFO[info])
        found.append((total, gradient(total, logp), metrics))
    (total, grad, metrics), (own_total, own_grad, own_metrics) = found
    assert_close(total.double(), own_total.double(), rtol=1e-6, atol=1e-8)
    assert_close(grad, own_grad, rtol=1e-6, atol=1e-8)
    assert 0 < own_metrics[0] < 1
    for x, y in zip(metrics, own_metrics, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-9)
    if correction is not None:
        assert 0 < own_metrics[3] < 1


@pytest.mark.parametrize("info", INFO)
def test_gspo_equals_its_own_loss(info: str, models: ModuleType, ours: ModuleType) -> None:
    own = models.PolicyLoss(0.1, 0.15, policy_loss_type="gspo")
    mine = ours.PolicyLoss(Objective.gspo(0.9, 1.15), token_level_loss=False)
    b, found = data(), []
    for loss in (mine, own):
        logp = stats(b.logits, b.targets)[0].requires_grad_()
        total, clipped, kl, *_ = call(loss, b, logp, **INFO[info])
        found.append([total.double(), gradient(total, logp), clipped.double(), kl.double()])
    assert_close(*found, rtol=1e-6, atol=1e-8)
    assert 0 < found[1][2] < 1


NAMES = [entry.name for entry in catalog.OBJECTIVES if entry.name not in ("gtpo", "high_entropy")]


@pytest.mark.parametrize("name", NAMES)
def test_objective_equals_policy_loss(name: str, ours: ModuleType) -> None:
    """What masked tokens hold does not matter."""
    b, objective = data(), getattr(Objective, name)()
    off = torch.where(b.mask, 0.0, float("nan"))
    x, y = b.leaf(), b.leaf()
    weight = token_weights(b.mask, "token-mean")
    expected = policy_loss(
        x, b.targets, objective=objective, **b.given("rollout_logprob", weight=weight)
    )
    total, clipped, kl, *_ = call(
        ours.PolicyLoss(objective),
        Batch(**(vars(b) | {"old_logprob": b.old_logprob + off})),
        stats(y, b.targets)[0] + off,
    )
    assert_close(total, expected.loss, rtol=1e-6, atol=1e-8)
    mine = torch.where(b.mask[..., None], gradient(total, y), 0.0)
    assert_close(mine, gradient(expected.loss, x), rtol=1e-6, atol=1e-8)
    values = expected.metrics.compute()
    assert_close([clipped, kl], [values["clip_frac"], -values["kl_old_k1"]])


def test_clip_cov_draws_anew_in_each_call(ours: ModuleType) -> None:
    """The same in two processes, as the ranks of a ring need it."""
    b = data()
    logp = stats(b.logits, b.targets)[0].requires_grad_()
    objective = Objective.clip_cov(fraction=0.2, low=-10, high=10)
    runs = []
    for _ in range(2):
        loss = ours.PolicyLoss(objective)
        runs.append([gradient(call(loss, b, logp)[0], logp) for _ in range(6)])
    assert_close(*runs, rtol=0, atol=0)
    assert len({tuple(g.flatten().tolist()) for g in runs[0]}) > 1


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("gppo", {}, "objective: expected an Objective, such as Objective.gppo.*, got 'gppo'"),
        (
            Objective.gppo,
            {},
            r"objective: expected an Objective, Objective.gppo\(\), got its const",
        ),
        (Objective.ppo(kl=("k3", 0.1)), {}, r"objective\.kl: expected not set \(but --algo\.kl"),
        (Objective.ppo(entropy_coef=0.1), {}, r"objective\.entropy_coef: expected not set"),
        (Objective.ppo(importance=("token", "mask", 0.5, 2)), {}, r"objective\.importance: expec"),
        (Objective.custom(lambda *_: None), {}, r"objective\.function: expected not set"),
        (Objective.gtpo(), {}, "objective: expected one that needs no entropies, which OpenRLHF"),
        (Objective.high_entropy(), {}, "objective: expected one that needs no entropies"),
        (
            Objective.gppo(),
            {"clip_eps_high": 0.28},
            "clip_eps_high: expected 0.2 with an objective",
        ),
        (
            Objective.gppo(),
            {"dual_clip": 3.0},
            r"dual_clip: expected None .*\(its dual_clip counts",
        ),
        (
            Objective.gppo(),
            {"policy_loss_type": "gspo"},
            "policy_loss_type: expected 'ppo' with an",
        ),
        (
            Objective.gmpo(),
            {"is_correction_level": "token"},
            "is_correction_level: expected 'off' with objective gmpo, of whole sequences, got 'tok",
        ),
    ],
)
def test_refused(objective: Any, options: Any, message: str, ours: ModuleType) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PolicyLoss(objective, **options)


def test_the_call_refuses(ours: ModuleType) -> None:
    b = data()
    logp = stats(b.logits, b.targets)[0]
    with pytest.raises(ValueError, match="advantages: expected one value per sequence"):
        ours.PolicyLoss(Objective.gspo())(logp, b.old_logprob, torch.randn(b.mask.shape), b.mask)
    with pytest.raises(ValueError, match="rollout_log_probs: expected a tensor with is_correction"):
        ours.PolicyLoss(Objective.ppo(), is_correction_level="token")(
            logp, b.old_logprob, spread(b, b.advantage), b.mask
        )
    with pytest.raises(ValueError, match="rollout_logprob: expected a tensor for importance or op"):
        ours.PolicyLoss(Objective.ppo(opsm=0.1))(
            logp, b.old_logprob, spread(b, b.advantage), b.mask
        )


# ---- the workers


@pytest.fixture(scope="module")
def folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers = importlib.import_module("transformers")
    config = transformers.Qwen2Config(
        vocab_size=cases.Lm.V, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    path = str(tmp_path_factory.mktemp("model"))
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def launcher(workers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """OpenRLHF's module of the reference's worker; what `install` replaces is put back."""
    found = sys.modules["openrlhf.trainer.ray.launcher"]
    for module, name in ((workers, "PolicyModelActor"), (found, "ReferenceModelActor")):
        monkeypatch.setattr(module, name, getattr(module, name))
    return found


def is_fused(actor: Any) -> bool:
    return actor(**cases.padded(), return_output=True)[1].logits is None


OBJECTIVE = Objective.gppo(0.9, 1.15)


def test_install(workers: ModuleType, ours: ModuleType, launcher: ModuleType, folder: str) -> None:
    """OpenRLHF's script takes the workers, which train; without an objective with its own loss."""
    args = cases.make_args({"actor.loss_agg_mode": "seq-mean-token-mean"})
    plain = workers.PolicyModelActor
    assert not is_fused(cases.make_worker(plain.__ray_actor_class__, folder, args).actor)
    for objective in (OBJECTIVE, None):
        ours.install(objective)
        script = load_script()
        for name, module in (("PolicyModelActor", workers), ("ReferenceModelActor", launcher)):
            assert script[name] is getattr(module, name) is not plain
        worker = cases.make_worker(script["PolicyModelActor"].__ray_actor_class__, folder, args)
        loss = worker.trainer.actor_loss_fn
        assert is_fused(worker.actor) and not loss.token_level_loss
        assert isinstance(loss, ours.PolicyLoss) == (objective is not None)
        worker.trainer.training_step(cases.make_experience(), 0.3, 0)
        assert all(
            p.grad.isfinite().all() and p.grad.any() for p in worker.actor.model.parameters()
        )
        reference = cases.make_worker(
            script["ReferenceModelActor"].__ray_actor_class__, folder, args
        )
        assert is_fused(reference.model)


def test_options_reach_the_workers(
    workers: ModuleType, ours: ModuleType, launcher: ModuleType, folder: str
) -> None:
    with pytest.raises(ValueError, match="objective"):
        ours.install(Objective.gtpo())
    ours.install(OBJECTIVE)
    kind = workers.PolicyModelActor.__ray_actor_class__
    worker = cases.make_worker(kind, folder, config({"algo.advantage.is_correction": "tv"}))
    assert worker.trainer.actor_loss_fn.is_correction_threshold == [0.0, 0.02]
    with pytest.raises(ValueError, match="clip_eps_high: expected 0.2"):
        cases.make_worker(kind, folder, cases.make_args({"actor.eps_clip_low_high": (0.2, 0.28)}))


def test_advantages_by_token_are_refused_before_the_first_step(
    workers: ModuleType, ours: ModuleType, launcher: ModuleType, folder: str
) -> None:
    ours.install(Objective.gspo())
    kind = workers.PolicyModelActor.__ray_actor_class__
    given: dict[str, Any] = {}
    for change, message in (
        ({}, r"--algo.advantage.estimator: expected any but 'gae' with objective gspo, of whole"),
        ({"algo.advantage.estimator": "rloo"}, r"--algo.kl.use_loss: expected True or an --algo"),
    ):
        given |= change
        with pytest.raises(ValueError, match=message):
            cases.make_worker(kind, folder, cases.make_args(given))
    for change in ({"algo.kl.use_loss": True}, {"algo.kl.init_coef": 0.0}):
        cases.make_worker(kind, folder, cases.make_args(given | change))


WORKER = """
import pickle, sys
from openrlhf_cases import make_args, make_experience, make_worker
from openrlhf_stand_ins import load_workers
load_workers()
kind = pickle.load(open(sys.argv[1], "rb"))
worker = make_worker(kind, sys.argv[2], make_args({}))
worker.trainer.training_step(make_experience(), 0.3, 0)
print(type(worker.trainer.actor_loss_fn).__module__, worker.trainer.actor_loss_fn.objective)
"""


def test_ray_takes_the_worker_to_another_process(
    workers: ModuleType, ours: ModuleType, launcher: ModuleType, folder: str, tmp_path: Path
) -> None:
    ours.install(OBJECTIVE)
    cloudpickle = importlib.import_module("ray.cloudpickle")
    kind = workers.PolicyModelActor.__ray_metadata__.modified_class
    (tmp_path / "kind").write_bytes(cloudpickle.dumps(kind))
    path = os.pathsep.join((f"{ROOT}/tests", str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "kind"), folder], capture_output=True,
        text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"reasonkern.integrations.openrlhf {OBJECTIVE}"


def test_readme(
    workers: ModuleType, ours: ModuleType, launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of the page: OpenRLHF's own runs after it."""
    page = (ROOT / "reasonkern/integrations/README.md").read_text()
    (code,) = re.findall(r"```python\n(# train\.py.*?)```", page, re.S)
    ran: list[Any] = []
    monkeypatch.setattr("runpy.run_module", lambda *given, **names: ran.append((given, names)))
    exec(code, {})
    assert ran == [(("openrlhf.cli.train_ppo_ray",), {"run_name": "__main__"})]
    assert "install" in workers.PolicyModelActor.__ray_actor_class__.__qualname__
