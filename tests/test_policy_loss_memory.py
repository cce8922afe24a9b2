"""Where the kernels read and write, and what may not change a bit of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import SENTINEL, assert_same_bits, bits
from policy_loss_cases import INF, NAN
from policy_loss_checks import row_grads, run_gradient, run_loss, run_stats, simple_loss
from tolerance import acc, assert_close, randn
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MANY_TILES = 13_195  # more than one tile of any backend, a multiple of nothing


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
    if backend.slow and vocab == 1000 and dtype != torch.bfloat16:
        pytest.skip("the larger vocabulary in one dtype where a row costs milliseconds")
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
        x, y = (x[1:2], y[1:2]) if backend.slow else (x, y)
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
