"""The same losses as a plain torch user writes them: log_softmax, gather, entropy, autograd.

An independent second implementation: it shares nothing with the kernels or their reference (but
Clip-Cov's random draw), and the demo measures its own training gradients against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reasonkern as rk


@dataclass(frozen=True)
class Rows:
    """One batch of the RL stage, everything but the logits; (B, T) unless said otherwise."""

    targets: Tensor
    advantage: Tensor  # (B,)
    weight: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor


def logprob_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, each (B, T)."""
    log_p = torch.log_softmax(logits, dim=-1)
    logprob = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprob, -(log_p.exp() * log_p).sum(-1)


def imitation_loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Weighted negative log-likelihood."""
    logprob, _ = logprob_and_entropy(logits, targets)
    return -(weight * logprob).sum()


@dataclass(frozen=True)
class Terms:
    """What a token loss is made of; `o` supplies the numbers (ratio_min, …)."""

    logprob: Tensor  # (B, T), with gradient
    old: Tensor  # (B, T)
    a: Tensor  # (B, 1) advantage
    mask: Tensor  # (B, T) 0 or 1
    o: Any
    entropy: Tensor  # (B, T)

    @property
    def log_ratio(self) -> Tensor:
        """0 where masked, so that nothing of those tokens enters a sequence's mean."""
        return torch.where(self.mask > 0, self.logprob - self.old, 0.0).clamp(-20, 20)

    @property
    def ratio(self) -> Tensor:
        """Probability ratio to the old policy."""
        return self.log_ratio.exp()

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens of a sequence, (B, 1)."""
        return (x * self.mask).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)


def policy_loss(logits: Tensor, rows: Rows, name: str, objective: Any, kl_coef: float) -> Tensor:
    """Policy term of the named objective, k3 KL to the reference and entropy bonus."""
    logprob, entropy = logprob_and_entropy(logits, rows.targets)
    mask = (rows.weight != 0).to(logprob.dtype)
    advantage = rows.advantage.unsqueeze(1)
    terms = Terms(logprob, rows.old_logprob, advantage, mask, objective, entropy)
    distance = torch.where(mask > 0, rows.ref_logprob - logprob, 0.0)
    kl: Tensor = distance.exp() - distance - 1
    loss: Tensor = rows.weight * (FORMULAS[name](terms) + kl_coef * kl)
    bonus: Tensor = objective.entropy_coef * (rows.weight * entropy).sum()
    return loss.sum() - bonus


def _bounded(ratio: Tensor, o: Any) -> Tensor:
    low = 0.0 if o.ratio_min is None else o.ratio_min
    high = math.inf if o.ratio_max is None else o.ratio_max
    return ratio.clamp(low, high)


def _clip(t: Terms) -> Tensor:
    return -torch.minimum(t.ratio * t.a, _bounded(t.ratio, t.o) * t.a)


def _gppo(t: Terms) -> Tensor:
    ratio, o = t.ratio, t.o
    one = ratio / ratio.detach()
    below, above = (t.a < 0) & (ratio < o.ratio_min), (t.a > 0) & (ratio > o.ratio_max)
    kept = torch.where(below, o.low * o.ratio_min * one, o.high * o.ratio_max * one)
    return -torch.where(below | above, kept, ratio) * t.a


def _cispo(t: Terms) -> Tensor:
    return -_bounded(t.ratio, t.o).detach() * t.a * t.logprob


def _sapo(t: Terms) -> Tensor:
    tau = torch.full_like(t.a, t.o.low).where(t.a > 0, t.o.high)
    return -t.a * (4 / tau) * torch.sigmoid(tau * (t.ratio - 1))


def _dppo_tv(t: Terms) -> Tensor:
    moved = t.logprob.exp() - t.old.exp()
    keep = torch.where(t.a > 0, moved <= t.o.high, moved >= -t.o.low)
    return _dppo(t, keep)


def _dppo_kl(t: Terms) -> Tensor:
    """Bernoulli KL(old || new), or the probability moves back."""
    p, q = t.logprob.detach().double().exp(), t.old.double().exp()
    kl = torch.xlogy(q, q / p) + torch.xlogy(1 - q, (1 - q) / (1 - p))
    keep = torch.where(t.a > 0, (kl <= t.o.high) | (p <= q), (kl <= t.o.low) | (p >= q))
    return _dppo(t, keep)


def _dppo(t: Terms, keep: Tensor) -> Tensor:
    return -(keep * t.ratio.clamp(max=t.o.ratio_max)).detach() * t.a * t.logprob


def _dro(t: Terms) -> Tensor:
    pull: Tensor = 0.5 * t.o.low * (t.logprob - t.old) ** 2
    return pull - t.logprob * t.a


def _gspo(t: Terms) -> Tensor:
    ratio = t.mean(t.log_ratio).exp()
    return -torch.minimum(ratio * t.a, _bounded(ratio, t.o) * t.a).expand_as(t.logprob)


def _gmpo(t: Terms) -> Tensor:
    low, high = math.log(t.o.ratio_min), math.log(t.o.ratio_max)
    clipped = torch.where(t.a > 0, t.log_ratio.clamp(max=high), t.log_ratio.clamp(min=low))
    return (-t.a * t.mean(clipped).exp()).expand_as(t.logprob)


def _vespo(t: Terms) -> Tensor:
    log_w = t.log_ratio.sum(1, keepdim=True).detach().clamp(math.log(1e-8), 20.0)
    k, lam = torch.where(t.a >= 0, 2.0, 3.0), torch.where(t.a >= 0, 3.0, 2.0)
    return -(lam + k * log_w - lam * log_w.exp()).exp() * t.a * t.logprob


def _bapo(t: Terms) -> Tensor:
    """The search of the paper, one probe after the other; the old policy sampled."""
    used = t.mask > 0
    r, a = t.ratio.detach()[used].double(), t.a.expand_as(t.mask)[used].double()
    p = t.old[used].double().exp()
    low, high = 0.6, 1.2
    while True:
        kept = p * torch.minimum(r * a, r.clamp(low, high) * a).abs()
        if not kept[a > 0].sum() / kept.sum() < 0.4 or (low, high) == (0.9, 3.0):
            break
        low, high = (low, min(high + 0.05, 3.0)) if high < 3.0 else (min(low + 0.02, 0.9), high)
    return -torch.minimum(t.ratio * t.a, t.ratio.clamp(low, high) * t.a)


def _covariance(t: Terms) -> Tensor:
    used, logprob, a = t.mask > 0, t.logprob.detach().double(), t.a.double().expand_as(t.mask)
    return (a - a[used].mean()) * (logprob - logprob[used].mean())


def _clip_cov(t: Terms) -> Tensor:
    unclipped = torch.where(t.a > 0, t.ratio <= t.o.ratio_max, t.ratio >= t.o.ratio_min)
    dropped = rk.covariance_mask(t.logprob.detach(), t.a, t.mask, candidates=unclipped)
    return torch.where(dropped, 0.0, _clip(t))


def _kl_cov(t: Terms) -> Tensor:
    covariance = _covariance(t)
    count = max(1, int(2e-4 * t.mask.sum()))
    threshold = covariance[t.mask > 0].topk(count).values[-1]
    # At r = 1 rounding would decide the sign of the penalty's gradient, which is 0.
    moved = (covariance >= threshold) & (t.log_ratio.abs() > 1e-6)
    penalty = torch.where(moved, t.log_ratio.abs(), 0.0)
    return penalty - t.ratio * t.a


def _high_entropy(t: Terms) -> Tensor:
    used = t.mask > 0
    threshold = t.entropy.detach()[used].topk(math.ceil(0.2 * int(used.sum()))).values[-1]
    return torch.where(t.entropy.detach() >= threshold, _clip(t), 0.0)


def _gtpo(t: Terms) -> Tensor:
    """Without conflict weights, and without the filter: the model starts above ln 2."""
    return -(t.a - 0.1 * t.mean(t.entropy.detach())) * t.logprob


FORMULAS: dict[str, Callable[[Terms], Tensor]] = {
    **dict.fromkeys(("ppo", "grpo", "dapo", "dr_grpo", "tppo"), _clip),
    **dict.fromkeys(("gppo", "ce_gppo"), _gppo),
    **dict.fromkeys(("cispo", "reinforce", "gpg", "rloo"), _cispo),
    "sapo": _sapo,
    "gspo": _gspo,
    "gmpo": _gmpo,
    "vespo": _vespo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "dro": _dro,
    "bapo": _bapo,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "high_entropy": _high_entropy,
    "gtpo": _gtpo,
}
