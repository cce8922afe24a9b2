"""Row statistics and the numerics of policy_loss that every backend keeps, one named test each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import SENTINEL, assert_same_bits, bits
from policy_loss_cases import INF, NAN, LossArgs, Stats, acc, assert_close, randn
from torch import Tensor

from reasonkern.policy_loss import reference as ref

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MANY_TILES = 5003  # more than one tile of any backend, a multiple of nothing


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, backend: Backend) -> torch.dtype:
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {request.param}")
    return request.param


def slack(backend: Backend, dtype: torch.dtype) -> int:
    """The interpreter's bfloat16 store does not round to nearest: one ulp."""
    return int(backend.name == "triton" and backend.slow and dtype == torch.bfloat16)


# ---- the two operators on a backend, with results on the CPU


def run_stats(
    backend: Backend,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    row_temperature: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Stats:
    tensors = (backend.to(t) for t in (y, mask, row_temperature))
    return Stats(*(t.cpu() for t in backend("token_stats", x, *tensors, temperature, softcap)))


def run_gradient(
    backend: Backend, x: Tensor, y: Tensor, stats: Stats, grads: Any, *scaling: Any
) -> Tensor:
    row_temperature, temperature, softcap = scaling or (None, 1.0, 0.0)
    saved = (stats.logprob, stats.entropy, stats.collision, stats.max_prob, stats.row_max)
    rows = (backend.to(t) for t in (*saved, *grads))
    out = backend(
        "token_stats_backward", x, backend.to(y), backend.to(row_temperature), temperature,
        softcap, *rows,
    )  # fmt: skip
    return out.cpu()


def run_loss(backend: Backend, a: LossArgs, needs_grad: bool = True) -> cases.Loss:
    out = backend("policy_loss", *a.map(backend.to).args(), needs_grad)
    return cases.Loss(*(t.cpu() for t in out))


def row_grads(y: Tensor, dtype: torch.dtype, seed: int = 50) -> list[Tensor]:
    """Incoming gradients of logprob, entropy, lse and collision, of comparable size."""
    return [randn(*y.shape, seed=seed + i).to(acc(dtype)) for i in range(4)]


def check_stats(
    backend: Backend, x: Tensor, y: Tensor, mask: Tensor | None = None, *scaling: Any
) -> Stats:
    """Statistics and their gradient against float64 and plain float32; rows must be finite."""
    scaling = scaling or (None, 1.0, 0.0)
    got = run_stats(backend, x, y, mask, *scaling)
    x, grads = x.cpu(), row_grads(y, x.dtype)
    gradient = run_gradient(backend, backend.to(x), y, got, grads, *scaling)

    wide = [t.double() if isinstance(t, Tensor) else t for t in scaling]

    def exact(x: Tensor, *grads: Tensor) -> list[Tensor]:
        stats = Stats(*ref.token_stats(x, y, mask, *wide))
        return [*stats, run_gradient(REFERENCE, x, y, stats, grads, *wide)]

    def plain(near: Tensor, *grads: Tensor) -> list[Tensor]:
        rows = [t.to(near.dtype) if isinstance(t, Tensor) else t for t in scaling]
        stats, gradient = literal_gradient(near, y, mask, grads, *rows)
        return [*stats, gradient.to(x.dtype)]

    key = cases.digest(x, y, mask, *scaling, *grads)
    expected, error = cases.baseline_error([x, *grads], exact, plain, key)
    for i, name in enumerate(Stats._fields):
        if name == "is_top1":
            assert torch.equal(got[i], expected[i])
        else:
            assert_close(name, got[i], expected[i], error[i])
    t = wide[1] if wide[0] is None else wide[0].unsqueeze(-1)
    terms = cases.gradient_terms(cases.scaled_logits(x.double(), *wide), y, 1 / t, *ordered(grads))
    assert_close("gradient", gradient, expected[-1], error[-1], slack(backend, x.dtype), terms)
    return got


def ordered(grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, collision) as the g, e, c, k of policy_loss.md."""
    return grads[0], grads[1], grads[3], grads[2]


def literal_gradient(
    x: Tensor, y: Tensor, mask: Tensor | None, grads: Sequence[Tensor], *scaling: Any
) -> tuple[Stats, Tensor]:
    x = x.clone().requires_grad_()
    base = cases.literal_stats(cases.scaled_logits(x, *scaling), y.clamp(0, x.shape[-1] - 1))
    outputs = (base.logprob, base.entropy, base.lse, base.collision)
    total = sum((g * t).sum() for g, t in zip(grads, outputs, strict=True))
    (gradient,) = torch.autograd.grad(total, x)
    if mask is not None:
        base = Stats(*(torch.where(mask, t, 0) for t in base))
        gradient = torch.where(mask.unsqueeze(-1), gradient, 0)
    return Stats(*(t.detach() for t in base)), gradient


REFERENCE = Backend("reference", "cpu", lambda op: getattr(ref, op))


def simple_loss(x: Tensor, y: Tensor, **changes: Any) -> LossArgs:
    """PPO with an entropy bonus; ratios within a few per cent of 1."""
    dtype = acc(x.dtype)
    good = torch.nan_to_num(x.detach().cpu().double(), NAN, 0.0, -INF).nan_to_num(0.0)
    logp = cases.literal_stats(good, y.clamp(0, x.shape[-1] - 1)).logprob
    logp = torch.where(torch.isfinite(logp), logp, 0.0)
    values = {
        "old_logprob": (logp + 0.05 * randn(*y.shape, seed=61)).to(dtype),
        "advantage": randn(*y.shape, seed=62).to(dtype),
        "weight": (0.5 + randn(*y.shape, seed=63).abs()).to(dtype),
        "values": (0.8, 1.2, INF, INF, 0.0, 0.0, 0.0, 0.1, 20.0),
    }
    return LossArgs(x, y, **(values | changes))


def check_loss(backend: Backend, a: LossArgs) -> cases.Loss:
    got = run_loss(backend, a)
    a = a.map(Tensor.cpu)
    expected, error = cases.loss_and_error(a)
    for i, name in enumerate(cases.Loss._fields[:4]):
        assert_close(name, got[i], expected[i], error[i])
    terms = cases.loss_gradient_terms(a, expected)
    rounding = slack(backend, a.logits.dtype)
    assert_close("gradient", got[4], expected[4], error[4], rounding, terms)
    return got


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
    for dtype in (torch.float32, torch.bfloat16):
        x, y = cases.hard_logits(vocab, dtype, seed=vocab)
        x, y = x[:2], y[:2]
        x[0, 0] = torch.arange(vocab) % 7 - 3  # no dominating logit: the tail counts
        check_stats(backend, backend.to(x), y)
        if not backend.slow:
            check_loss(backend, simple_loss(backend.to(x), y))


# ---- §2: -inf logits


@pytest.mark.parametrize("masked", [1, 511, 1024, 2048, 4096, 4999, MANY_TILES - 1])
def test_first_tiles_all_minus_inf(backend: Backend, masked: int) -> None:
    x = randn(1, 2, MANY_TILES, seed=masked).float()
    x[0, 0, :masked] = -INF
    x[0, 1, MANY_TILES - masked :] = -INF
    y = torch.tensor([[MANY_TILES - 1, 0]])
    got = check_stats(backend, backend.to(x), y)
    assert torch.isfinite(got.logprob).all() and torch.isfinite(got.entropy).all()
    check_loss(backend, simple_loss(backend.to(x), y))


def test_target_at_minus_inf(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(300, dtype)
    x[1, 2, y[1, 2]] = -INF
    got = run_stats(backend, backend.to(x), y)
    assert got.logprob[1, 2] == -INF and not got.is_top1[1, 2]
    for name in ("entropy", "lse", "collision", "varentropy", "max_prob", "row_max"):
        assert torch.isfinite(getattr(got, name)).all(), name
    gradient = run_gradient(backend, backend.to(x), y, got, row_grads(y, dtype))
    assert (gradient[1, 2] == 0).all() and torch.isfinite(gradient).all()
    out = run_loss(backend, simple_loss(backend.to(x), y))
    assert_loss_row_dropped(out, (1, 2))
    assert out.logprob[1, 2] == -INF and torch.isfinite(out.entropy).all()
    assert all(torch.isfinite(t).all() for t in (out.row_loss, out.token_loss, out.grad_logits))


@pytest.mark.parametrize("vocab", [1, 40, MANY_TILES])
def test_row_of_minus_inf_only(backend: Backend, vocab: int) -> None:
    x = randn(1, 3, vocab, seed=4).float()
    x[0, 1] = -INF
    assert_row_has_no_statistics(backend, x, torch.zeros(1, 3, dtype=torch.int64), (0, 1))


def assert_row_has_no_statistics(backend: Backend, x: Tensor, y: Tensor, row: Any) -> None:
    """NaN statistics, gradient 0, out of the loss; the other rows are bitwise what they are
    without it."""
    clean, clean_y = x.clone(), y.clone()
    clean[row], clean_y[row] = 1.0, 0
    others = torch.ones(y.shape, dtype=torch.bool)
    others[row] = False
    stats = run_stats(backend, backend.to(x), y)
    for t in stats:
        assert (t[row] == 0 if t.dtype == torch.bool else t[row].isnan()).all()
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


# ---- §2: addresses


def views(x: Tensor) -> dict[str, Tensor]:
    """The values of x (B, T, V) at other addresses, with sentinels between the rows."""
    b, t, v = x.shape

    def inside(shape: tuple[int, ...], view: Any) -> Tensor:
        room = view(torch.full(shape, SENTINEL, dtype=x.dtype, device=x.device))
        return room.copy_(x)

    return {
        "without the last token": inside((b, t + 1, v), lambda r: r[:, :-1]),
        "without the first token": inside((b, t + 1, v), lambda r: r[:, 1:]),
        "odd offset": inside((b * t * v + 3,), lambda r: r[3:].view(b, t, v)),
        "odd row pitch": inside((b, t, v + 5), lambda r: r[..., 2 : v + 2]),
        "time major": inside((t, b, v), lambda r: r.transpose(0, 1)),
        "every other row": inside((b, 2 * t, v), lambda r: r[:, ::2]),
    }


@pytest.mark.parametrize("vocab", [129, 1000])
def test_strided_views_are_read_in_place(backend: Backend, dtype: torch.dtype, vocab: int) -> None:
    x, y = cases.hard_logits(vocab, dtype)
    x, y = backend.to(x[:2, :3].contiguous()), y[:2, :3].contiguous()
    stats, out = run_stats(backend, x, y), run_loss(backend, simple_loss(x, y))
    gradient = run_gradient(backend, x, y, stats, row_grads(y, dtype))
    for view in views(x).values():
        assert_same_bits(run_stats(backend, view, y), stats)
        assert_same_bits(run_gradient(backend, view, y, stats, row_grads(y, dtype)), gradient)
        assert_same_bits(run_loss(backend, simple_loss(view, y)), out)


def test_in_place_equals_functional_and_stays_inside(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(131, dtype)
    x, y = backend.to(x[:2, :3].contiguous()), y[:2, :3].contiguous()
    x[0, 1, 4], y[1, 1] = NAN, 130  # a nonfinite row; a skipped one below
    a = simple_loss(x, y)
    a.weight[1, 2] = 0
    a = a.map(backend.to)
    functional = backend("policy_loss", *a.args(), True)
    stats = backend("token_stats", x, a.targets, None, None, 0.9, 0.0)
    saved = (None, 0.9, 0.0, *(stats[i] for i in (0, 1, 3, 5, 7)))
    grads = [backend.to(g) for g in row_grads(y, dtype)]
    gradient = backend("token_stats_backward", x, a.targets, *saved, *grads)
    for name in views(x):
        view = views(x)[name]
        rows = backend("policy_loss_", view, *a.args()[1:])
        assert_same_bits(rows, functional[:4])
        assert_written_inside(view, functional[4])
        view = views(x)[name]
        assert backend("token_stats_backward_", view, a.targets, *saved, *grads) is None
        assert_written_inside(view, gradient)


def assert_written_inside(view: Tensor, expected: Tensor) -> None:
    assert_same_bits(view, expected)
    view.fill_(SENTINEL)
    everything = torch.empty(0, dtype=view.dtype, device=view.device)
    everything.set_(view.untyped_storage(), 0, (view.untyped_storage().nbytes() // view.itemsize,))
    assert (everything == SENTINEL).all()


def test_rows_beyond_two_to_the_31(backend: Backend, tmp_path: Path) -> None:
    """Offsets past 2^31 elements; only the pages that are touched exist."""
    vocab, stride_b, stride_t = 1029, 2**31 + 11, 2**30 + 7
    count = stride_b + stride_t + vocab + 1
    if backend.device == "cpu":
        storage = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), True, 2 * count)
        flat = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (count,))
    else:
        flat = torch.empty(count, dtype=torch.bfloat16, device=backend.device)
    view = flat.as_strided((2, 2, vocab), (stride_b, stride_t, 1))
    x = backend.to(randn(2, 2, vocab, seed=17).to(torch.bfloat16))
    y = torch.tensor([[0, 5], [700, vocab - 1]])
    view.copy_(x)
    ends = [b * stride_b + t * stride_t + vocab for b in range(2) for t in range(2)]
    flat[ends] = SENTINEL
    assert_same_bits(run_stats(backend, view, y), run_stats(backend, x, y))
    a = simple_loss(x, y).map(backend.to)
    functional = backend("policy_loss", *a.args(), True)
    assert_same_bits(backend("policy_loss_", view, *a.args()[1:]), functional[:4])
    assert_same_bits(view, functional[4])
    factor = backend.to(torch.tensor([[1.0, 2.0], [-2.0, 0.5]]))
    backend("scale_rows_", view, factor)
    assert_same_bits(view, functional[4] * factor.unsqueeze(-1).to(torch.bfloat16))
    assert (flat[ends] == SENTINEL).all()


# ---- §2: deterministic, batch invariant, ratio 1


def test_bitwise_deterministic(backend: Backend, dtype: torch.dtype) -> None:
    x, y = cases.hard_logits(MANY_TILES if not backend.slow else 2100, dtype)
    a, threads = simple_loss(x, y).map(backend.to), torch.get_num_threads()
    first = backend("policy_loss", *a.args(), True)
    try:
        torch.set_num_threads(1)
        assert_same_bits(backend("policy_loss", *a.args(), True), first)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(run_stats(backend, a.logits, y), run_stats(backend, a.logits, y))


@pytest.mark.parametrize("vocab", [1000, MANY_TILES])
def test_batch_invariant(backend: Backend, vocab: int) -> None:
    """A row alone, at another address and alignment, equals the row in a batch."""
    if backend.name == "reference":
        pytest.skip("the reference leaves the order of its sums to torch")
    for dtype in (torch.float32, torch.bfloat16):
        x = (3 * randn(1, 5, vocab, seed=18)).to(dtype)
        y = torch.randint(vocab, (1, 5), generator=cases.generator(19))
        a = simple_loss(x, y)
        stats, out = run_stats(backend, backend.to(x), y), run_loss(backend, a)
        for row, offset in ((0, 1), (2, 4), (4, 7)):
            room = torch.full((vocab + 9,), SENTINEL, dtype=dtype)
            room[offset : offset + vocab] = x[0, row]
            alone = backend.to(room)[offset : offset + vocab].view(1, 1, vocab)
            pick = [row]
            assert_same_bits(run_stats(backend, alone, y[:, pick]), [t[:, pick] for t in stats])
            one = cases.replace(a.rows(pick).map(backend.to), logits=alone)
            assert_same_bits(run_loss(backend, one), [t[:, pick] for t in out])


def test_statistics_and_fused_kernel_agree_bitwise(backend: Backend, dtype: torch.dtype) -> None:
    for vocab in (77, 2571):
        x, y = cases.hard_logits(vocab, dtype)
        for softcap in (0.0, 40.0):
            stats = run_stats(backend, backend.to(x), y, None, None, 0.7, softcap)
            a = simple_loss(backend.to(x), y, temperature=0.7, softcap=softcap)
            for needs_grad in (True, False):
                out = run_loss(backend, a, needs_grad)
                assert_same_bits(out[2:4], stats[:2])
            assert out.grad_logits.numel() == 0


def test_ratio_is_one_on_the_first_update(backend: Backend, dtype: torch.dtype) -> None:
    """Old log-probabilities from the no-grad pass: the loss is -A exactly, nothing is clipped."""
    x, y = cases.hard_logits(1029, dtype)
    old = run_stats(backend, backend.to(x), y).logprob
    tight = (1.0, 1.0, INF, INF, 0.0, 0.0, 0.0, 0.0, 20.0)
    a = simple_loss(backend.to(x), y, old_logprob=old, values=tight)
    out = run_loss(backend, a)
    assert torch.equal(out.token_loss, -a.advantage)
    on_policy = run_loss(backend, cases.replace(a, old_logprob=None))
    assert_same_bits(out, on_policy)
    assert (out.grad_logits != 0).any(-1).sum() >= 10


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


# ---- scale_rows_


def test_scale_rows(backend: Backend, dtype: torch.dtype) -> None:
    x = randn(2, 3, 131, seed=21).to(dtype)
    factor = torch.tensor([[1.0, 0.0, -2.0], [0.3, 1.0, 65536.0]], dtype=acc(dtype))
    x[1, 2] *= 1e-3
    expected = (x.to(acc(dtype)) * factor.unsqueeze(-1)).to(dtype)
    for view in views(backend.to(x)).values():
        before = bits(view[:, 1].clone())
        view[1, 1], view[0, 0] = NAN, INF  # factor 1: not touched
        assert backend("scale_rows_", view, backend.to(factor)) is None
        assert view[1, 1].isnan().all() and (view[0, 0] == INF).all()
        assert not torch.equal(bits(view[:, 1]), before)
        view[1, 1], view[0, 0] = backend.to(x)[1, 1], backend.to(x)[0, 0]
        assert_close("scaled", view, expected, 0.0)
        assert (view[0, 1] == 0).all()
        assert_written_inside(view, view.clone())
