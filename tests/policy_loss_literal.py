"""One batch in padded and packed form, and the public formulas written out with autograd.

Used by the tests of the public API. Nothing here uses the package's mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import reasonkern as rk
from reasonkern import Objective

INF = float("inf")
LENGTHS = (6, 0, 3, 1)  # of the sequences; each with one token that is not trained, if it can
T, V = 6, 13


@dataclass(frozen=True)
class Batch:
    """Rows (B, T), or (N,) when packed with ``segments``; ``advantage`` is per sequence."""

    logits: Tensor
    targets: Tensor
    mask: Tensor
    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    entropy_weight: Tensor
    ref_logprob: Tensor
    rollout_logprob: Tensor
    segments: Tensor | None = None

    def given(self, *names: str, **other: Any) -> dict[str, Any]:
        """Keyword arguments of `policy_loss`: the basic ones, those named, and others."""
        basic = ("old_logprob", "advantage", "weight", "segments")
        return {name: getattr(self, name) for name in (*basic, *names)} | other

    def leaf(self) -> Tensor:
        return self.logits.clone().requires_grad_()

    def clean(self) -> Batch:
        """Without the NaN of untrained rows: 0 * NaN in a literal's backward is NaN."""
        return self.map(lambda x: x.nan_to_num(0.0) if x.is_floating_point() else x)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        fields = {k: function(v) for k, v in vars(self).items() if v is not None}
        return replace(self, **fields)

    def to(self, dtype: torch.dtype) -> Batch:
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def pack(self) -> Batch:
        """The same sequences without their padding."""
        kept = torch.arange(self.targets.shape[1]) < torch.tensor(LENGTHS)[:, None]
        offsets = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
        rows = self.map(lambda x: x[kept] if x.ndim > 1 else x)
        return replace(rows, segments=offsets)


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.5) -> Batch:
    """Ratios e^(+-spread) around 1, advantages of both signs, -100 and NaN where nothing trains."""
    g = torch.Generator().manual_seed(seed)
    size = len(LENGTHS), T

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(size, generator=g, dtype=torch.float64)

    logits = 2 * torch.randn(*size, V, generator=g, dtype=torch.float64)
    targets = torch.randint(V, size, generator=g)
    logp, _ = stats(logits, targets)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[:, 1] = False
    off = torch.where(mask, 0.0, float("nan")).double()
    batch = Batch(
        logits,
        torch.where(mask, targets, -100),
        mask,
        logp + noise(spread) + off,
        torch.tensor([1.3, 0.7, -0.8, 0.4], dtype=torch.float64),
        torch.where(mask, 0.1 + noise(1).abs(), 0.0),
        torch.where(mask, 0.1 + noise(1).abs(), 0.0),
        logp + noise(0.3) + off,
        logp + noise(0.3) + off,
    )
    return batch.to(dtype)


def batch(form: str, **options: Any) -> Batch:
    padded = make_batch(**options)
    return padded if form == "padded" else padded.pack()


def stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log p[target] and entropy by log_softmax; a target below 0 is read as 0."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(*temperature.shape, *[1] * (z.ndim - temperature.ndim))
    logp = (z / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0], entropy


def clip(r: Tensor, low: float, high: float) -> Tensor:
    return r.clamp(low, high)


def ppo(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * a, clip(r, low, high) * a)


def dual(loss: Tensor, a: Tensor, c: float) -> Tensor:
    return torch.where(a < 0, torch.minimum(loss, -c * a), loss)


def gppo(r: Tensor, a: Tensor, low: float, high: float, b_low: float, b_high: float) -> Tensor:
    keep = r / r.detach()
    loss = torch.where((a > 0) & (r > high), -b_high * high * keep * a, -r * a)
    return torch.where((a < 0) & (r < low), -b_low * low * keep * a, loss)


def sapo(r: Tensor, a: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    tau = torch.where(a > 0, a.new_tensor(tau_pos), a.new_tensor(tau_neg))
    return -a * 4 / tau * torch.sigmoid(tau * (r - 1))


def dppo(lp: Tensor, old: Tensor, a: Tensor, inside: Tensor, back: Tensor) -> Tensor:
    r = (lp - old).exp().clamp_max(20.0)
    return torch.where(inside | back, -a * r.detach() * lp, 0.0)


def dppo_tv(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    moved = (lp.exp() - old.exp()).detach()
    return dppo(lp, old, a, moved.abs() <= 0.15, torch.where(a > 0, moved < 0, moved > 0))


def dppo_kl(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    p, q = lp.detach().exp(), old.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return dppo(lp, old, a, kl <= 0.05, torch.where(a > 0, p < q, p > q))


# name: (objective, token loss of (logp, old, A))
TOKEN_LOSSES: dict[str, tuple[Objective, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "ppo": (Objective.ppo(), lambda p, o, a: ppo((p - o).exp(), a, 0.8, 1.2)),
    "dual_clip": (
        Objective.ppo(dual_clip=1.5),
        lambda p, o, a: dual(ppo((p - o).exp(), a, 0.8, 1.2), a, 1.5),
    ),
    "two_sided": (
        Objective.ppo(ratio_cap=1.5),
        lambda p, o, a: (
            -torch.minimum((p - o).exp().clamp_max(1.5) * a, clip((p - o).exp(), 0.8, 1.2) * a)
        ),
    ),
    "unbounded": (Objective.ppo(None, None), lambda p, o, a: -(p - o).exp() * a),
    "grpo": (Objective.grpo(), lambda p, o, a: ppo((p - o).exp(), a, 0.8, 1.2)),
    "dapo": (Objective.dapo(), lambda p, o, a: ppo((p - o).exp(), a, 0.8, 1.28)),
    "dr_grpo": (Objective.dr_grpo(), lambda p, o, a: ppo((p - o).exp(), a, 0.8, 1.2)),
    "gppo": (Objective.gppo(), lambda p, o, a: gppo((p - o).exp(), a, 0.8, 1.28, 1, 1)),
    "ce_gppo": (Objective.ce_gppo(), lambda p, o, a: gppo((p - o).exp(), a, 0.8, 1.28, 0.25, 1)),
    "cispo": (Objective.cispo(1.5), lambda p, o, a: -clip((p - o).exp(), 0, 1.5).detach() * a * p),
    "cispo_low": (
        Objective.cispo(1.2, 0.8),
        lambda p, o, a: -clip((p - o).exp(), 0.8, 1.2).detach() * a * p,
    ),
    "sapo": (Objective.sapo(), lambda p, o, a: sapo((p - o).exp(), a, 1.0, 1.05)),
    "reinforce": (Objective.reinforce(), lambda p, o, a: -a * p),
    "torchforge": (
        Objective.reinforce(0.1, 10.0),
        lambda p, o, a: -clip((p - o).exp(), 0.1, 10).detach() * a * p,
    ),
    "gpg": (Objective.gpg(), lambda p, o, a: -a * p),
    "rloo": (Objective.rloo(), lambda p, o, a: -a * p),
    "dppo_tv": (Objective.dppo_tv(), dppo_tv),
    "dppo_kl": (Objective.dppo_kl(), dppo_kl),
    "dro": (Objective.dro(), lambda p, o, a: -(a * p - 0.05 * (p - o) ** 2)),
}


def sequences(b: Batch) -> list[Tensor]:
    """Index of the trained rows of each sequence, in the flattened rows."""
    trained = (b.weight != 0).flatten()
    if b.segments is None:
        ids = torch.arange(b.targets.numel()) // b.targets.shape[1]
    else:
        ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), b.segments.diff().long())
    return [((ids == i) & trained).nonzero()[:, 0] for i in range(len(LENGTHS))]


def spread(b: Batch, per_sequence: Tensor) -> Tensor:
    """(S,) to the rows of their sequences."""
    if b.segments is None:
        return per_sequence[:, None].expand(b.targets.shape)
    return per_sequence.repeat_interleave(b.segments.diff().long())


def total(b: Batch, token_loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum w * l over the trained rows."""
    w = b.weight if weight is None else weight
    return (w * token_loss)[w != 0].sum()


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def check(
    b: Batch,
    objective: Any,
    literal: Callable[[Tensor, Tensor], Tensor],
    *names: str,
    scaling: dict[str, Any] | None = None,
    **given: Any,
) -> rk.PolicyLossOutput:
    """`policy_loss` against a literal loss of (logp, entropy): value and gradient, float64."""
    scaling = scaling or {}
    x, y = b.leaf(), b.leaf()
    kwargs = b.given(*names, **given)
    out = rk.policy_loss(x, b.targets, objective=objective, **scaling, **kwargs)
    logp, entropy = stats(y, b.targets, **scaling)
    expected = literal(logp, entropy)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient(out.loss, x), gradient(expected, y), rtol=1e-9, atol=1e-12, equal_nan=False
    )
    return out
