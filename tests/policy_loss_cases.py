"""Hard inputs, and the published formulas written out with autograd.

Nothing here uses the package's mathematics: `literal_stats` and `literal_loss` are log_softmax and
the formulas of the papers with ``.detach()`` where the paper stops the gradient. In float64 they
check the reference, in float32 they are the baseline whose error the kernels are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from tolerance import INF, baseline_error, digest, randn
from tolerance import acc as acc
from tolerance import assert_close as assert_close
from torch import Tensor

from reasonkern.policy_loss import reference as ref
from reasonkern.policy_loss import reference_objective as formulas

NAN = float("nan")
CLAMP = 20.0
# What the nearby runs of a loss's baseline differ in.
MOVED = ("logits", "advantage", "weight", "entropy_weight", "importance")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- hard rows

HARD_ROWS = 12


def hard_logits(vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(3, 4, vocab) logits and their targets; `assert_hard` says what makes them hard."""
    x = randn(HARD_ROWS, vocab, seed=seed)
    y = torch.randint(vocab, (HARD_ROWS,), generator=generator(seed + 1))
    middle = vocab // 2
    x[1] *= 4
    y[1] = x[1].argmax()
    x[2, middle] += 30  # dominating, and the target
    y[2] = middle
    x[3, middle] += 20  # dominating, not the target
    y[3] = vocab - 1
    x[4] = 1.5  # all tied
    x[5, [0, middle, vocab - 1]] = 9.0  # tied at the top
    y[5] = vocab - 1
    x[6] = torch.where(torch.arange(vocab) % 3 == 0, 80.0, -80.0)
    y[6] = 0
    keep = torch.rand(vocab, generator=generator(seed + 2)) < 0.1  # a grammar's mask
    keep[y[7]] = True
    x[7] = torch.where(keep, x[7], -INF)
    x[8] = -INF  # two finite logits
    x[8, [y[8], (y[8] + 1) % vocab]] = torch.tensor([3.0, 2.5], dtype=torch.float64)
    x[9] = 3000 + 4 * x[9]
    y[10] = 0
    y[11] = vocab - 1
    x = x.to(dtype)
    return x.view(3, 4, vocab), y.view(3, 4)


def assert_hard(logits: Tensor, targets: Tensor) -> None:
    vocab = logits.shape[-1]
    x, y = logits.double().view(-1, vocab), targets.view(-1)
    top = x.topk(2).values
    assert (x == -INF).any(-1).sum() >= 2 and (x.abs() == 80).all(-1).any()
    assert (top[:, 0] - top[:, 1] > 10).sum() >= 2 and (top[:, 0] == top[:, 1]).sum() >= 3
    assert (y == 0).any() and (y == vocab - 1).any() and x.amax() > 2900


# ---- literal formulas


def scaled_logits(
    x: Tensor, row_temperature: Tensor | None, temperature: float, softcap: float
) -> Tensor:
    if softcap:
        x = torch.where(x == -INF, x, softcap * torch.tanh(x / softcap))
    return x / (temperature if row_temperature is None else row_temperature.unsqueeze(-1))


class Stats(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    collision: Tensor
    varentropy: Tensor
    max_prob: Tensor
    is_top1: Tensor
    row_max: Tensor


def literal_stats(z: Tensor, targets: Tensor) -> Stats:
    """Statistics of rows of z (scaled logits), differentiable."""
    logp = z.log_softmax(-1)
    p = logp.exp()
    surprise = -logp.masked_fill(logp == -INF, 0.0)
    entropy = (p * surprise).sum(-1)
    return Stats(
        logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        entropy,
        z.logsumexp(-1),
        (p * p).sum(-1),
        (p * surprise * surprise).sum(-1) - entropy * entropy,
        p.amax(-1),
        z.argmax(-1) == targets,
        z.amax(-1),
    )


@dataclass(frozen=True)
class LossArgs:
    """The arguments of ``policy_loss`` in the operator's order."""

    logits: Tensor
    targets: Tensor
    old_logprob: Tensor | None
    advantage: Tensor
    weight: Tensor
    entropy_weight: Tensor | None = None
    importance: Tensor | None = None
    ref_logprob: Tensor | None = None
    row_temperature: Tensor | None = None
    loss_scale: Tensor | None = None
    hyper: Tensor | None = None
    values: tuple[float, ...] = (0.8, 1.2, INF, INF, 0.0, 0.0, 0.0, 0.0, CLAMP)
    temperature: float = 1.0
    softcap: float = 0.0
    kind: int = formulas.CLIP
    kl_kind: int = 0
    kl_unbiased: bool = False

    def args(self) -> list[Any]:
        return [list(v) if f.name == "values" else v for f, v in self._items()]

    def _items(self) -> list[tuple[Any, Any]]:
        return [(f, getattr(self, f.name)) for f in fields(self)]

    def map(self, function: Any) -> LossArgs:
        """The same arguments with a function applied to every tensor."""
        changed = {f.name: function(v) for f, v in self._items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def cast(self, dtype: torch.dtype) -> LossArgs:
        """Upcast, exactly."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def rows(self, index: Any) -> LossArgs:
        """Some rows of a batch of shape (1, N)."""
        n = self.targets.numel()

        def pick(x: Tensor) -> Tensor:
            per_row = x.ndim > 1 and x.shape[0] == 1 and x.shape[1] == n
            return x[:, index] if per_row or x.shape == (9, n) else x

        return self.map(pick)


class Numbers(NamedTuple):
    ratio_min: Any
    ratio_max: Any
    dual_clip: Any
    ratio_cap: Any
    low: Any
    high: Any
    kl_coef: Any
    entropy_coef: Any
    log_ratio_clamp: Any


def numbers(a: LossArgs) -> Numbers:
    if a.hyper is None:
        return Numbers(*(torch.tensor(v, dtype=a.weight.dtype) for v in a.values))
    return Numbers(*(h.view(a.targets.shape) if h.numel() > 1 else h.view(()) for h in a.hyper))


def clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    # torch.clamp with bounds of one number lets the gradient through at the bounds.
    return torch.maximum(torch.minimum(x, high + 0 * x.detach()), low + 0 * x.detach())


def ratio_of(logp: Tensor, old: Tensor, n: Numbers) -> Tensor:
    difference = logp - old
    inside = difference.detach().abs() <= n.log_ratio_clamp
    limited = torch.where(inside, difference, torch.sign(difference.detach()) * n.log_ratio_clamp)
    return limited.exp()


def dual_clipped(loss: Tensor, a: Tensor, n: Numbers) -> Tensor:
    bound = torch.where(torch.isinf(n.dual_clip) | (a >= 0), INF, -n.dual_clip * a)
    return torch.where((a < 0) & (bound < loss), bound, loss)


def ppo_loss(r: Tensor, a: Tensor, n: Numbers) -> Tensor:
    capped = torch.where(r <= n.ratio_cap, r, n.ratio_cap)
    inside = (r >= n.ratio_min) & (r <= n.ratio_max)
    clipped = torch.where(inside, r, torch.where(r < n.ratio_min, n.ratio_min, n.ratio_max))
    return dual_clipped(-torch.minimum(capped * a, clipped * a), a, n)


def gppo_loss(logp: Tensor, r: Tensor, a: Tensor, n: Numbers) -> Tensor:
    straight = (logp - logp.detach()).exp()  # r / sg(r), also where the log-ratio is clamped
    below, above = (a < 0) & (r < n.ratio_min), (a > 0) & (r > n.ratio_max)
    loss = -r * a
    loss = torch.where(below, -n.low * n.ratio_min * straight * a, loss)
    loss = torch.where(above, -n.high * torch.where(above, n.ratio_max, 0.0) * straight * a, loss)
    return dual_clipped(loss, a, n)


def bernoulli_kl(old: Tensor, logp: Tensor) -> Tensor:
    p, q = old.exp(), logp.exp()
    rest = torch.where(p < 1, (1 - p) * (torch.log1p(-p) - torch.log1p(-q)), 0.0)
    return p * (old - logp) + rest


def dppo_loss(kind: int, logp: Tensor, old: Tensor, a: Tensor, n: Numbers) -> Tensor:
    p, p_old = logp.detach().exp(), old.exp()
    if kind == formulas.DPPO_TV:
        valid = torch.where(a > 0, p - p_old <= n.high, p - p_old >= -n.low)
    else:
        kl = bernoulli_kl(old, logp.detach())
        valid = torch.where(a > 0, (kl <= n.high) | (p <= p_old), (kl <= n.low) | (p >= p_old))
    r = ratio_of(logp.detach(), old, n)
    return torch.where(valid, -torch.minimum(r, n.ratio_max + 0 * r) * a * logp, 0.0 * logp)


def policy_term(a: LossArgs, logp: Tensor, old: Tensor, n: Numbers) -> Tensor:
    """l of policy_loss.md §3 where A is not 0."""
    adv = a.advantage
    r = ratio_of(logp, old, n)
    if a.kind == formulas.CLIP:
        return ppo_loss(r, adv, n)
    if a.kind == formulas.GPPO:
        return gppo_loss(logp, r, adv, n)
    if a.kind == formulas.CISPO:
        return -clamp(r, n.ratio_min, n.ratio_max).detach() * adv * logp
    if a.kind == formulas.SAPO:
        tau = torch.where(adv > 0, n.low, n.high)
        return -adv * (4 / tau) * torch.sigmoid(tau * (r - 1))
    if a.kind == formulas.DRO:
        return -(logp * adv - 0.5 * n.low * (logp - old) ** 2)
    return dppo_loss(a.kind, logp, old, adv, n)


def kl_penalty(a: LossArgs, logp: Tensor, old: Tensor, n: Numbers) -> Tensor:
    d = a.ref_logprob - logp
    k = {1: lambda: -d, 2: lambda: d**2 / 2, 3: lambda: ratio_of(d, 0 * d.detach(), n) - d - 1}
    value = k[a.kl_kind]()
    return ratio_of(logp, old, n) * value if a.kl_unbiased else value


class Loss(NamedTuple):
    row_loss: Tensor
    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    grad_logits: Tensor


def literal_loss(a: LossArgs) -> Loss:
    """Per-row loss and its gradient by autograd, in the dtype of the logits, for finite rows."""
    ew = a.weight if a.entropy_weight is None else a.entropy_weight
    active = (a.weight != 0) | (ew != 0)
    x = a.logits.detach().clone().requires_grad_()
    z = scaled_logits(x, a.row_temperature, a.temperature, a.softcap)
    stats = literal_stats(z, torch.where(active, a.targets, 0))
    logp, n = stats.logprob, numbers(a)
    old = logp.detach() if a.old_logprob is None else a.old_logprob
    loss = policy_term(a, logp, old, n)
    if a.kind != formulas.DRO:
        loss = torch.where(a.advantage == 0, 0.0, loss)
    if a.importance is not None:
        loss = a.importance * loss
    if a.kl_kind:
        loss = loss + n.kl_coef * kl_penalty(a, logp, old, n)
    row_loss = torch.where(active, a.weight * loss - n.entropy_coef * ew * stats.entropy, 0.0)
    (grad,) = torch.autograd.grad(row_loss.sum(), x)
    if a.loss_scale is not None:
        grad = grad * a.loss_scale
    rows = (row_loss, loss, logp, stats.entropy)
    row_loss, loss, logp, entropy = (torch.where(active, t.detach(), 0.0) for t in rows)
    return Loss(row_loss, loss, logp, entropy, grad)


def gradient_terms(
    z: Tensor, targets: Tensor, inverse_temperature: Tensor | float, *scalars: Tensor
) -> Tensor:
    """Sum of the magnitudes of the terms that a logit's gradient is the sum of."""
    g, e, c, k = (x.double().abs().unsqueeze(-1) for x in scalars)
    logp = z.double().log_softmax(-1)
    p, d = logp.exp(), (z.double() - z.double().amax(-1, keepdim=True)).clamp_min(-1e4)
    mean = 1 + (p * d).sum(-1, keepdim=True).abs()  # ln s - H, with s >= 1
    terms = p * (g + e * (d.abs() + mean) + 2 * c + k)
    at_target = torch.zeros_like(terms).scatter(-1, targets.unsqueeze(-1), g.expand_as(terms))
    return (terms + at_target) * inverse_temperature


class LossTerms(NamedTuple):
    """Sums of the magnitudes of the terms that each result is the sum of; see `assert_close`."""

    row_loss: Tensor
    token_loss: Tensor
    grad_logits: Tensor


def loss_terms(a: LossArgs, exact: Loss) -> LossTerms:
    a = a.cast(torch.float64)
    h, logp = numbers(a), exact.logprob
    old = logp if a.old_logprob is None else a.old_logprob
    ones = torch.ones_like(a.weight)
    policy = formulas.objective_rows(
        a.kind, 0, False, logp, exact.entropy, a.old_logprob, a.advantage, ones, None,
        a.importance, None, formulas.Hyper(*h)._replace(entropy_coef=0.0),
    )  # fmt: skip
    value, slope = policy.token_loss.abs(), policy.dlogp.abs()
    if a.kind == formulas.DRO:
        factor = ones if a.importance is None else a.importance.abs()
        value = factor * ((a.advantage * logp).abs() + h.low * (logp - old) ** 2)
        slope = factor * (a.advantage.abs() + h.low * (logp - old).abs())
    if a.ref_logprob is not None and a.kl_kind:
        d = a.ref_logprob - logp
        e = ratio_of(d, 0 * d, h)
        k = (d.abs(), d * d / 2, e + d.abs() + 1)[a.kl_kind - 1]
        dk = (ones, d.abs(), e + 1)[a.kl_kind - 1]
        r = ratio_of(logp, old, h) if a.kl_unbiased else ones
        value = value + h.kl_coef.abs() * r * k
        slope = slope + h.kl_coef.abs() * r * (dk + k if a.kl_unbiased else dk)
    ew = a.weight if a.entropy_weight is None else a.entropy_weight
    e = h.entropy_coef * ew
    z = scaled_logits(a.logits, a.row_temperature, a.temperature, a.softcap)
    t = a.temperature if a.row_temperature is None else a.row_temperature.unsqueeze(-1)
    scale = (1.0 if a.loss_scale is None else a.loss_scale) / t
    y = torch.where((a.weight != 0) | (ew != 0), a.targets, 0)
    gradient = gradient_terms(z, y, scale, a.weight * slope, e, 0 * e, 0 * e)
    return LossTerms(a.weight.abs() * value + (e * exact.entropy).abs(), value, gradient)


def exact_loss(a: LossArgs) -> Loss:
    """The reference in float64 on the inputs as a kernel sees them."""
    return Loss(*ref.policy_loss(*a.cast(torch.float64).args(), True))


def loss_and_error(a: LossArgs) -> tuple[Loss, Loss]:
    """Truth and baseline error; the baseline's gradient is rounded once to the logits' dtype."""
    moved = [name for name in MOVED if getattr(a, name) is not None]

    def exact(*inputs: Tensor) -> Loss:
        return exact_loss(replace(a, **dict(zip(moved, inputs, strict=True))))

    def plain(*inputs: Tensor) -> Loss:
        near = replace(a, **dict(zip(moved, inputs, strict=True)))
        out = literal_loss(near.cast(inputs[0].dtype))
        return out._replace(grad_logits=out.grad_logits.to(a.logits.dtype))

    inputs = [getattr(a, name) for name in moved]
    truth, error = baseline_error(inputs, exact, plain, digest(*a.args()))
    return Loss(*truth), Loss(*error)
