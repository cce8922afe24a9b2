"""The tolerance rule: error <= 2 x the error of plain float32 torch + 2 ulp, element by element."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contract import bits
from torch import Tensor

INF = float("inf")


def acc(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at the magnitude of x (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp_min(info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent)


NEARBY = 8  # runs of the baseline


def nearby(x: Tensor, run: int) -> Tensor:
    """x in float32; from run 1 on moved by about 1e-3: as hard, but it rounds anew."""
    x = x.float()
    noise = 1e-3 * randn(*x.shape, seed=900 + run).float()
    return x if run == 0 else torch.where(x == 0, x, x + noise)  # 0 means: not active


def baseline_error(
    inputs: Sequence[Tensor],
    exact: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    key: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The float64 truth, and how far plain float32 torch is from it at every element.

    `exact` and `plain` are functions of `inputs`, the logits first. One run can be exact at an
    element by luck, so its error is the largest one of the runs on `NEARBY` nearby inputs, each
    against its own truth; and, for an element of a gradient row, of the elements of the row within
    the same power of two. float64 has no truth above it: its baseline error is that of float32 in
    units of the last place, or the one in float64 if that is larger. `key` names the inputs: every
    backend gets the same ones.
    """
    if key not in _known:
        truth = list(exact(*(x.double() for x in inputs)))
        worst = [torch.zeros_like(t, dtype=torch.float64) for t in truth]
        for run in range(NEARBY):
            moved = [nearby(x, run) for x in inputs]
            expected = exact(*(x.double() for x in moved))
            errors = [_distance(b, e) for b, e in zip(plain(*moved), expected, strict=True)]
            worst = [torch.maximum(w, e) for w, e in zip(worst, errors, strict=True)]
        if inputs[0].dtype == torch.float64:
            own = [_distance(b, e) for b, e in zip(plain(*inputs), truth, strict=True)]
            worst = [torch.maximum(w * 2.0**-29, e) for w, e in zip(worst, own, strict=True)]
        for i, t in enumerate(truth):
            if t.ndim == inputs[0].ndim:
                worst[i] = like_magnitude(worst[i], t)
        _known[key] = truth, worst
    return _known[key]


_known: dict[str, tuple[list[Tensor], list[Tensor]]] = {}


def digest(*values: Any) -> str:
    """Names inputs by their content."""
    h = hashlib.sha256()
    for v in values:
        data = bits(v.cpu()).numpy().tobytes() if isinstance(v, Tensor) else repr(v).encode()
        h.update(repr((v.dtype, v.shape) if isinstance(v, Tensor) else "").encode() + data)
    return h.hexdigest()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() - y.double()).abs().nan_to_num(0.0, posinf=0.0)


def like_magnitude(error: Tensor, value: Tensor) -> Tensor:
    """The largest error of the elements of the row in the same binade."""
    binade = (torch.frexp(value).exponent + 1100).clamp(0, 2200).long()
    worst = error.new_zeros(*error.shape[:-1], 2201).scatter_reduce(-1, binade, error, "amax")
    return worst.gather(-1, binade)


def assert_close(
    name: str,
    got: Tensor,
    expected: Tensor,
    base_error: Tensor | float,
    slack: int = 0,
    terms: Tensor | None = None,
) -> None:
    """error <= 2 * baseline error + 2 ulp of got's dtype (+ `slack` ulp), element by element.

    An element that is the sum of larger `terms`, which cancel, is also allowed 2 ulp of those in
    the accumulator's dtype; logprob and entropy contain the logarithm of a sum s >= 1, so they are
    measured in ulp of 1 at least.
    Infinities and NaN are compared exactly; below the smallest normal float32 a kernel may flush
    to 0. For float64 the truth is as rounded as what is measured: twice the ulps.
    """
    dtype = got.dtype
    got, expected = got.detach().cpu().double(), expected.double()
    assert got.shape == expected.shape, name
    finite = torch.isfinite(expected)
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same[~finite].all(), f"{name}: {got[~finite]} instead of {expected[~finite]}"
    error = torch.where(finite, (got - expected).abs(), 0.0)
    size = torch.where(finite, expected, 0.0).abs()
    if name in ("logprob", "entropy"):
        size = size.clamp_min(1.0)
    floor = 2 if dtype != torch.float64 else 4
    allowed = 2 * base_error + (floor + slack) * ulp(size, dtype)
    if terms is not None:
        allowed += floor * ulp(terms, acc(dtype))
    allowed += 0.0 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed).nan_to_num(INF).argmax()
        i = tuple(int(j) for j in torch.unravel_index(worst, got.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements; worst at {i}: got "
            f"{got[i]:.9g}, expected {expected[i]:.9g}, allowed error {allowed[i]:.3g}"
        )
