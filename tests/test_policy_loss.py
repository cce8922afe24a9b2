"""Row statistics and the numerics of policy_loss that every backend keeps, one named test each."""

from __future__ import annotations

from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import assert_same_bits
from policy_loss_cases import INF, NAN, LossArgs, Stats
from policy_loss_checks import (
    REFERENCE,
    check_loss,
    check_stats,
    literal_gradient,
    row_grads,
    run_gradient,
    run_loss,
    run_stats,
    simple_loss,
)
from tolerance import acc, randn
from torch import Tensor

from reasonkern.policy_loss import reference as ref

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MANY_TILES = 13_195  # more than one tile of any backend, a multiple of nothing


def assert_loss_row_dropped(out: cases.Loss, row: Any) -> None:
    """Counted nonfinite: no loss, no gradient, and a logprob that says so."""
    assert not torch.isfinite(out.logprob[row]).any()
    for t in (out.row_loss, out.token_loss, out.grad_logits):
        assert (t[row] == 0).all()


# ---- §2: fp32 accumulation


def test_statistics_and_gradient_on_hard_rows(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(1000, dtype)
    cases.assert_hard(x, y)
    check_stats(backend, backend.to(x), y)


def test_reference_is_autograd_through_log_softmax() -> None:
    """Elsewhere the reference is the truth, and an error of it would widen what is allowed."""
    x, y = cases.hard_logits(300, torch.float64, seed=16)
    grads, t = row_grads(y, x.dtype), 0.5 + randn(*y.shape, seed=17).abs()
    for scaling in ((None, 1.0, 0.0), (None, 0.7, 0.0), (t, 1.0, 25.0)):
        stats = Stats(*ref.token_stats(x, y, None, *scaling))
        expected, slope = literal_gradient(x, y, None, grads, *scaling)
        for got, e in zip(stats, expected, strict=True):
            torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-10)
        got = run_gradient(REFERENCE, x, y, stats, grads, *scaling)
        torch.testing.assert_close(got, slope, rtol=1e-10, atol=1e-10)


def test_fp32_accumulation_whatever_the_dtype(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(257, dtype, seed=3)
    got = check_loss(backend, simple_loss(backend.to(x), y))
    assert got.logprob.dtype == got.row_loss.dtype == acc(dtype)
    assert got.grad_logits.dtype == dtype
    if dtype == torch.bfloat16:  # what this guards against is far outside the tolerance
        same_dtype = cases.literal_stats(x, y).logprob.float()
        error = (same_dtype - got.logprob).abs()
        assert error[torch.isfinite(error)].max() > 1e-2


@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 127, 128, 129, 1000, 4097])
def test_vocabulary_a_multiple_of_nothing(backend: Backend, vocab: int) -> None:
    for dtype in (torch.bfloat16,) if backend.slow else (torch.float32, torch.bfloat16):
        x, y = cases.hard_logits(vocab, dtype, seed=vocab)
        x, y = x[:2], y[:2]
        x[0, 0] = torch.arange(vocab) % 7 - 3  # no dominating logit: the tail counts
        check_stats(backend, backend.to(x), y)
        if not backend.slow:
            check_loss(backend, simple_loss(backend.to(x), y))


# ---- §2: -inf logits


@pytest.mark.parametrize("masked", [1, 511, 1024, 2048, 4096, 8192, MANY_TILES - 1])
def test_first_tiles_all_minus_inf(backend: Backend, masked: int) -> None:
    x = randn(1, 2, MANY_TILES, seed=masked).float()
    x[0, 0, :masked] = -INF
    x[0, 1, MANY_TILES - masked :] = -INF
    y = torch.tensor([[MANY_TILES - 1, 0]])
    got = check_stats(backend, backend.to(x), y)
    assert torch.isfinite(got.logprob).all() and torch.isfinite(got.entropy).all()
    check_loss(backend, simple_loss(backend.to(x), y))


def test_varentropy_of_an_almost_flat_row_is_not_negative(backend: Backend) -> None:
    """There the difference of the moments is 4e-6 of them, and float32 sums are rounded."""
    x = torch.zeros(1, 3, 262_144)
    x[..., 7] = torch.tensor([2e-4, 5e-4, 1e-3])
    got = run_stats(backend, backend.to(x), torch.zeros(1, 3, dtype=torch.int64))
    assert (got.varentropy >= 0).all()


def test_target_at_minus_inf(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(300, dtype)
    x[1, 2, y[1, 2]] = -INF
    got = run_stats(backend, backend.to(x), y)
    assert got.logprob[1, 2] == -INF and not got.is_top1[1, 2]
    for name in ("entropy", "lse", "collision", "varentropy", "max_prob", "row_max"):
        assert torch.isfinite(getattr(got, name)).all(), name
    gradient = run_gradient(backend, backend.to(x), y, got, row_grads(y, dtype))
    assert (gradient[1, 2] == 0).all() and torch.isfinite(gradient).all()
    capped = run_stats(backend, backend.to(x), y, None, None, 1.0, 30.0)
    assert capped.logprob[1, 2] == -INF and torch.isfinite(capped.entropy).all()
    out = run_loss(backend, simple_loss(backend.to(x), y))
    assert_loss_row_dropped(out, (1, 2))
    assert out.logprob[1, 2] == -INF and torch.isfinite(out.entropy).all()
    assert all(torch.isfinite(t).all() for t in (out.row_loss, out.token_loss, out.grad_logits))


@pytest.mark.parametrize("vocab", [1, 40, MANY_TILES])
def test_row_of_minus_inf_only(backend: Backend, vocab: int) -> None:
    x = randn(1, 3, vocab, seed=4).float()
    x[0, 1] = -INF
    y = torch.zeros(1, 3, dtype=torch.int64)
    assert_row_has_no_statistics(backend, x, y, (0, 1), row_max=-INF)


def assert_row_has_no_statistics(
    backend: Backend, x: Tensor, y: Tensor, row: Any, row_max: float = NAN
) -> None:
    """NaN statistics, gradient 0, out of the loss; the other rows are bitwise what they are
    without it. `row_max` alone tells a row of -inf, which may be one part of a row, from a bad one.
    """
    clean, clean_y = x.clone(), y.clone()
    clean[row], clean_y[row] = 1.0, 0
    others = torch.ones(y.shape, dtype=torch.bool)
    others[row] = False
    stats = run_stats(backend, backend.to(x), y)
    for t in stats[:-1]:
        assert (t[row] == 0 if t.dtype == torch.bool else t[row].isnan()).all()
    expected = torch.full_like(stats.row_max[row], row_max)
    assert torch.equal(stats.row_max[row].isnan(), expected.isnan())
    assert expected.isnan().all() or torch.equal(stats.row_max[row], expected)
    gradient = run_gradient(backend, backend.to(x), y, stats, row_grads(y, x.dtype))
    assert (gradient[row] == 0).all()
    out = run_loss(backend, simple_loss(backend.to(x), y))
    assert_loss_row_dropped(out, row)
    assert out.logprob[row].isnan().all() and out.entropy[row].isnan().all()
    clean_stats = run_stats(backend, backend.to(clean), clean_y)
    assert_same_bits([t[others] for t in stats], [t[others] for t in clean_stats])
    same_inputs = simple_loss(backend.to(x), y).map(Tensor.cpu)
    clean_args = cases.replace(same_inputs, logits=clean, targets=clean_y)
    clean_out = run_loss(backend, clean_args)
    assert_same_bits([t[others] for t in out], [t[others] for t in clean_out])


def test_row_with_one_finite_logit(backend: Backend, dtype: torch.dtype) -> None:
    """A grammar that leaves one token: certain, and nothing to learn."""
    x = torch.full((1, 2, 300), -INF, dtype=dtype)
    x[0, 0, 0], x[0, 1, 299] = 7.0, -3.0
    y = torch.tensor([[0, 299]])
    got = run_stats(backend, backend.to(x), y)
    assert got.is_top1.all() and torch.equal(got.lse, got.row_max)
    for t, value in ((got.logprob, 0), (got.entropy, 0), (got.collision, 1), (got.max_prob, 1)):
        assert (t == value).all()
    out = run_loss(backend, simple_loss(backend.to(x), y))
    assert out.grad_logits.abs().max() <= torch.finfo(acc(dtype)).eps
    assert (out.grad_logits[x == -INF] == 0).all()


# ---- §2: NaN, +inf, invalid targets


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["first", "target", "middle", "last", "all"])
def test_nonfinite_logit_in_an_active_row(backend: Backend, bad: float, where: str) -> None:
    vocab = 2571
    x = randn(1, 3, vocab, seed=5).to(torch.bfloat16)
    y = torch.tensor([[3, 700, 8]])
    columns = {"first": 0, "target": 700, "middle": 1500, "last": vocab - 1, "all": slice(None)}
    x[0, 1, columns[where]] = bad
    assert_row_has_no_statistics(backend, x, y, (0, 1))


def test_nan_after_inf_and_inf_after_minus_inf(backend: Backend) -> None:
    x = torch.full((1, 4, 3000), -INF)
    x[0, 0, 5], x[0, 0, 2900] = INF, NAN
    x[0, 1, 2999] = INF
    x[0, 2, 2998:] = NAN
    x[0, 3] = 0.25
    y = torch.tensor([[5, 2999, 0, 17]])
    assert_row_has_no_statistics(backend, x, y, (0, slice(0, 3)))


def test_plus_inf_under_softcap_is_nonfinite(backend: Backend) -> None:
    """tanh(inf) is 1, which must not make the row finite; -inf must stay -inf."""
    x = randn(1, 3, 700, seed=6).float()
    x[0, 1, 650], x[0, 2, :90] = INF, -INF
    y = torch.tensor([[1, 2, 400]])
    stats = run_stats(backend, backend.to(x), y, softcap=30.0)
    assert stats.logprob[0, 1].isnan() and stats.entropy[0, 1].isnan()
    out = run_loss(backend, simple_loss(backend.to(x), y, softcap=30.0))
    assert_loss_row_dropped(out, (0, 1))
    check_stats(backend, backend.to(x[:, [0, 2]]), y[:, [0, 2]], None, None, 1.0, 30.0)


@pytest.mark.parametrize("target", [-1, -100, 50, 2**31 + 1, 2**40, -(2**40)])
def test_invalid_target_in_an_active_row(backend: Backend, target: int) -> None:
    x = randn(1, 3, 50, seed=7).float()
    assert_row_has_no_statistics(backend, x, torch.tensor([[0, target, 49]]), (0, 1))


def test_skipped_rows_are_harmless(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(130, dtype)
    skipped = torch.zeros(y.shape, dtype=torch.bool)
    skipped[0, 1], skipped[1, 3], skipped[2] = True, True, True
    a = simple_loss(x, y)
    a = cases.replace(a, weight=torch.where(skipped, 0.0, a.weight))
    clean = run_loss(backend, a)
    x, y = x.clone(), y.clone()
    x[skipped], y[skipped] = NAN, -100
    x[2, 1], x[2, 2] = INF, -INF
    y[2, 3] = 2**40
    stats = run_stats(backend, backend.to(x), y, ~skipped)
    for t in stats:
        assert (t[skipped] == 0).all()
    gradient = run_gradient(backend, backend.to(x), y, stats, row_grads(y, dtype))
    assert (gradient[skipped] == 0).all() and torch.isfinite(gradient).all()
    spoiled = {
        name: torch.where(skipped, NAN, getattr(a, name)) for name in ("old_logprob", "advantage")
    }
    out = run_loss(backend, cases.replace(a, logits=x, targets=y, **spoiled))
    assert all((t[skipped] == 0).all() for t in out)
    assert_same_bits(out, clean)


def test_entropy_weight_alone_makes_a_row_active(backend: Backend) -> None:
    x, y = cases.hard_logits(130, torch.float32)
    weight = torch.zeros(y.shape)
    weight[0] = 1.0
    entropy_weight = torch.zeros(y.shape)
    entropy_weight[:2] = 0.5
    entropy_weight[0, 0] = 0.0
    a = simple_loss(backend.to(x), y, weight=weight, entropy_weight=entropy_weight)
    out = check_loss(backend, a)
    assert (out.entropy[:2] != 0).all() and (out.entropy[2] == 0).all()
    assert (out.grad_logits[1, 3] != 0).any() and (out.grad_logits[2] == 0).all()


def test_all_rows_masked(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.full((2, 3, 77), NAN, dtype=dtype)
    y = torch.full((2, 3), -100)
    zero = torch.zeros(2, 3, dtype=acc(dtype))
    a = LossArgs(backend.to(x), y, None, zero + 1, zero, values=(0.8, 1.2, *(INF,) * 7))
    out = run_loss(backend, a)
    assert out.grad_logits.shape == x.shape and all((t == 0).all() for t in out)
    stats = run_stats(backend, backend.to(x), y, torch.zeros(2, 3, dtype=torch.bool))
    assert all((t == 0).all() for t in stats)
    gradient = run_gradient(backend, backend.to(x), 0 * y, stats, row_grads(y, dtype))
    assert (gradient == 0).all()


def test_each_incoming_gradient_alone(backend: Backend) -> None:
    """Of logprob, entropy, lse and collision: all together they give the sum."""
    x, y = backend.to(randn(1, 2, 77, seed=3).float()), torch.tensor([[0, 76]])
    stats, grads = run_stats(backend, x, y), row_grads(y, x.dtype)
    each = [
        run_gradient(backend, x, y, stats, [g * (i == k) for i, g in enumerate(grads)])
        for k in range(4)
    ]
    assert all((gradient != 0).any() for gradient in each)
    whole = run_gradient(backend, x, y, stats, grads)
    torch.testing.assert_close(torch.stack(each).sum(0), whole, rtol=1e-5, atol=1e-6)


# ---- §1, §2: the shifted form, temperature, soft-cap


def test_offset_3000(backend: Backend) -> None:
    """`z_y - lse` and `lse - sum p z` lose 1e-4 and more here."""
    x = (randn(2, 3, 2000, seed=8) + 3000).float()
    y = torch.randint(2000, (2, 3), generator=cases.generator(9))
    got = check_stats(backend, backend.to(x), y)
    expected = Stats(*ref.token_stats(x.double(), y, None, None, 1.0, 0.0))
    assert (got.logprob - expected.logprob).abs().max() < 5e-6
    assert (got.entropy - expected.entropy).abs().max() < 2e-5
    naive = got.lse.double() - (x.double().softmax(-1).float() * x).sum(-1)
    assert (naive - expected.entropy).abs().max() > 1e-4
    check_loss(backend, simple_loss(backend.to(x), y))


@pytest.mark.parametrize("per_row", [False, True])
def test_offset_3000_under_a_temperature(backend: Backend, per_row: bool) -> None:
    """3000 / 0.7 is rounded by up to 2.4e-4: the maximum is kept and subtracted before that.

    The row shifted by -3000 has the same gradient, and plain torch is accurate there.
    """
    x = (randn(2, 3, 2000, seed=8) + 3000).float()
    y = torch.randint(2000, (2, 3), generator=cases.generator(9))
    rows = 0.5 + randn(2, 3, seed=10).abs().float() if per_row else None
    scaling = (rows, 0.7, 0.0)
    got = check_stats(backend, backend.to(x), y, None, *scaling)
    assert torch.equal(got.row_max, x.amax(-1))
    grads = row_grads(y, x.dtype)
    gradient = run_gradient(backend, backend.to(x), y, got, grads, *scaling)
    _, plain = literal_gradient(x - 3000, y, None, grads, *scaling)
    wide = [t.double() if isinstance(t, Tensor) else t for t in scaling]
    _, exact = literal_gradient(x.double() - 3000, y, None, [g.double() for g in grads], *wide)
    error, allowed = ((g.double() - exact).abs().max() for g in (gradient, plain))
    assert error <= 2 * allowed + 1e-7
    loss = simple_loss(backend.to(x), y, row_temperature=rows, temperature=0.7)
    check_loss(backend, loss)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_huge_logits(backend: Backend, dtype: torch.dtype, softcap: float) -> None:
    """Largest logits of 10^6 T and more, of both signs, and masks of the least finite number.

    There the rounding of max x / T is more than the distances between the logits that count.
    """
    half = dtype == torch.float16
    huge, least = (6e4, -65504.0) if half else (1e30, -3.38e38)
    x, columns = randn(1, 8, 3001, seed=17), [3, 1500, 3000]
    x[0, 0, :2900], x[0, 1, 100:] = 0.9 * least, least
    x[0, 2, columns], x[0, 3, columns] = huge, -huge
    x[0, 3, [0, 1, 2]] = x[0, 4] = least
    x[0, 5] = 7 * huge / 8
    x[0, 5, columns] = huge
    x[0, 6, :1700], x[0, 6, 1700:] = -INF, least
    x[0, 7] = 20 + x[0, 7].round()
    x, y = x.to(dtype), torch.tensor([[3000, 3, 1500, 7, 0, 7, 2000, 9]])
    t = torch.tensor([[*[1e-3 if half else 1.0] * 7, 1e-5]], dtype=acc(dtype))
    check_stats(backend, backend.to(x), y, None, t, 1.0, softcap)
    check_loss(backend, simple_loss(backend.to(x), y, row_temperature=t, softcap=softcap))


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_scalar_temperature(backend: Backend, temperature: float) -> None:
    x, y = cases.hard_logits(1000, torch.float32, seed=11)
    check_stats(backend, backend.to(x), y, None, None, temperature, 0.0)


def test_row_temperature(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(400, dtype, seed=12)
    t = (0.3 + randn(*y.shape, seed=13).abs()).to(acc(dtype))
    check_stats(backend, backend.to(x), y, None, t, 123.0, 0.0)
    check_loss(backend, simple_loss(backend.to(x), y, row_temperature=t, temperature=123.0))


def test_softcap(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(400, dtype, seed=14)
    x[1, 0], x[2, 1] = x[1, 0] / 3, x[2, 1] - 3000  # no saturated ties
    x *= 2
    t = (0.5 + randn(*y.shape, seed=15).abs()).to(acc(dtype))
    check_stats(backend, backend.to(x), y, None, t, 1.0, 25.0)
    check_loss(backend, simple_loss(backend.to(x), y, temperature=0.8, softcap=25.0))


def test_top1_is_the_first_among_ties(backend: Backend) -> None:
    x = randn(1, 4, 2100, seed=16).to(torch.bfloat16)
    x[0, :, 600] = x[0, :, 1800] = x[0, :, 2099] = 9.0
    y = torch.tensor([[600, 1800, 2099, 7]])
    assert run_stats(backend, backend.to(x), y).is_top1.tolist() == [[True, False, False, False]]


def test_a_softcap_makes_no_token_the_top(backend: Backend) -> None:
    """Logits that it rounds to one value keep their order, except in Triton.

    Its reduction is of capped logits; one of both costs the loss kernel registers that it has not.
    """
    x = randn(1, 3, 5000, seed=16).float()
    x[..., 600], x[..., 4800], x[..., 4900] = 60.0, 61.0, 61.0
    assert (5 * torch.tanh(x / 5))[0, 0, 600] == (5 * torch.tanh(x / 5))[0, 0, 4800]
    stats = run_stats(backend, backend.to(x), torch.tensor([[600, 4800, 4900]]), softcap=5.0)
    ties = [[True, False, False]] if backend.name == "triton" else [[False, True, False]]
    assert stats.is_top1.tolist() == ties


# ---- §2: fp16


def test_fp16_gradient_keeps_its_mass_with_loss_scale(backend: Backend) -> None:
    vocab = 151936
    x = randn(1, 1, vocab, seed=20).to(torch.float16)
    y = torch.tensor([[77]])
    one = torch.ones(1, 1)
    a = LossArgs(x, y, None, one, one / 512, values=(0.8, 1.2, *(INF,) * 2, 0, 0, 0, 0, 20.0))
    exact = (
        cases.exact_loss(a).grad_logits.abs().sum() - cases.exact_loss(a).grad_logits.abs().max()
    )
    for scale, kept in ((None, (0.0, 0.5)), (65536.0, (0.99, 1.01))):
        scaled = None if scale is None else torch.tensor(scale)
        got = run_loss(backend, cases.replace(a, loss_scale=scaled)).grad_logits.double().abs()
        mass = (got.sum() - got.max()) / (scale or 1.0)
        assert kept[0] <= mass / exact <= kept[1]


def test_loss_scale_multiplies_before_rounding(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(100, dtype)
    scale = torch.tensor(0.125 if dtype == torch.float16 else 1024.0, dtype=acc(dtype))
    a = simple_loss(backend.to(x), y)
    scaled = check_loss(backend, cases.replace(a, loss_scale=scale))
    assert_same_bits(scaled[:4], run_loss(backend, a)[:4])
