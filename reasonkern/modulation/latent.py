"""Test-time optimisation of hidden states in front of a frozen head: SRGen and LatentSeek.

Both minimise -log p of many rows and need no gradient of the head. The rows' logits exist a chunk
at a time; the family's loss operator overwrites them with their gradient, which is summed over the
rows (SRGen) or multiplied with the head (LatentSeek) before the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from ..policy_loss.chunks import HeadChunks, Needs, Plan, Selection, chunk_size
from ..policy_loss.inputs import LOGITS_DTYPES, RowContext, Scaling
from ..policy_loss.objective import Objective
from ..policy_loss.op import marks_gradients
from ..policy_loss.paths import fused_args
from ..policy_loss.reference import accumulator_dtype
from ..policy_loss.sequence import Segments

# Rows of a half-precision head that are upcast at a time.
HEAD_ROWS = 16384
PLAIN = Scaling(None, 1.0, 0.0)


@documented
class SrgenDelta(NamedTuple):
    """What `srgen_delta` found; ``logits`` are those to sample the next token from.

    Attributes:
        delta: (D,), to be added to the last hidden state of this one token, then dropped.
        logits: (V,): weight @ (last_hidden + delta).
        losses: (steps,): the loss before each step.
    """

    delta: Tensor
    logits: Tensor
    losses: Tensor


@documented
class LatentPolicy(NamedTuple):
    """What `latent_policy_gradient` found; ``loss`` with autograd.

    Attributes:
        loss: 0-dim.
        tokens: (N,) int64, the argmax of each row: the text that the next reward is for.
        logprob: (N,), of those tokens; detached.
    """

    loss: Tensor
    tokens: Tensor
    logprob: Tensor


def srgen_delta(
    prefix: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    last_hidden: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    lam: float = 0.05,
    steps: int = 3,
    lr: float = 0.01,
    chunk_rows: int | None = None,
) -> SrgenDelta:
    """The corrective vector that SRGen (2510.02919) adds to one uncertain token's hidden state.

    AdamW (eps 1e-5, weight decay 1e-8) from δ = 0 on ``(1 - lam) CE + lam H``: the cross-entropy of
    the prefix with δ added to every hidden state, and the entropy of the next token. δ is shared,
    so all logits shift by c = Wδ, and the gradient is one V-vector through the head::

        g = W' [(1 - lam) (mean_i softmax(z_i + c) - hist / n) - lam p (ln p + H) / T]

    A step is one pass over the prefix's logits and a matrix-vector product each way; autograd would
    multiply (N, D) with the head three times. Equivalent to::

        delta = torch.zeros(D).requires_grad_()
        optimizer = torch.optim.AdamW([delta], lr, eps=1e-5, weight_decay=1e-8)
        for _ in range(steps):
            ce = F.cross_entropy((hidden + delta) @ weight.T, labels)
            p = ((last_hidden + delta) @ weight.T / temperature).softmax(-1)
            ((1 - lam) * ce - lam * (p * p.log()).sum()).backward()
            optimizer.step(), optimizer.zero_grad()

    The released code takes ln(p + 1e-10), and optimises after ending the sequence and prefilling it
    again; when to intervene is the sampler's trigger.

    Args:
        prefix: (N, V) cached logits z of the prefix, read once per step; or ``(hidden, weight)``,
            (N, D) and (V, D), from which they are computed again in each step, a chunk at a time.
        labels: (N,) int64 or int32, the token that followed each position.
        last_hidden: (D,), last-layer state at the token to be generated.
        weight: (V, D), the frozen head.
        mask: (N,) bool, the positions whose label counts. None = all.
        temperature: T of the entropy, > 0: the sampler's.
        lam: λ in [0, 1]. Paper: 0.05.
        steps: inner steps, >= 1. Paper: 3.
        lr: > 0. Paper: 0.01.
        chunk_rows: rows whose logits are shifted at a time. None = about 96 MiB of them on CPU,
            1.25 GiB on a GPU.

    Returns:
        `SrgenDelta` in float32 (float64 for float64 operands). A position with NaN or +inf logits,
        or with its label at -inf, counts as one without loss.

    Raises:
        ValueError: wrong shape, dtype or device, a number out of range; on CPU a label outside
            [0, V) under the mask.
    """
    count, dtype = _check_prefix(prefix, last_hidden, weight)
    labels, mask = _check_labels(labels, mask, count, weight)
    _check_numbers(temperature, lam, steps, lr)
    plan = _plan(dtype, chunk_rows, count)
    wide = accumulator_dtype(dtype)
    share = mask.to(wide) / mask.sum().clamp_min(1)
    with torch.no_grad(), _without_autocast(weight.device):
        delta = torch.zeros_like(last_hidden, dtype=wide)
        optimizer = torch.optim.AdamW([delta], lr, eps=1e-5, weight_decay=1e-8)
        last = _head_times(weight, last_hidden.to(wide))
        loss = _SrgenLoss(prefix, labels, share, last, weight, temperature, lam, plan)
        shift, losses = torch.zeros_like(last), []
        for _ in range(steps):
            value, delta.grad = loss(shift)
            losses.append(value)
            optimizer.step()
            shift = _head_times(weight, delta)
    return SrgenDelta(delta.detach(), last + shift, torch.stack(losses))


def latent_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    reward: float | Tensor,
    *,
    chunk_rows: int | None = None,
) -> LatentPolicy:
    """LatentSeek's REINFORCE loss (2505.13308) of latent states, with a gradient for them alone.

    Each row is labelled with its own most likely token, in the pass that computes the loss::

        logp = F.linear(hidden, weight).float().log_softmax(-1)
        loss = -(reward * logp.amax(-1)).sum()

    The gradient is formed with the loss: two matrix products, no gradient of the head and no (N, V)
    tensor. The released code adds 1e-8 and 1e-10 inside the logarithm, which biases each term by
    1e-8 / p at least; it takes Adam with lr 0.03, at most 10 steps over the states of the first
    tenth of the generated tokens (300 at most), and stops above reward -0.2.

    Args:
        hidden: (N, D), the latent states, float32, bfloat16, float16 or float64.
        weight: (V, D) of the same dtype, the frozen head; gets no gradient even if it asks for one.
        reward: of the text decoded from the states: a number, or one per row (N,) for the states of
            several problems at once. No gradient.
        chunk_rows: rows whose logits exist at a time. None = about 96 MiB of logits on CPU,
            1.25 GiB on a GPU.

    Returns:
        `LatentPolicy`; the loss is a sum over rows. Rows with NaN or +inf logits give loss 0 and
        gradient 0, and have logprob NaN.

    Raises:
        ValueError: wrong shape, dtype or device, a reward that is no finite number (in a tensor:
            on CPU).

    Example:
        >>> import torch, reasonkern as rk
        >>> hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> out = rk.latent_policy_gradient(hidden, torch.eye(2), reward=-1.0)
        >>> out.loss.backward()
        >>> out.tokens, hidden.grad  # p - e_0, times the reward
        (tensor([0]), tensor([[ 0.2689, -0.2689]]))
    """
    _check_head(hidden, weight)
    _checks.check_dtype("weight", weight, hidden.dtype)
    rows = _reward_rows(reward, hidden)
    plan = _plan(hidden.dtype, chunk_rows, len(hidden))
    return LatentPolicy(*_LatentPolicy.apply(hidden, weight.detach(), rows, plan))  # type: ignore[no-untyped-call]


class _LatentPolicy(torch.autograd.Function):
    """Forms the gradient with the loss, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, reward: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = hidden.shape[0]
        tokens = torch.empty(count, dtype=torch.int64, device=hidden.device)
        loss, logprob = torch.empty_like(reward), torch.empty_like(reward)
        needs = Needs(ctx.needs_input_grad[0], False, False)
        chunks = HeadChunks(hidden, weight, None, Selection(None, None, count), plan, needs)
        for chunk in chunks:
            tokens[chunk.span] = chunk.logits[0].argmax(-1)
            advantage = reward[chunk.span]
            rows = _nll_gradient_(
                chunk.logits, tokens[chunk.span], advantage, torch.ones_like(advantage)
            )
            loss[chunk.span], logprob[chunk.span] = rows
            chunks.add_gradient(chunk, rows[1])
        ctx.save_for_backward(chunks.grad_hidden)
        ctx.mark_non_differentiable(tokens, logprob)
        return loss.sum(), tokens, logprob

    @staticmethod
    @marks_gradients
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _nll_gradient_(
    logits: Tensor, targets: Tensor, advantage: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrites the logits (1, rows, V) with the gradient of the sum of the row losses.

    Returns -weight · advantage · logprob, and logprob, (rows,) each.
    """
    context = RowContext(
        None, advantage.unsqueeze(0), weight.unsqueeze(0), None, None, None, Segments()
    )
    args = fused_args(Objective.reinforce(), targets.unsqueeze(0), context, PLAIN, None)
    row_loss, _, logprob, _ = torch.ops.reasonkern.policy_loss_(logits, *args)
    return row_loss[0], logprob[0]


# ---- SRGen's loss


class _SrgenLoss(NamedTuple):
    """The loss at a shift c = Wδ of all logits, and its gradient by δ."""

    prefix: Tensor | tuple[Tensor, Tensor]
    labels: Tensor  # (N,)
    share: Tensor  # (N,), of each position in the cross-entropy
    last: Tensor  # (V,), logits of the next token
    weight: Tensor
    temperature: float
    lam: float
    plan: Plan

    def __call__(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        ce, slope = self.cross_entropy(shift)
        entropy, entropy_slope = _entropy((self.last + shift) / self.temperature)
        slope.mul_(1 - self.lam).add_(entropy_slope, alpha=self.lam / self.temperature)
        return (1 - self.lam) * ce + self.lam * entropy, _times_head(slope, self.weight)

    def cross_entropy(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and the column sum of its gradient by the shifted logits (V,)."""
        value, slope = shift.new_zeros(()), torch.zeros_like(shift)
        for span, logits in _prefix_chunks(self.prefix, self.plan):
            # In the accumulator's dtype: a small shift would be lost in bfloat16 logits.
            shifted = torch.add(logits, shift).contiguous().unsqueeze(0)
            weight = self.share[span]
            loss, _ = _nll_gradient_(shifted, self.labels[span], torch.ones_like(weight), weight)
            value += loss.sum()
            slope += shifted[0].sum(0)
        return value, slope


def _prefix_chunks(
    prefix: Tensor | tuple[Tensor, Tensor], plan: Plan
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, V) logits of one chunk after the other."""
    if isinstance(prefix, tuple):
        hidden, head = prefix
        for chunk in HeadChunks(hidden, head, None, Selection(None, None, len(hidden)), plan):
            yield chunk.span, chunk.logits[0]
        return
    # The size of the shifted copy counts.
    wide = plan._replace(dtype=accumulator_dtype(plan.dtype))
    rows = chunk_size(len(prefix), prefix.shape[1], wide, prefix.device)
    for start in range(0, len(prefix), rows):
        span = slice(start, start + rows)
        yield span, prefix[span]


def _entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """H of the softmax, and its derivative by the logits."""
    p = logits.softmax(-1)
    terms = torch.special.entr(p)  # -p ln p, 0 where p is
    entropy = terms.sum()
    return entropy, terms - p * entropy


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """It would round the products with δ and their gradients to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _head_times(weight: Tensor, x: Tensor) -> Tensor:
    """The product weight @ x in the dtype of x; one in half precision would round it."""
    if weight.dtype == x.dtype:
        return weight @ x
    return torch.cat([block.to(x.dtype) @ x for block in weight.split(HEAD_ROWS)])


def _times_head(x: Tensor, weight: Tensor) -> Tensor:
    """The product x @ weight, likewise."""
    if weight.dtype == x.dtype:
        return x @ weight
    out = x.new_zeros(weight.shape[1])
    for part, block in zip(x.split(HEAD_ROWS), weight.split(HEAD_ROWS), strict=True):
        out += part @ block.to(x.dtype)
    return out


# ---- checks


def _plan(dtype: torch.dtype, chunk_rows: int | None, count: int) -> Plan:
    """Chunks of no more than the rows that there are."""
    if chunk_rows is not None and not (_checks.is_integer(chunk_rows) and chunk_rows >= 1):
        _checks.fail("chunk_rows", "an integer >= 1 or None", repr(chunk_rows))
    rows = -1 if chunk_rows is None else min(chunk_rows, max(1, count))
    return Plan(dtype, rows, False, -1)


def _check_head(hidden: Tensor, weight: Tensor, name: str = "hidden") -> None:
    for tensor_name, x in ((name, hidden), ("weight", weight)):
        _checks.check_dtype(tensor_name, x, *LOGITS_DTYPES)
        _checks.check_device(tensor_name, x, hidden, name)
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        _checks.fail(name, "shape (N, D), D >= 1", tuple(hidden.shape))
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        _checks.fail("weight", f"shape (V, {hidden.shape[1]}), V >= 1", tuple(weight.shape))


def _check_prefix(
    prefix: Tensor | tuple[Tensor, Tensor], last_hidden: Tensor, weight: Tensor
) -> tuple[int, torch.dtype]:
    """Number of positions, and the dtype of their logits."""
    _checks.check_tensor("last_hidden", last_hidden)
    if last_hidden.ndim != 1:
        _checks.fail("last_hidden", "shape (D,)", tuple(last_hidden.shape))
    _check_head(last_hidden.unsqueeze(0), weight, "last_hidden")
    if isinstance(prefix, tuple):
        if len(prefix) != 2:
            _checks.fail("prefix", "logits, or (hidden, weight)", f"{len(prefix)} tensors")
        hidden, head = prefix
        _check_head(hidden, head, "prefix[0]")
        _checks.check_shape("prefix[1]", head, weight.shape, "weight.shape")
        _checks.check_dtype("prefix[1]", head, hidden.dtype)
        _checks.check_device("prefix[0]", hidden, weight, "weight")
        return len(hidden), hidden.dtype
    _checks.check_dtype("prefix", prefix, *LOGITS_DTYPES)
    if prefix.ndim != 2 or prefix.shape[1] != weight.shape[0]:
        expected = f"shape (N, {weight.shape[0]}), or (hidden, weight)"
        _checks.fail("prefix", expected, tuple(prefix.shape))
    _checks.check_device("prefix", prefix, weight, "weight")
    return len(prefix), prefix.dtype


def _check_labels(
    labels: Tensor, mask: Tensor | None, count: int, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) int64 and bool."""
    _checks.check_shape("labels", labels, (count,), "(N,)")
    _checks.check_dtype("labels", labels, torch.int64, torch.int32)
    _checks.check_device("labels", labels, weight, "weight")
    if mask is None:
        mask = torch.ones_like(labels, dtype=torch.bool)
    _checks.check_shape("mask", mask, (count,), "(N,)")
    _checks.check_dtype("mask", mask, torch.bool)
    _checks.check_device("mask", mask, weight, "weight")
    _checks.check_range("labels", labels, 0, weight.shape[0], where=mask)
    return labels.to(torch.int64).contiguous(), mask


def _check_numbers(temperature: float, lam: float, steps: int, lr: float) -> None:
    _checks.check_number("temperature", temperature, 0.0, exclusive=True)
    _checks.check_number("lr", lr, 0.0, exclusive=True)
    _checks.check_number("lam", lam, 0, 1)
    _checks.check_integer("steps", steps, 1)


def _reward_rows(reward: float | Tensor, hidden: Tensor) -> Tensor:
    """(N,) in the accumulator's dtype."""
    if not isinstance(reward, Tensor):
        _checks.check_number("reward", reward)
        reward = torch.full((), float(reward), dtype=torch.float64, device=hidden.device)
    if reward.ndim:
        _checks.check_shape("reward", reward, hidden.shape[:1], "(N,)")
    _checks.check_device("reward", reward, hidden, "hidden")
    rows = reward.detach().to(accumulator_dtype(hidden.dtype))
    rows = rows.expand(hidden.shape[:1]).contiguous()
    _checks.check_finite("reward", rows, expected="finite numbers")
    return rows
