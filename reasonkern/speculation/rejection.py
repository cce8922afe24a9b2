"""Recursive rejection sampling without replacement (Jeon et al., arXiv 2402.14160), sparse.

Steps of IEEE double arithmetic in a fixed order. The target's law p is known by its fixed-point
masses; the draft law s has at most K tokens, and only their entries of the residual r change. Every
other token keeps r = tail * p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .reference_row import INF, MASS_BITS, TINY, Scores


@dataclass
class State:
    """Rows under verification; (R, K) or (R,)."""

    ids: Tensor
    s: Tensor
    """draft law of the tokens not yet rejected"""
    p: Tensor
    """target's law of the draft's tokens"""
    r: Tensor
    """residual law of the draft's tokens"""
    tail: Tensor
    """residual law of any other token, as a factor of p"""
    tail_mass: Tensor
    """p of all other tokens together"""
    total: Tensor
    """(R,) mass of all kept tokens, in float64 units of the fixed point"""
    patched: Tensor
    """(R,) whether r differs from p"""
    live: Tensor
    """(R,) whether further children may be tested"""


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension from left to right: its rounding is part of the definition."""
    total = torch.zeros_like(x[..., 0])
    for k in range(x.shape[-1]):
        total = total + x[..., k]
    return total


def start(scores: Scores, q_ids: Tensor, q_logprob: Tensor) -> State:
    """Before the first child: r = p, and s the draft law, normalised over its tokens."""
    vocab = scores.mass.shape[-1]
    inside = (q_ids >= 0) & (q_ids < vocab)
    weight = noise.exp(q_logprob.clamp_max(0)).double() * (q_ids >= 0)
    total_weight = _sum(weight).unsqueeze(-1)
    s = torch.where(total_weight > 0, weight / total_weight, 0.0)
    mass = torch.where(inside, scores.mass.gather(-1, q_ids.clamp(0, vocab - 1)), 0)
    total = scores.mass.sum(-1)
    scale = total.double()
    p = mass.double() / scale.unsqueeze(-1)
    return State(
        q_ids, s, p, p, torch.ones_like(scale), (total - mass.sum(-1)).double() / scale, scale,
        torch.zeros_like(scores.bad), total_weight.squeeze(-1) > 0,
    )  # fmt: skip


def test(state: State, token: Tensor, coin: Tensor, active: Tensor) -> Tensor:
    """Tests one drawn child per row: (R,) accepted. A rejected token leaves r and s."""
    match = (state.ids == token.unsqueeze(-1)) & (token >= 0).unsqueeze(-1)
    slot = match.to(torch.int8).argmax(-1, keepdim=True)
    s_x, r_x = state.s.gather(-1, slot).squeeze(-1), state.r.gather(-1, slot).squeeze(-1)
    tested = active & state.live & match.any(-1) & (s_x > 0)
    accepted = tested & (coin * s_x < r_x)
    _reject(state, slot, tested & ~accepted)
    return accepted


def _reject(state: State, slot: Tensor, rejected: Tensor) -> None:
    left = (state.r - state.s).clamp_min(0)
    mass = _sum(left) + state.tail * state.tail_mass
    empty = rejected & ~(mass > 0)  # by rounding only: p = q and a coin next to 1
    moved = rejected & ~empty
    divisor = torch.where(moved, mass, 1.0)
    state.r = torch.where(moved.unsqueeze(-1), left / divisor.unsqueeze(-1), state.r)
    state.tail = torch.where(moved, state.tail / divisor, state.tail)
    state.patched = (state.patched | moved) & ~empty
    s = torch.where(rejected.unsqueeze(-1), state.s.scatter(-1, slot, 0.0), state.s)
    total = _sum(s)
    state.live = state.live & ~empty & ~(rejected & ~(total > 0))
    divisor = torch.where(rejected & (total > 0), total, 1.0).unsqueeze(-1)
    state.s = s / divisor


def log_weights(state: State, scores: Scores) -> Tensor:
    """(R, V) fp32 log-weights of the residual on the scale of z/T: the tail keeps its values."""
    ratio = state.r * (state.total * 2.0**-MASS_BITS / state.tail).unsqueeze(-1)
    known = ratio >= TINY
    log = -noise.minus_log(torch.where(known, ratio, 1.0).to(torch.float32))
    value = torch.where(known, scores.top + log, -INF)
    vocab = scores.value.shape[-1]
    inside = (state.ids >= 0) & (state.ids < vocab) & state.patched.unsqueeze(-1)
    padded = torch.cat([scores.value, scores.value[..., :1]], -1)  # a place for what is not inside
    return padded.scatter(-1, torch.where(inside, state.ids, vocab), value)[..., :-1]
