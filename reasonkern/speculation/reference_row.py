"""The rows of the family in torch: filters, the seeded sampler's choice, statistics of a row.

Every comparison is between numbers that all backends compute to the same bits: z/T and the noise
in fp32 (noise.py), masses in 64-bit fixed point, whose sum has no order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import noise

INF = float("inf")
MASS_BITS = 40  # fixed point: the most likely token has mass 2^40
TINY = 2.0**-126  # the smallest normal number in fp32
CONFIDENCE_TOKENS = 20  # the most likely ones, which a row's confidence averages over


class Filters(NamedTuple):
    """One value per row; temperature and the p's float32, top_k int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class Scores(NamedTuple):
    """Rows after mask, temperature and filters."""

    value: Tensor
    """(R, V) z/T in fp32, -inf where filtered out; z itself in greedy rows."""
    mass: Tensor
    """(R, V) int64 exp(z/T - max) in units of 2^-40 of the kept tokens."""
    top: Tensor
    """(R, 1) the largest z/T."""
    bad: Tensor
    """(R,) NaN or +inf among the allowed tokens, or nothing finite: use `fallback`."""
    fallback: Tensor
    """(R,) lowest id of the largest finite allowed logit, -1 when there is none."""


def unpack_mask(mask: Tensor | None, vocab: int) -> Tensor | None:
    """(R, ceil(V / 32)) int32 words to (R, V) bool: bit v % 32 of word v // 32 allows token v."""
    if mask is None:
        return None
    bits = (mask.unsqueeze(-1) >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :vocab].bool()


def allowed(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of any float dtype in float32, -inf where the mask forbids them."""
    x = logits.to(torch.float32)
    bits = unpack_mask(mask, x.shape[-1])
    return x if bits is None else torch.where(bits, x, -INF)


def scores(logits: Tensor, mask: Tensor | None, filters: Filters) -> Scores:
    """Mask, temperature, top-k, top-p, min-p, in this order. logits (R, V) of any float dtype."""
    x = allowed(logits, mask)
    greedy = (filters.temperature == 0).unsqueeze(-1)
    value = x / torch.where(greedy, 1.0, filters.temperature.unsqueeze(-1))
    top = value.amax(-1, keepdim=True)  # NaN when the row has one
    bad = ~torch.isfinite(top)
    finite = torch.where(torch.isfinite(x), x, -INF)
    best = finite.amax(-1, keepdim=True)
    fallback = torch.where(best == -INF, -1, _first(finite == best))
    value = torch.where(bad, -INF, value)
    kept, mass = _filter(value, filters)
    value = torch.where(kept | greedy, value, -INF)
    return Scores(value, mass, top, bad.squeeze(-1), fallback.squeeze(-1))


def _filter(value: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Kept tokens and the masses of the kept, (R, V); the order is by value, then by id."""
    ordered, ids = value.sort(dim=-1, descending=True, stable=True)
    vocab = value.shape[-1]
    top_k, top_p = filters.top_k.unsqueeze(-1), filters.top_p.unsqueeze(-1)
    kept = (torch.arange(vocab, device=value.device) < top_k) | (top_k <= 0)
    mass = masses(ordered, ordered[..., :1]) * kept
    before = mass.cumsum(-1) - mass
    limit = top_p.double() * mass.sum(-1, keepdim=True).double()
    kept &= (before.double() < limit) | (before == 0) | (top_p >= 1)
    bound = ordered[..., :1] - noise.minus_log(filters.min_p.clamp(TINY, 1)).unsqueeze(-1)
    kept &= (ordered >= bound) | (filters.min_p <= 0).unsqueeze(-1)
    mass = torch.where(kept, mass, 0)
    empty = torch.zeros_like(kept)
    return empty.scatter(-1, ids, kept), torch.zeros_like(mass).scatter(-1, ids, mass)


def masses(value: Tensor, top: Tensor) -> Tensor:
    """exp(value - top) in 64-bit fixed point, rounded down; 0 for a row without a finite top."""
    return (noise.exp(value - top) * 2.0**MASS_BITS).to(torch.int64)


def choose(s: Scores, filters: Filters, seed: Tensor, position: Tensor) -> Tensor:
    """(R,) argmax of value + Gumbel noise, ties to the lower id; argmax in greedy rows."""
    return _choose(s, filters, s.value, seed, position, noise.TARGET, 0)


def choose_residual(
    s: Scores, filters: Filters, value: Tensor, seed: Tensor, position: Tensor, depth: int
) -> Tensor:
    """The same over a residual law, given as fp32 log-weights, with its own noise."""
    return _choose(s, filters, value, seed, position, noise.RESIDUAL, depth)


def _choose(
    s: Scores, filters: Filters, value: Tensor, seed: Tensor, position: Tensor, stream: int,
    depth: int,
) -> Tensor:  # fmt: skip
    g = noise.gumbel(noise.row_words(seed, position, value.shape[-1], stream, depth))
    perturbed = torch.where((filters.temperature == 0).unsqueeze(-1), value, value + g)
    chosen = _first(perturbed == perturbed.amax(-1, keepdim=True)).squeeze(-1)
    return torch.where(s.bad, s.fallback, chosen)


def _first(mask: Tensor) -> Tensor:
    """(R, 1) index of the first true element, 0 when there is none."""
    return mask.to(torch.int8).argmax(-1, keepdim=True)


def statistics(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest raw logits (ties to the lower id) with their ids, and the log-sum-exp.

    A row with NaN, +inf or nothing finite has ids -1, logits -inf and lse -inf; so do the slots
    beyond the finite logits.
    """
    x = logits.to(torch.float32)
    bad = ~torch.isfinite(x.amax(-1, keepdim=True))
    x = torch.where(bad, -INF, x)
    ordered, ids = x.sort(dim=-1, descending=True, stable=True)
    ordered, ids = ordered[..., :k], ids[..., :k]
    pad = (0, k - ordered.shape[-1])
    ordered = torch.nn.functional.pad(ordered, pad, value=-INF)
    ids = torch.where(ordered == -INF, -1, torch.nn.functional.pad(ids, pad, value=-1))
    return ids, ordered, torch.logsumexp(x.double(), -1).to(torch.float32)


class Law(NamedTuple):
    """Statistics of the rows that tokens are drawn from, (R,) float32; -inf in bad rows."""

    logprob: Tensor
    entropy: Tensor
    confidence: Tensor
    max_prob: Tensor


def entropy_of(value: Tensor) -> Tensor:
    """(R,) float64 entropies of softmax(value); -inf where that has NaN or +inf, or is all -inf."""
    logp = value.double().log_softmax(-1)
    entropy = (logp.exp() * torch.where(logp == -INF, 0, logp).abs()).sum(-1)
    return torch.where(entropy.isnan(), -INF, entropy)


def law_statistics(logits: Tensor, s: Scores, filters: Filters, token: Tensor) -> Law:
    """`logits` (R, V) after mask and control, `s` its scores, `token` what was drawn."""
    logp = logits.to(torch.float32).double().log_softmax(-1)
    top = logp.topk(min(CONFIDENCE_TOKENS, logp.shape[-1]), -1).values
    finite = top > -INF
    confidence = torch.where(finite, top, 0).abs().sum(-1) / finite.sum(-1)
    entropy = torch.where(filters.temperature == 0, 0, entropy_of(s.value))
    chosen = logp.gather(-1, token.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    out = (chosen, entropy, confidence, logp.amax(-1).exp())
    return Law(*(torch.where(s.bad, -INF, x).to(torch.float32) for x in out))
