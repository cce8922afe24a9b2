"""`rollout_mismatch` against literal float64 loops, under merging, and against verl."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_literal import Batch, batch, make_batch
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import MismatchMetrics, rollout_mismatch

EXACT = {"rtol": 1e-12, "atol": 1e-14}
FORMS = ("padded", "packed")


def found(b: Batch, **other: Any) -> MismatchMetrics:
    rows = {"old_logprob": b.old_logprob, "rollout_logprob": b.rollout_logprob, "mask": b.mask}
    return rollout_mismatch(**(rows | {"segments": b.segments} | other))


def literal(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, float]:
    """Every value by loops over the sequences of (B, T) rows, whose trained tokens are finite."""
    rows = zip(*(x.double().tolist() for x in (old, rollout, mask)), strict=True)
    pairs = [[(p, q) for p, q, m in zip(*row, strict=True) if m] for row in rows]
    pairs = [row for row in pairs if row]
    d = [p - q for row in pairs for p, q in row]
    r = [math.exp(x) for x in d]
    n, count = len(d), len(pairs)
    out: dict[str, float] = {"rows_active": n, "rows_skipped": mask.numel() - n}
    out |= {"rows_nonfinite": 0, "sequences": count}
    out["abs_diff_mean"], out["abs_diff_max"] = sum(map(abs, d)) / n, max(map(abs, d))
    out["kl_k1"] = -sum(d) / n
    out["kl_k3"] = sum(math.exp(x) - 1 - x for x in d) / n
    out["ratio_mean"], out["ratio_min"], out["ratio_max"] = sum(r) / n, min(r), max(r)
    out["chi2"] = sum(x * x for x in r) / n - 1
    out["ess_frac"] = sum(r) ** 2 / sum(x * x for x in r) / n
    mean = [(sum(p for p, _ in row) / len(row), sum(q for _, q in row) / len(row)) for row in pairs]
    out["old_ppl"] = sum(math.exp(-p) for p, _ in mean) / count
    out["rollout_ppl"] = sum(math.exp(-q) for _, q in mean) / count
    out["ppl_ratio"] = sum(math.exp(q - p) for p, q in mean) / count
    out["log_ppl_abs_diff"] = sum(abs(q - p) for p, q in mean) / count
    w = [math.exp(sum(p - q for p, q in row)) for row in pairs]
    out["chi2_seq"] = sum(x * x for x in w) / count - 1
    out["ess_frac_seq"] = sum(w) ** 2 / sum(x * x for x in w) / count
    return out


def compare(got: MismatchMetrics, expected: dict[str, float], **tolerance: float) -> None:
    values = got.compute()
    assert set(values) == set(expected)
    assert all(x.shape == () and x.dtype == torch.float64 for x in values.values())
    plain = {name: x.item() for name, x in values.items()}
    assert plain == pytest.approx(expected, **(tolerance or {"rel": 1e-11, "abs": 1e-13}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_value_is_its_definition(form: str, dtype: torch.dtype) -> None:
    """Sequences without a trained token, whose rows hold NaN, are among them."""
    b = make_batch().to(dtype)
    expected = literal(b.old_logprob, b.rollout_logprob, b.mask)
    assert expected["sequences"] < len(b.mask) and expected["abs_diff_mean"] > 0.1
    if form == "packed":
        b = b.pack()
        expected["rows_skipped"] = int((~b.mask).sum())
    compare(found(b), expected)


def test_packed_rows_without_segments_have_the_values_of_tokens() -> None:
    b = batch("packed")
    known, tokens = found(b).compute(), found(b, segments=None).compute()
    assert set(known) - set(tokens) == {
        "sequences", "old_ppl", "rollout_ppl", "ppl_ratio", "log_ppl_abs_diff", "chi2_seq",
        "ess_frac_seq",
    }  # fmt: skip
    for name, value in tokens.items():
        assert torch.equal(value, known[name])


def test_small_differences_keep_their_digits() -> None:
    """Of mean(r - 1 - d) = d^2 / 2, the difference of the sums would keep 3."""
    d = torch.full((2, 500), 1e-6, dtype=torch.float64)
    got = rollout_mismatch(d, torch.zeros_like(d), torch.ones_like(d)).compute()
    assert got["kl_k3"].item() == pytest.approx(5e-13, rel=1e-6, abs=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["old_logprob", "rollout_logprob"])
def test_nonfinite_tokens_are_counted_and_left_out(name: str, value: float, form: str) -> None:
    """As if the mask were 0 there, also in the sums of their sequence."""
    b = batch(form)
    at = (b.mask.cumsum(-1) == 2) & b.mask
    assert at.any()
    got = found(b, **{name: torch.where(at, value, getattr(b, name))}).compute()
    expected = found(b, mask=b.mask & ~at).compute()
    moved = torch.tensor(float(at.sum())).double()
    assert_close(got.pop("rows_nonfinite"), moved)
    assert_close(got.pop("rows_skipped"), expected.pop("rows_skipped") - moved)
    assert expected.pop("rows_nonfinite") == 0
    for key, x in expected.items():
        assert torch.equal(got[key], x), key


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (4,), (0,)])
def test_no_trained_token_gives_zeros(shape: tuple[int, ...]) -> None:
    rows = torch.zeros(shape)
    segments = torch.tensor([0, 0, *shape]) if len(shape) == 1 else None
    nothing = rollout_mismatch(rows, rows - math.inf, rows, segments=segments)
    for values in (nothing.compute(), (nothing + nothing).compute()):
        skipped = values.pop("rows_skipped")
        assert skipped in (rows.numel(), 2 * rows.numel())
        assert len(values) == 18 and not any(values.values())
    some = found(make_batch())
    for merged in (some + nothing, nothing + some):
        for name, x in merged.compute().items():
            assert name == "rows_skipped" or torch.equal(x, some.compute()[name])


def test_log_ratios_are_clamped_before_exp() -> None:
    far = torch.tensor([[300.0, -300.0, -15.0, -15.0]])
    got = rollout_mismatch(far, torch.zeros_like(far), torch.ones_like(far)).compute()
    assert all(torch.isfinite(x) for x in got.values())
    assert got["abs_diff_max"] == 300 and got["kl_k1"] == 7.5
    assert got["ratio_max"].item() == pytest.approx(math.exp(20))
    assert got["ratio_min"].item() == pytest.approx(math.exp(-20))
    assert got["chi2_seq"] == -1 and got["ess_frac_seq"].item() == pytest.approx(1)


def test_nothing_has_a_gradient() -> None:
    b = make_batch().clean()
    old = b.old_logprob.requires_grad_()
    assert not found(b, old_logprob=old).flat.requires_grad


# ---- merging


WHOLE = make_batch()


@settings(max_examples=30, deadline=None)
@given(owners=st.permutations(range(len(WHOLE.mask))), cut=st.integers(0, len(WHOLE.mask)))
def test_split_by_sequences_equals_whole(owners: list[int], cut: int) -> None:
    parts = [found(WHOLE.map(lambda x, i=i: x[i])) for i in (owners[:cut], owners[cut:])]
    assert_close(sum(parts).compute(), found(WHOLE).compute(), **EXACT)  # type: ignore[union-attr]


def test_known_and_unknown_sequences_do_not_merge() -> None:
    b = batch("packed")
    expected = "metrics: expected segments in both or in neither, got them in one"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        found(b) + found(b, segments=None)


def test_metrics_of_a_loss_and_of_a_mismatch_do_not_merge() -> None:
    b = make_batch()
    loss = rk.policy_loss(b.logits, b.targets, objective=rk.Objective.ppo(), **b.given()).metrics
    for pair in ((found(b), loss), (loss, found(b)), (found(b), 1), (1, found(b))):
        with pytest.raises(TypeError):
            pair[0] + pair[1]


# ---- errors


R = torch.zeros(2, 3)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"old_logprob": [0.0]}, "old_logprob: expected a tensor, got list"),
    ({"rollout_logprob": None}, "rollout_logprob: expected a tensor, got NoneType"),
    (
        {"rollout_logprob": R.long()},
        "rollout_logprob: expected dtype torch.float32 or torch.bfloat16 or torch.float16 or "
        "torch.float64, got torch.int64",
    ),
    (
        {"rollout_logprob": R[:1]},
        "mask: expected shape rollout_logprob.shape = (1, 3), got (2, 3)",
    ),
    ({"mask": R[0]}, "mask: expected shape old_logprob.shape = (2, 3), got (3,)"),
    ({"mask": R + 0.5}, "mask: expected bool or 0/1 values, got 0.5 at (0, 0)"),
    (
        dict.fromkeys(("old_logprob", "rollout_logprob", "mask"), R[None]),
        "mask: expected shape (B, T) or (N,), got (1, 2, 3)",
    ),
    ({"rollout_logprob": R.to("meta")}, "mask: expected the device of rollout_logprob, meta, got "
     "cpu"),
    ({"segments": torch.tensor([0, 6])}, "segments: expected None for padded (B, T) tokens (packed "
     "ones of shape (1, N) take squeeze(0)), got cu_seqlens"),
    (
        dict.fromkeys(("old_logprob", "rollout_logprob", "mask"), R[0])
        | {"segments": torch.tensor([0, 2])},
        "segments: expected non-decreasing offsets from 0 to 3 (padding is a segment, too), got "
        "[0, 2]",
    ),
    (
        dict.fromkeys(("old_logprob", "rollout_logprob", "mask"), R[0])
        | {"segments": torch.tensor([0, 3]).to("meta")},
        "segments: expected the device of mask, cpu, got meta",
    ),
    ({"parallel": 2}, "parallel: expected a Parallel or None, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors(changes: dict[str, Any], message: str) -> None:
    rows = {"old_logprob": R, "rollout_logprob": R, "mask": R} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rollout_mismatch(**rows)


# ---- verl 0.9.1


NAMES = {
    "kl_k1": "kl",
    "kl_k3": "k3_kl",
    "chi2": "chi2_token",
    "chi2_seq": "chi2_seq",
    "old_ppl": "training_ppl",
    "rollout_ppl": "rollout_ppl",
    "ppl_ratio": "ppl_ratio",
    "log_ppl_abs_diff": "log_ppl_abs_diff",
}


@pytest.mark.peers
def test_values_are_those_of_verl() -> None:
    name = "verl.trainer.ppo.rollout_corr_helper"
    verl = pytest.importorskip(name, reason="needs verl==0.9.1")
    b = make_batch().clean()
    b = b.map(lambda x: x[b.mask.any(-1)])  # verl's means count sequences without a token
    theirs = verl.compute_offpolicy_metrics(b.old_logprob, b.rollout_logprob, b.mask)
    got = found(b).compute()
    for mine, other in NAMES.items():  # verl divides by length + 1e-8
        assert got[mine].item() == pytest.approx(theirs[other], rel=1e-7), mine
