"""Our objectives through verl 0.9.1's own registry: equal to `policy_loss` and to verl's losses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from policy_loss_literal import Batch, gradient, make_batch, spread, stats
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_weights
from reasonkern.policy_loss import catalog

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent
SINGLE = {"rtol": 1e-6, "atol": 1e-8}  # the weights are float32


@pytest.fixture(scope="module")
def core() -> ModuleType:
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl==0.9.1")


@pytest.fixture(scope="module")
def ours(core: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.verl")


def make_config(**options: Any) -> Any:
    workers = importlib.import_module("verl.workers.config")
    policy = workers.PolicyLossConfig(dro_beta=0.1, loss_mode=options.pop("loss_mode", "vanilla"))
    basic = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return workers.ActorConfig(policy_loss=policy, **basic, **options)


def data(seed: int = 1) -> Batch:
    b = make_batch(seed=seed).clean()
    return Batch(**(vars(b) | {"targets": b.targets.clamp_min(0)}))


def call(
    core: ModuleType, name: str, b: Batch, logp: Tensor, config: Any, mode: str = "token-mean",
    is_weights: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """As verl's workers call a policy loss."""
    return core.get_policy_loss_fn(name)(
        old_log_prob=b.old_logprob, log_prob=logp,
        advantages=spread(b, b.advantage).contiguous(),
        response_mask=b.mask if mask is None else mask, loss_agg_mode=mode, config=config,
        rollout_is_weights=is_weights,
    )  # fmt: skip


torch.manual_seed(0)
SEED = int(torch.randint(2**62, ()))  # what the registered function draws after manual_seed(0)
# name: (configuration, our objective with the same numbers)
OBJECTIVES: dict[str, tuple[dict[str, Any], Objective]] = {
    "rk_ppo": ({}, Objective.ppo(dual_clip=3.0)),
    "rk_grpo": ({"clip_ratio_c": 1.3}, Objective.grpo(dual_clip=1.3)),
    "rk_dapo": ({"clip_ratio_high": 0.28}, Objective.dapo(dual_clip=3.0)),
    "rk_dr_grpo": ({}, Objective.dr_grpo(dual_clip=3.0)),
    "rk_gppo": ({"clip_ratio_high": 0.28}, Objective.gppo(dual_clip=3.0)),
    "rk_ce_gppo": ({"clip_ratio_high": 0.28}, Objective.ce_gppo(dual_clip=3.0)),
    "rk_gspo": ({"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, Objective.gspo()),
    "rk_gmpo": ({"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, Objective.gmpo()),
    "rk_cispo": ({}, Objective.cispo(1.2, 0.8)),
    "rk_tppo": ({}, Objective.tppo(0.8, 1.2, dual_clip=3.0)),
    "rk_bapo": ({"clip_ratio_c": 2.0}, Objective.bapo("code", dual_clip=2.0)),
    "rk_kl_cov": ({}, Objective.kl_cov(2e-4, 0.1)),
    "rk_clip_cov": ({}, Objective.clip_cov(seed=SEED)),
    "rk_dppo_tv": (
        {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 20.0},
        Objective.dppo_tv(0.02, 0.03),
    ),
    "rk_dppo_kl": (
        {"clip_ratio_low": 1e-3, "clip_ratio_high": 2e-3, "clip_ratio_c": 20.0},
        Objective.dppo_kl(1e-3, 2e-3),
    ),
    "rk_sapo": ({"tau_neg": 1.1}, Objective.sapo(1.0, 1.1)),
    "rk_dro": ({}, Objective.dro(0.1)),
    "rk_vespo": ({}, Objective.vespo()),
    "rk_gpg": ({}, Objective.gpg()),
    "rk_rloo": ({}, Objective.rloo()),
    "rk_reinforce": ({}, Objective.reinforce()),
}


def test_every_registered_objective_is_tested(core: ModuleType, ours: ModuleType) -> None:
    registered = {name for name in core.POLICY_LOSS_REGISTRY if name.startswith("rk_")}
    assert registered == set(OBJECTIVES) == set(ours.NAMES)
    missing = {entry.name for entry in catalog.OBJECTIVES} - {name[3:] for name in registered}
    assert missing == {"gtpo", "high_entropy"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registered_loss_equals_policy_loss(name: str, core: ModuleType, ours: ModuleType) -> None:
    options, objective = OBJECTIVES[name]
    b = data()
    x, y = b.leaf(), b.leaf()
    weight = token_weights(b.mask, "token-mean")
    expected = policy_loss(x, b.targets, objective=objective, **b.given(weight=weight))
    logp, _ = stats(y, b.targets)
    # What masked tokens hold does not matter.
    off = torch.where(b.mask, 0.0, float("nan"))
    torch.manual_seed(0)
    loss, metrics = call(core, name, b, logp + off, make_config(**options))
    assert_close(loss, expected.loss, **SINGLE)
    mine, theirs = gradient(expected.loss, x), gradient(loss, y)
    assert_close(torch.where(b.mask[..., None], theirs, 0.0), mine, **SINGLE)
    values = expected.metrics.compute()
    for key, value in metrics.items():
        if key.startswith("actor/reasonkern/"):
            assert value == pytest.approx(values[key.split("/")[-1]].item(), rel=1e-6, abs=1e-9)
    assert metrics["actor/ppo_kl"] == pytest.approx(-values["kl_old_k1"].item())


VERLS = {  # ours: (verl's own, the only aggregation of verl's, or None)
    "rk_ppo": ("vanilla", None),
    "rk_gspo": ("gspo", "seq-mean-token-mean"),
    "rk_cispo": ("cispo", None),
    "rk_sapo": ("sapo", "seq-mean-token-mean"),
    "rk_dppo_tv": ("dppo_tv", None),
    "rk_dppo_kl": ("dppo_kl", None),
    "rk_dro": ("dro", None),
    "rk_gpg": ("gpg", None),
    "rk_kl_cov": ("kl_cov", None),
}
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)  # fmt: skip
INFO: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {
        "dp_size": 2,
        "batch_num_tokens": 50,
        "global_batch_size": 9,
        "loss_scale_factor": 8,
    },
}


@pytest.mark.parametrize("info", INFO)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VERLS)
def test_registered_loss_equals_verls_own(
    name: str, mode: str, info: str, core: ModuleType, ours: ModuleType
) -> None:
    """With importance weights, of which one is 0, where verl applies them to tokens."""
    theirs, only = VERLS[name]
    if only is not None:
        mode = only
    b = data()
    config = make_config(**OBJECTIVES[name][0])
    config.global_batch_info.update(INFO[info])
    is_weights = None
    if theirs not in ("gspo", "gpg"):
        is_weights = 0.5 + torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(0))
        is_weights[0, 2] = 0.0
    out = []
    for loss_name in (name, theirs):
        logp = stats(b.logits, b.targets)[0].requires_grad_()
        loss, metrics = call(core, loss_name, b, logp, config, mode, is_weights, b.mask.double())
        out.append((loss, gradient(loss, logp), metrics))
    mine, expected = out
    assert_close(mine[0].double(), expected[0].double(), rtol=1e-6, atol=1e-8)
    assert_close(mine[1], expected[1], rtol=1e-6, atol=1e-8)
    if theirs in ("vanilla", "gspo", "dppo_tv", "dppo_kl"):
        for key in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"):
            assert mine[2][key] == pytest.approx(expected[2][key], rel=1e-5, abs=1e-7), key
        assert mine[2]["actor/pg_clipfrac"] > 0


def test_workers_reach_the_loss_through_the_configuration(
    core: ModuleType, ours: ModuleType
) -> None:
    """verl's own `ppo_loss`, with `policy_loss.loss_mode` alone saying which loss."""
    losses = importlib.import_module("verl.workers.utils.losses")
    TensorDict = importlib.import_module("tensordict").TensorDict
    b = data().map(lambda x: x[[0, 2, 3]])  # verl takes no empty sequence
    prompt = torch.ones(len(b.mask), 2, dtype=torch.long)
    response = torch.arange(b.mask.shape[1]) < torch.tensor([6, 3, 1])[:, None]
    attention = torch.cat((prompt, response.long()), 1)
    logp = stats(b.logits, b.targets)[0].requires_grad_()
    # Packed: the log-probability of a token stands at the position before it.
    rows = [
        torch.cat((logp.new_zeros(1), logp[i, : response[i].sum()], logp.new_zeros(1)))
        for i in range(3)
    ]
    td = TensorDict(
        {
            "prompts": prompt, "responses": b.targets, "attention_mask": attention,
            "response_mask": b.mask, "old_log_probs": b.old_logprob,
            "advantages": spread(b, b.advantage).contiguous(),
        },
        batch_size=len(b.mask),
    )  # fmt: skip
    for key in ("dp_size", "batch_num_tokens", "global_batch_size"):
        td.set_non_tensor(key, 1 if key == "dp_size" else None)
    config = make_config(loss_mode="rk_gppo", clip_ratio_high=0.28)
    loss, metrics = losses.ppo_loss(config, {"log_probs": torch.cat(rows)}, td)
    weight = token_weights(b.mask, "token-mean")
    expected = policy_loss(
        b.logits, b.targets, objective=Objective.gppo(dual_clip=3.0), **b.given(weight=weight)
    )
    assert_close(loss, expected.loss, **SINGLE)
    assert torch.isfinite(gradient(loss, logp)).all()
    assert metrics["actor/reasonkern/ess_frac"].values[0] == pytest.approx(
        expected.metrics.compute()["ess_frac"].item()
    )


def test_a_loss_with_its_own_numbers(
    core: ModuleType, ours: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    objective = Objective.gppo(0.9, 1.1, beta_low=0.5)
    for _ in range(2):  # a notebook's cell that runs again
        assert ours.register(objective, "half") == "half"
    b = data()
    logp = stats(b.logits, b.targets)[0]
    weight = token_weights(b.mask, "token-mean")
    expected = policy_loss(b.logits, b.targets, objective=objective, **b.given(weight=weight)).loss
    assert_close(call(core, "half", b, logp, make_config())[0], expected, **SINGLE)


def test_log_probabilities_in_half_precision(core: ModuleType, ours: ModuleType) -> None:
    b = data()
    logp = stats(b.logits, b.targets)[0].bfloat16()
    losses = [call(core, "rk_gppo", b, x, make_config())[0] for x in (logp, logp.float())]
    assert_close(*losses, **SINGLE)


@pytest.mark.parametrize("name", ["rk_gppo", "vanilla", None])
def test_a_name_that_is_taken_is_refused(core: ModuleType, ours: ModuleType, name: Any) -> None:
    before = dict(core.POLICY_LOSS_REGISTRY)
    with pytest.raises(ValueError, match="name: expected one that neither verl nor reasonkern has"):
        ours.register(Objective.gppo(0.9, 1.1), name)
    assert before == core.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective.ppo(kl=("k3", 0.1)), r"objective\.kl: expected not set \(but actor\.use_kl_lo"),
        (Objective.ppo(entropy_coef=0.1), r"entropy_coef: expected not set \(but actor\.entropy"),
        (Objective.ppo(opsm=0.1), r"objective\.opsm: expected not set"),
        (Objective.custom(lambda *_: None), r"objective\.function: expected not set"),
        (Objective.gtpo(), "objective: expected one that needs no entropies"),
        (Objective.high_entropy(), "objective: expected one that needs no entropies"),
        ("gppo", "objective: expected an Objective, or a function from .*, got 'gppo'"),
        (Objective.gppo, r"objective: expected an Objective, Objective.gppo\(\), got its const"),
    ],
)
def test_register_refuses(ours: ModuleType, objective: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.register(objective, "mine")


def test_the_loss_refuses(core: ModuleType, ours: ModuleType) -> None:
    b = data()
    logp = stats(b.logits, b.targets)[0]
    with pytest.raises(ValueError, match="loss_agg_mode: expected 'token-mean' or"):
        call(core, "rk_ppo", b, logp, make_config(), "mean")
    workers = importlib.import_module("verl.workers.config")
    basic = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    without_beta = workers.ActorConfig(policy_loss=workers.PolicyLossConfig(), **basic)
    with pytest.raises(ValueError, match=r"actor\.policy_loss\.dro_beta: expected .* for rk_dro"):
        call(core, "rk_dro", b, logp, without_beta)
    config = make_config()
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(
        ValueError, match=r"global_batch_info\['batch_num_tokens'\]: expected a num"
    ):
        call(core, "rk_ppo", b, logp, config)
    with pytest.raises(
        ValueError, match=r"global_batch_info\['global_batch_size'\]: expected a nu"
    ):
        call(core, "rk_ppo", b, logp, config, "seq-mean-token-mean")
    per_token = {"advantages": torch.randn(b.mask.shape), "response_mask": b.mask}
    with pytest.raises(ValueError, match="advantages: expected one value per sequence"):
        core.get_policy_loss_fn("rk_gspo")(
            old_log_prob=b.old_logprob, log_prob=logp, config=make_config(), **per_token
        )


def test_verl_loads_the_module_by_itself(core: ModuleType) -> None:
    """In any process that imports verl; installed, the entry point does the same."""
    code = (
        "from verl.trainer.ppo import core_algos; print(core_algos.get_policy_loss_fn('rk_gppo'))"
    )
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": "reasonkern.integrations.verl", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "register.<locals>.loss" in done.stdout
    toml = (ROOT / "pyproject.toml").read_text()
    assert 'reasonkern = "reasonkern.integrations.verl"' in toml


def test_readme(core: ModuleType, ours: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Your trainer: TRL")[2].partition("\n## ")[0]
    modes = re.findall(r"policy_loss\.loss_mode=(\w+)", section)
    assert modes == ["vanilla", "rk_gppo"]
    assert set(modes) | set(re.findall(r"`(rk_\w+)`", section)) <= set(core.POLICY_LOSS_REGISTRY)
