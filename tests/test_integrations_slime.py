"""slime's policy loss by `policy_loss`; over ranks it is among `test_policy_loss_parallel.py`.

slime is on no package index: the loss is compared with its formulas written out, over a stand-in
for Megatron's groups. Where a checkout of slime is on PYTHONPATH (with httpx, which it imports),
the tests compare with slime's own function as well: set TORCHDYNAMO_DISABLE=1, it compiles much.
That ran last with slime's commit 624b824 of 2026-08-21.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import parallel_checks_slime as checks
import parallel_ranks
import pytest
import slime_cases as slime
import torch
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective
from reasonkern.integrations import slime as ours

NEAR = checks.NEAR
OWN = {"slimes_own_vocabulary": 2, "slimes_own_pieces": 2, "slimes_own_both": 4}


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, without other ranks."""
    for name in ("megatron", "megatron.core", "megatron.core.mpu"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    slime.install((None, 0, 1), (None, 0, 1))


@pytest.fixture
def slimes_own(megatron: None) -> Any:
    return slime.slimes_own() or pytest.skip("slime is not on the path")


@pytest.mark.parametrize("case", checks.CASES)
def test_the_loss_its_metrics_and_its_gradient(megatron: None, case: tuple[str, bool]) -> None:
    checks.literally(None, None, *case)


@pytest.mark.parametrize("case", checks.CASES)
def test_against_slimes_own(slimes_own: Any, case: tuple[str, bool]) -> None:
    checks.against_slime(None, None, *case)


@pytest.mark.parametrize("name", OWN)
def test_against_slimes_own_on_ranks(slimes_own: Any, name: str, tmp_path: Path) -> None:
    outcome = parallel_ranks.run(OWN[name], ["parallel_checks_slime"], [name], tmp_path)
    assert outcome[name] == parallel_ranks.PASSED, outcome[name]


def call(objective: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any, Tensor]:
    args = slime.make_args(**options)
    function = ours.make(objective) if objective else ours.policy_loss_function
    part, _ = slime.local(batch, (0, 1), (0, 1))
    return slime.run(function, args, part, slime.reducer(args, part))


OBJECTIVES = {
    "gppo": (Objective.gppo(0.8, 1.1), False),
    "sapo": (Objective.sapo(), False),
    "reinforce": (Objective.reinforce(), False),
    "opsm": (Objective.ppo(opsm=0.05), False),
    "kl_cov": (Objective.kl_cov(0.1), False),
    "gmpo": (Objective.gmpo(0.8, 1.1), True),
    "vespo": (Objective.vespo(), True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_of_ones_own(megatron: None, name: str) -> None:
    """Equal to `policy_loss` of the padded texts, with slime's options for its terms."""
    objective, by_sequence = OBJECTIVES[name]
    batch = slime.make_batch(by_token=not by_sequence)
    masked = zip(batch["advantages"], batch["loss_masks"], strict=True)
    batch["advantages"] = [torch.where(mask != 0, a, 9.0) for a, mask in masked]
    options = {"entropy_coef": 0.1, "use_kl_loss": True, "use_tis": True}
    loss, metrics, gradient = call(objective, batch, **options)
    called = call(lambda args: objective, batch, **options)
    assert_close((loss, gradient), (called[0], called[2]), rtol=0, atol=0)

    texts = torch.tensor(batch["total_lengths"])
    ends = texts.cumsum(0)

    def rows(name: str) -> Tensor:
        x = torch.zeros(ends[-1] + slime.PADDING).double()
        for end, r, values in zip(ends, batch["response_lengths"], batch[name], strict=True):
            x[end - r - 1 : end - 1] = values.double()
        return x

    targets = torch.cat(batch["unconcat_tokens"]).roll(-1)
    advantage = rows("advantages")
    segments = torch.tensor([0, *ends, len(advantage)])
    if by_sequence:
        advantage = torch.tensor([*(a[0] for a in batch["advantages"]), 0.0]).double()
    sums = torch.cat((batch["rollout_mask_sums"].repeat_interleave(texts), torch.ones(6).double()))
    terms = {
        "kl": rk.KL("k3", 0.1), "entropy_coef": 0.1,
        "importance": rk.Importance("token", "truncate", 0.8, 1.2),
    }  # fmt: skip
    fields = {k: v for k, v in vars(objective).items() if k not in terms}
    leaf = batch["logits"][0].clone().requires_grad_()
    expected = rk.policy_loss(
        leaf, torch.nn.functional.pad(targets, (0, slime.PADDING)), advantage=advantage,
        weight=rows("loss_masks") / sums, old_logprob=rows("log_probs"), segments=segments,
        ref_logprob=rows("ref_log_probs"), rollout_logprob=rows("rollout_log_probs"),
        objective=Objective(**fields, **terms),
    )  # fmt: skip
    (own,) = torch.autograd.grad(3 * expected.loss, leaf)
    assert_close(loss, expected.loss.detach(), **NEAR)
    assert_close(gradient[0], own, **NEAR)
    assert own.abs().max() > 1e-2
    if name in ("sapo", "reinforce", "vespo"):
        assert metrics["pg_clipfrac"] == 0
    if name in ("gppo", "gmpo"):
        clip = call(Objective.ppo(*objective.numbers()[:2]), batch, **options)[1]["pg_clipfrac"]
        assert metrics["pg_clipfrac"] == clip > 0


def test_the_metric_of_slimes_distillation(megatron: None) -> None:
    """--use-opd, which changes advantages."""
    batch = slime.make_batch()
    distances = [torch.full_like(x, i + 1.0) for i, x in enumerate(batch["advantages"])]
    metrics = call(None, batch | {"opd_reverse_kl": distances})[1]
    lengths = torch.stack([m.sum() for m in batch["loss_masks"]])
    means = torch.arange(1, len(lengths) + 1) * lengths / batch["rollout_mask_sums"]
    assert_close(metrics.pop("opd_reverse_kl"), means.sum(), check_dtype=False)
    assert metrics.keys() == call(None, batch)[1].keys()


def test_clip_cov_draws_anew_in_each_call(megatron: None) -> None:
    objective = Objective.clip_cov(fraction=0.2, low=-10, high=10)
    batch = slime.make_batch()
    gradients = {tuple(call(objective, batch)[2].flatten().tolist()) for _ in range(6)}
    assert len(gradients) > 1


def test_the_gradient_lies_where_the_logits_were(megatron: None) -> None:
    batch, args = slime.make_batch(), slime.make_args()
    part, _ = slime.local(batch, (0, 1), (0, 1))
    leaf = part["logits"].requires_grad_()
    logits = leaf * 1.0
    loss, _ = ours.policy_loss_function(args, part, logits, slime.reducer(args, part))
    loss.backward()
    assert torch.equal(logits.detach(), leaf.grad)


def test_a_sample_without_trained_tokens(megatron: None) -> None:
    """As of a tool call's answer; the other samples do not change."""
    batch = slime.make_batch(by_token=False)
    expected = call(None, batch, **slime.OPTIONS["gspo"])
    batch["loss_masks"][0] = torch.zeros(5).int()
    batch["log_probs"][0] = torch.full((5,), -200.0).double()
    loss, metrics, gradient = call(None, batch, **slime.OPTIONS["gspo"])
    assert (gradient[0, :9] == 0).all()
    assert_close(gradient[0, 9:], expected[2][0, 9:], rtol=0, atol=0)
    assert loss.isfinite() and all(x.isfinite() for x in metrics.values())


# ---- what is refused


REFUSED = {
    "use_opsm": (True, "args.use_opsm: expected False with reasonkern's loss, got True"),
    "rollout_top_p": (0.9, "args.rollout_top_p: expected 1.0 with"),
    "recompute_loss_function": (True, "args.recompute_loss_function: expected False with"),
    "get_mismatch_metrics": (True, "args.get_mismatch_metrics: expected False with"),
    "custom_pg_loss_reducer_function_path": ("a.b", "_path: expected None with .* got 'a.b'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_not_honoured(megatron: None, name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(None, slime.make_batch(), **{name: value})


def test_options_that_are_not_honoured_together(megatron: None) -> None:
    batch = slime.make_batch()
    with pytest.raises(ValueError, match="allgather_cp: expected False with"):
        call(None, batch, allgather_cp=True, context_parallel_size=2)
    call(None, batch, allgather_cp=True)
    with pytest.raises(ValueError, match="custom_tis_function_path: expected None or .* got 'a.b'"):
        call(None, batch, use_tis=True, custom_tis_function_path="a.b")
    with pytest.raises(ValueError, match="kl_loss_type: expected k3, which low_var_kl clamps at"):
        call(None, batch, use_kl_loss=True, kl_loss_type="low_var_kl")


def test_objectives_that_are_refused(megatron: None) -> None:
    batch = slime.make_batch()
    for objective in ("gppo", Objective.gppo, lambda logprob, entropy, ctx: -logprob):
        with pytest.raises(ValueError, match="objective: expected an Objective"):
            ours.make(objective)
    with pytest.raises(ValueError, match="objective.kl: expected not set .but --use-kl-loss"):
        call(Objective.gppo(kl=("k3", 0.1)), batch)
    with pytest.raises(ValueError, match="advantages'.: expected one value per sample"):
        call(Objective.gmpo(), batch)


def test_without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ImportError, match="needs megatron.core, which slime trains with"):
        call(None, slime.make_batch())


# ---- in the place of slime's


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    name = "slime"
    for part in ("", ".backends", ".megatron_utils", ".loss"):
        name += part
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    module.policy_loss_function = lambda args, batch, logits, sum_of_sample_mean: None
    return module


def test_init_replaces_slimes_function(stand_in: types.ModuleType) -> None:
    ours.init(slime.make_args())
    assert stand_in.policy_loss_function is ours.policy_loss_function


def test_init_refuses_at_the_start(stand_in: types.ModuleType) -> None:
    own = stand_in.policy_loss_function
    for name, value in (
        ("loss_type", "custom_loss"), ("save_debug_train_data", "x.pt"), ("use_opsm", True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"args.{name}: expected"):
            ours.init(slime.make_args(**{name: value}))
    stand_in.policy_loss_function = lambda args, state, batch, logits, mean: None
    with pytest.raises(ImportError, match="does not fit this slime: expected a policy_loss_func"):
        ours.init(slime.make_args())
    del stand_in.policy_loss_function
    with pytest.raises(ImportError, match="tested with commit 624b824"):
        ours.init(slime.make_args())
    assert own is not ours.policy_loss_function


def test_the_page(megatron: None) -> None:
    """The functions that it names are there, those of its module are losses."""
    page = (Path(ours.__file__).parent / "README.md").read_text()
    section = page.partition("\n## slime\n")[2].partition("\n## ")[0]
    (hook,) = re.findall(r"--custom-megatron-init-path (\S+)", section)
    module, _, name = hook.rpartition(".")
    assert getattr(importlib.import_module(module), name) is ours.init
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (path,) = re.findall(r"--custom-loss-function-path my_loss\.(\w+)", section)
    (by_options,) = re.findall(r"`(slime\.make\(lambda.*\))`", section)
    here: dict[str, Any] = {}
    exec(code, here)
    batch = slime.make_batch()
    part, _ = slime.local(batch, (0, 1), (0, 1))
    args = slime.make_args()
    for function in (here[path], here["sapo"], eval(by_options, here)):
        got = slime.run(function, args, part, slime.reducer(args, part))
        assert got[2].abs().max() > 1e-2
        if function is not here["sapo"]:
            assert_close(got[0], call(Objective.gppo(0.8, 1.28), batch)[0], rtol=0, atol=0)
