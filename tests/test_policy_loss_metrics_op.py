"""The operator `policy_metrics` on every backend, and how many operators a `policy_loss` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from contract import NoHostData, assert_same_bits
from launches import Launches
from tolerance import randn
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, _checks
from reasonkern.policy_loss.metrics import SUMS, metric_rows
from reasonkern.policy_loss.reference_objective import CLIP, DPPO_KL, DPPO_TV

INF, NAN = float("inf"), float("nan")
ROWS = ("logprob", "entropy", "old_logprob", "advantage", "weight", "entropy_weight", "importance",
        "ref_logprob", "log_ratio", "finite")  # fmt: skip
REQUIRED = ("logprob", "entropy", "advantage", "weight")
HYPER_CASES = ("one hyper", "hyper per row")
BOUNDS = [0.8, 1.2, 1.6, 2.0, 0.05, 0.04, 0.1, 0.1, 1.5]


def rows(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows (2, n / 2) in every region of the ratio, of either sign, skipped and nonfinite."""
    shape = 2, n // 2
    logp = -0.05 - randn(*shape, seed=1).abs()
    out = {
        "logprob": logp,
        "entropy": randn(*shape, seed=2).abs(),
        "old_logprob": logp - 0.8 * randn(*shape, seed=3),
        "advantage": randn(*shape, seed=4),
        "weight": randn(*shape, seed=5).abs(),
        "entropy_weight": randn(*shape, seed=6).abs(),
        "importance": randn(*shape, seed=7).abs(),
        "ref_logprob": logp - 0.3 * randn(*shape, seed=8),
        "log_ratio": 0.7 * randn(*shape, seed=9),
    }
    out["old_logprob"].clamp_(max=0)  # log-probabilities; some are 0
    pick = torch.arange(n).view(shape)
    zeros = (("advantage", 11), ("weight", 5), ("entropy_weight", 3), ("importance", 7))
    for name, period in zeros:
        out[name][pick % period == 1] = 0
    out["weight"][pick == 0] = 0  # no row before the second one counts
    for k, name in enumerate(out):
        out[name][pick == 20 + 2 * k] = NAN if k % 2 else INF if name == "importance" else -INF
    out["weight"][(pick >= 20) & (pick < 38)] = 1
    out["finite"] = pick % 13 != 6
    return {k: v if k == "finite" else v.to(dtype) for k, v in out.items()}


def arguments(given: dict[str, Tensor], **other: Any) -> list[Any]:
    """In the operator's order; what is not given is None."""
    hyper, values = other.get("hyper"), other.get("values", BOUNDS)
    return [
        *(given.get(name) for name in ROWS), hyper, values, other.get("kind", CLIP),
        other.get("clips", True), other.get("needs_ref", True),
    ]  # fmt: skip


def cases(n: int, dtype: torch.dtype) -> dict[str, list[Any]]:
    every = rows(n, dtype)
    required = {name: every[name] for name in REQUIRED}
    weighted = required | {"importance": every["importance"]}
    # Of -inf the estimators of the KL divergence are infinite, and so are their sums.
    usual = required | {"old_logprob": every["old_logprob"].clamp_min(-6)}
    per_row = torch.tensor(BOUNDS)[:, None] * (1 + 0.1 * randn(1, every["weight"].numel(), seed=10))
    return {
        "every input": arguments(every),
        "usual": arguments(usual, needs_ref=False),
        "on-policy": arguments(required),
        "no clipping": arguments(usual, clips=False),
        "not needed ref": arguments(every, needs_ref=False),
        "dppo_tv": arguments(usual, kind=DPPO_TV),
        "dppo_kl": arguments(usual, kind=DPPO_KL),
        "dppo_kl on-policy": arguments(required, kind=DPPO_KL),
        "unbounded": arguments(usual, values=[0.0, INF, INF, INF, 0.0, 0.0, 0.0, 0.0, INF]),
        "at the bounds": arguments(weighted, values=[1.0] * 9),
        "one hyper": arguments(every, hyper=torch.tensor(BOUNDS, dtype=dtype)[:, None]),
        "hyper per row": arguments(every, hyper=per_row.to(dtype)),
    }


def check(backend: Backend, args: list[Any]) -> Tensor:
    expected = metric_rows(*args)
    found = backend("policy_metrics", *(backend.to(x) for x in args)).cpu()
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert torch.equal(found[:11], expected[:11]), SUMS[:11]
    assert_close(found, expected, rtol=1e-11, atol=1e-12, equal_nan=True)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", cases(2, torch.float32))
def test_every_backend_agrees_with_the_definition(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    expected = check(backend, cases(600, dtype)[name])
    sums = dict(zip(SUMS, expected.tolist(), strict=False))
    assert all(sums[f"rows_{kind}"] > 0 for kind in ("active", "skipped", "nonfinite", "pos"))
    regions = [sums[f"clip_{side}"] for side in ("pos_low", "pos_high", "neg_low", "neg_high")]
    if name in ("every input", "usual", "not needed ref", *HYPER_CASES):
        assert min(regions) > 0 and sums["dual_or_cap"] > 0
    if name == "at the bounds":  # of a ratio of 1
        assert max(regions) == sums["dual_or_cap"] == 0
    weighted = ("every input", "not needed ref", "at the bounds", *HYPER_CASES)
    assert (sums["dropped"] > 0) == (name in weighted)
    if name in ("dppo_tv", "dppo_kl"):
        assert regions[0] == regions[3] == 0 and min(regions[1:3]) > 0


@pytest.mark.parametrize("n", [0, 2, 4, 70, 3000])
def test_any_number_of_rows(backend: Backend, n: int) -> None:
    """Fewer rows than threads, several chunks of the CPU, none."""
    check(backend, cases(n, torch.float32)["every input"])


def test_the_definition_waits_for_no_value() -> None:
    """It serves CUDA tensors where no library does."""
    for args in cases(6, torch.float32).values():
        there = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        with NoHostData():
            assert metric_rows(*there).is_meta


def test_threads_and_order_change_no_bit() -> None:
    args = cases(3000, torch.float32)["every input"]
    one = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.ops.reasonkern.policy_metrics(*args)
        torch.set_num_threads(3)
        assert_same_bits(torch.ops.reasonkern.policy_metrics(*args), alone)
    finally:
        torch.set_num_threads(one)


@pytest.mark.parametrize("group", [1, 32, 128])
def test_order_of_simulated_threads_changes_no_bit(group: int) -> None:
    sim = pytest.importorskip("cuda_sim.backend", exc_type=ImportError)
    args = cases(300, torch.float64)["every input"]
    with sim.using(group=group):
        expected = sim.policy_metrics(*args)
        for order in ("reverse", "random"):
            with sim.using(order=order, seed=group):
                assert_same_bits(sim.policy_metrics(*args), expected)
    assert_close(expected, metric_rows(*args), rtol=1e-12, atol=1e-13)


# ---- operators of one call


def launches(objective: Objective, dtype: torch.dtype = torch.bfloat16, **other: Any) -> Any:
    """Of a forward on the meta device: what a GPU is asked, without the CPU's checks of values."""
    x = torch.empty(4, 8, 32, dtype=dtype, device="meta", requires_grad=True)
    row = torch.empty(4, 8, device="meta")
    given = {"old_logprob": row, "advantage": row, "weight": row} | other
    targets = torch.empty(4, 8, dtype=torch.int64, device="meta")
    with Launches() as mode:
        rk.policy_loss(x, targets, objective=objective, **given)
    return mode.count


@pytest.mark.parametrize("inplace", [False, True])
def test_a_fused_forward_is_three_operators(inplace: bool) -> None:
    row = torch.empty(4, 8, device="meta")
    name = "policy_loss_" if inplace else "policy_loss"
    fused = {name: 1, "sum": 1, "policy_metrics": 1}
    plain = Objective.dapo(entropy_coef=0.1)
    assert launches(plain, inplace_grad=inplace) == fused
    every = {"ref_logprob": row, "entropy_weight": row, "temperature": row, "inplace_grad": inplace}
    assert launches(Objective.ppo(kl=("k3", 0.1)), **every) == fused
    by_sequence = launches(plain, advantage=row[:, 0], inplace_grad=inplace)
    assert by_sequence == fused | {"clone": 1}  # one value a sequence spread over its rows


def test_a_fused_linear_forward_is_two_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)  # as on a GPU
    hidden, head = torch.zeros(4, 8, 16), torch.zeros(32, 16).requires_grad_()
    row, targets = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.int64)
    given = {"advantage": row, "weight": row, "objective": Objective.dapo()}
    with Launches() as mode:
        rk.linear_policy_loss(hidden, head, targets, **given)
    assert mode.count == {"linear_policy_loss": 1, "policy_metrics": 1}


def test_rows_of_padded_tokens_are_given_as_they_come() -> None:
    """Seven views cost the host as much as the operator; the metrics are cut when they are read."""
    x, row = torch.empty(4, 8, 32, device="meta"), torch.empty(4, 8, device="meta")
    targets = torch.empty(4, 8, dtype=torch.int64, device="meta")
    with Launches() as mode:
        rk.token_stats(x, targets)
        rk.policy_loss(x, targets, advantage=row, weight=row, objective=Objective.dapo())
    assert mode.views == 0


def test_two_phase_forwards() -> None:
    """Objectives of given statistics, of tokens and of sequences: one operator maps them."""
    local = {"token_stats": 1, "objective_map": 1, "sum": 1, "policy_metrics": 1}
    found = launches(Objective.dapo(entropy_coef=0.1), torch.float16)
    assert found == local | {"ne": 1}  # the rows to read
    row = torch.empty(4, 8, device="meta")
    by_sequence = {"token_stats": 1, "sequence_map": 1, "sum": 1, "policy_metrics": 1, "ne": 1}
    for objective in (Objective.gspo(), Objective.gmpo(), Objective.vespo()):
        found = launches(objective, advantage=row[:, 0])
        assert found == by_sequence | {"clone": 1}, objective.name
