"""Runs the operators of policy_loss on a backend and compares them by the tolerance rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import policy_loss_cases as cases
import torch
from conftest import Backend
from policy_loss_cases import INF, NAN, LossArgs, Stats
from tolerance import acc, assert_close, baseline_error, digest, randn
from torch import Tensor

from reasonkern.policy_loss import reference as ref


def slack(backend: Backend, dtype: torch.dtype) -> int:
    """The interpreter's bfloat16 store does not round to nearest: one ulp."""
    return int(backend.name == "triton" and backend.slow and dtype == torch.bfloat16)


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

    key = digest(x, y, mask, *scaling, *grads)
    expected, error = baseline_error([x, *grads], exact, plain, key)
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
    base = base._replace(row_max=cases.scaled_logits(x, None, 1.0, scaling[2]).amax(-1))
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
    terms = cases.loss_terms(a, expected)
    rounding = slack(backend, a.logits.dtype)
    assert_close("logprob", got.logprob, expected.logprob, error.logprob)
    assert_close("entropy", got.entropy, expected.entropy, error.entropy)
    for name, allowance in (("token_loss", 0), ("row_loss", 0), ("grad_logits", rounding)):
        results = (getattr(x, name) for x in (got, expected, error))
        assert_close(name, *results, allowance, getattr(terms, name))
    return got
