"""The operator `sequence_map`: GSPO, GMPO and VESPO on given statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from contract import assert_same_bits
from tolerance import randn
from torch import Tensor

from reasonkern.policy_loss.reference_objective import unpack_hyper
from reasonkern.policy_loss.sequence import GMPO, GSPO, KINDS, VESPO, Segments, sequence_rows

INF, NAN = float("inf"), float("nan")
S, T = 12, 9
CU_SEQLENS = torch.tensor([0, 1, 1, 40, 41, S * T])
NAMES = ("row_loss", "token_loss", "dlogp", "dentropy", "finite", "log_ratio")
BOUNDS = {
    GSPO: [0.97, 1.02, 1.05, INF, 0.0, 0.0, 0.1, 0.2, 0.4],
    GMPO: [0.97, 1.02, INF, INF, 0.0, 0.0, 0.1, 0.2, 0.4],
    VESPO: [2.0, 3.0, 3.0, 2.0, 0.0, 0.0, 0.1, 0.2, 0.4],  # k and lambda for A >= 0, A < 0
}


def rows(packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Sequences of either sign and of A = 0, skipped tokens, and every kind of nonfinite input."""
    logp = -1 - randn(S, T, seed=1).abs()
    entropy, weight = randn(S, T, seed=2).abs(), randn(S, T, seed=3).abs()
    old = logp - 0.05 * randn(S, T, seed=4) - 0.03 * randn(S, 1, seed=5)
    old[5], old[6] = logp[5] + 4, logp[6] - 4  # beyond the clamps of a log-ratio, mean or sum
    advantage = randn(S, 1, seed=6).sign() * torch.linspace(0.5, 2, S, dtype=logp.dtype)[:, None]
    advantage[[3, 11]] = 0
    importance, ref = randn(S, T, seed=7).abs(), logp - 0.1 * randn(S, T, seed=8)
    entropy_weight = weight.flip(0).contiguous()
    weight[:, ::4], weight[4, 5] = 0, -1
    weight[2], entropy_weight[2] = 0, 0  # a sequence without tokens
    entropy_weight[::2, 4] = 0
    logp[0, 1], entropy[0, 2], logp[7, 4] = -INF, NAN, NAN  # rows that take no part
    old[0, 4], importance[4, 0], ref[1, 4] = NAN, NAN, NAN  # in rows of weight 0
    if not packed:
        # These leave out sequences, one with A = 0, and a row.
        old[8, 1], old[11, 1], importance[9, 1], ref[10, 1] = NAN, NAN, INF, NAN
    given = [logp, entropy, old, advantage.expand(S, T), weight, entropy_weight, importance, ref]
    if packed:
        ids = Segments.of(torch.empty(1, S * T), CU_SEQLENS).ids
        given[3] = randn(len(CU_SEQLENS) - 1, seed=9)[ids]
        given = [x.reshape(1, -1) for x in given]
    return [x.to(dtype).contiguous() for x in given]


def arguments(kind: int, form: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    packed = form in ("packed", "on-policy")
    given: list[Any] = rows(packed, dtype)
    values, hyper = BOUNDS[kind], None
    if form == "plain":
        given[5] = given[6] = given[7] = None
    elif form == "on-policy":
        given[2] = None
        values = values if kind == VESPO else [1.0, 1.0, *values[2:]]  # at, not beyond, the bounds
    elif form == "hyper per row":
        hyper = torch.tensor(values)[:, None] * (1 + 0.01 * randn(1, S * T, seed=10))
        hyper = hyper.to(dtype)
    kl = (0, False) if given[7] is None else (3, True)
    return [*given, CU_SEQLENS if packed else None, hyper, values, kind, *kl]


def definition(args: list[Any]) -> tuple[Tensor, ...]:
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    *given, offsets, hyper, values, kind, kl_kind, unbiased = wide
    h = unpack_hyper(values, hyper, given[0].shape)
    segments = Segments.of(given[0], offsets)
    mapped, log_ratio = sequence_rows(kind, kl_kind, unbiased, *given, segments, h)
    return (*mapped, log_ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["plain", "every input", "packed", "on-policy", "hyper per row"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_backend_agrees_with_the_definition(
    backend: Backend, kind: int, form: str, dtype: torch.dtype
) -> None:
    args = arguments(kind, form, dtype)
    found = backend("sequence_map", *(backend.to(x) for x in args))
    expected = definition(args)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for name, x, y in zip(NAMES, found, expected, strict=True):
        if name == "finite":
            assert torch.equal(x.cpu(), y)
        else:
            x = x.cpu().double()
            close = (x - y).abs() <= tolerance * y.abs().clamp_min(1)
            assert (close | (x.isnan() & y.isnan())).all(), name
    finite = expected[4]
    assert not finite.all() and finite.any()
    assert all((x.cpu()[~finite] == 0).all() for x in found[:4])
    if form == "plain" and kind != VESPO:
        moved = found[2].cpu()[finite & (args[4] != 0)]
        assert (moved == 0).any() and (moved != 0).any()  # clipped and not


def test_offsets_that_are_none_stay_inside_the_rows(backend: Backend) -> None:
    """On a GPU nobody looks at their values: what is read and written are the rows, all of them."""
    if backend.name in ("reference", "triton"):
        pytest.skip("torch's segment_reduce takes offsets as they are")
    x = [backend.to(randn(1, 10, seed=k).to(torch.float32)) for k in range(3)]

    def found(*offsets: int) -> Any:
        rows = (x[0], x[1], None, x[2], torch.ones_like(x[0]), None, None, None)
        args = (backend.to(torch.tensor(offsets)), None, BOUNDS[GSPO], GSPO, 0, False)
        return backend("sequence_map", *rows, *args)

    for right, *wrong in (((0, 4, 10), (3, 4, 9), (-5, 4, 99)), ((0, 10, 10), (0, 99, 10))):
        for offsets in wrong:
            for a, b in zip(found(*offsets), found(*right), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("n", [0, 1, 3000])
def test_any_number_of_rows(backend: Backend, n: int) -> None:
    """None; one; more than a block has threads."""
    x = [randn(1, n, seed=k).to(torch.float32) for k in range(4)]
    offsets = torch.tensor([0, n // 3, n])
    args = [x[0], x[1], x[0] - 0.01 * x[2], torch.ones_like(x[0]), x[3].abs(), None, None, None]
    args += [offsets, None, BOUNDS[GSPO], GSPO, 0, False]
    found = backend("sequence_map", *(backend.to(a) for a in args))
    for a, b in zip(found, definition(args), strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("group", [32, 128])
def test_order_of_simulated_threads_changes_no_bit(group: int) -> None:
    sim = pytest.importorskip("cuda_sim.backend", exc_type=ImportError)
    args = arguments(GSPO, "packed")
    with sim.using(group=group):
        expected = sim.sequence_map(*args)
        for order in ("reverse", "random"):
            with sim.using(order=order, seed=group, blocks=2):
                assert_same_bits(sim.sequence_map(*args), expected)


def test_gradient_through_the_operator() -> None:
    """The derivatives times the incoming gradient."""
    args = arguments(GSPO, "every input", torch.float64)
    leaves = [x.clone().requires_grad_() for x in args[:2]]
    out = torch.ops.reasonkern.sequence_map(*leaves, *args[2:])
    assert [x.requires_grad for x in out] == [True] + [False] * 5
    g = torch.linspace(-1, 1, S * T, dtype=torch.float64).view(S, T)
    for _ in range(2):
        found = torch.autograd.grad(out[0], leaves, g, retain_graph=True)
        assert_same_bits(found, (g * out[2], g * out[3]))
