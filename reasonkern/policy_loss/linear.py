"""From hidden states and the language-model head to the loss: no (N, V) logits ever exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from . import linear_op, parallel_linear, paths
from .chunks import Needs, Plan
from .inputs import (
    KEPT,
    LOGITS_DTYPES,
    canonical_mask,
    canonical_scaling,
    loss_inputs,
    of_caller,
)
from .metrics import loss_metrics
from .objective import Objective
from .outputs import PolicyLossOutput, TokenStats
from .parallel import Parallel


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    compact: bool = False,
    parallel: Parallel | None = None,
) -> TokenStats:
    """`token_stats` of ``F.linear(hidden, weight, bias)``, whose logits never exist all at once.

    Differentiable (once) through ``logprob``, ``entropy``, ``lse`` and ``collision``: the backward
    computes the logits of each chunk again, four matrix products in all. Equivalent to::

        token_stats(F.linear(hidden, weight, bias), targets, temperature=…, softcap=…, mask=…)

    Args:
        hidden: (N, D) or (B, T, D), float32, bfloat16, float16 or float64.
        weight: (V, D), the head; of the dtype of ``hidden``, except under autocast, where both are
            cast as F.linear casts them. Its gradient is accumulated in float32 and rounded once;
            with ``requires_grad`` False it is not computed.
        targets: (N,) or (B, T) token ids in [0, V).
        bias: (V,); None = no bias.
        temperature: a number > 0, or a tensor of one per row or one per sequence (B,).
        softcap: z = cap * tanh(x / cap) before the temperature, but -inf stays; None = off.
        mask: bool or 0/1 numbers, shaped like ``targets``; rows where it is 0 have statistics and
            gradient 0, whatever their hidden states and target. None = all rows.
        chunk_rows: rows whose logits exist at a time; the last chunk is filled up. None = equal
            chunks of about 96 MiB of logits on CPU, 1.25 GiB on a GPU.
        compact: leave masked rows out of the matrix products, too. Counting them waits for the
            device, once here and once in the backward.
        parallel: with a ``vocab_group``, ``weight`` and ``bias`` are this rank's rows of the head
            and ``hidden`` is the same on every rank; its gradient is added up over the group unless
            ``reduce_dhidden`` is False. None = the whole head.

    Returns:
        `TokenStats`, as from `token_stats`.

    Raises:
        ValueError: wrong shape, dtype or device; a target outside [0, V) in an unmasked row on CPU;
            a weight that is a DTensor (see `linear_policy_loss`).

    Example:
        >>> import torch, reasonkern as rk
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
        >>> rk.linear_token_stats(hidden, weight, torch.tensor([2])).entropy  # ln 4
        tensor([1.3863])
    """
    head = canonical_head(hidden, "weight", weight, targets, bias, parallel)
    shard = parallel_linear.head_shard(weight, parallel)
    scaling = canonical_scaling(head.rows, temperature, softcap)
    mask = canonical_mask(mask, head.targets, targets.shape, "hidden")
    vocab = weight.shape[0] if shard is None else shard.vocab
    _checks.check_range("targets", head.targets, 0, vocab, mask, KEPT)
    plan = head.plan(chunk_rows, compact, None)
    out = parallel_linear.linear_token_stats(
        head.operands, head.targets, mask, scaling, plan, shard, parallel
    )
    return TokenStats(*of_caller(out[:7], targets))


def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    old_logprob: Tensor | None = None,
    advantage: Tensor,
    weight: Tensor,
    objective: Objective | Callable[..., Tensor],
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy_weight: Tensor | None = None,
    loss_scale: Tensor | None = None,
    chunk_rows: int | None = None,
    compact: bool = False,
    num_active: int | None = None,
    parallel: Parallel | None = None,
) -> PolicyLossOutput:
    """`policy_loss` of ``F.linear(hidden, lm_head_weight, bias)``, whose logits never all exist.

    Token-local objectives form all gradients in the forward, three matrix products; the others
    (sequence-level, OPSM, user-defined, float16 without ``loss_scale``) compute the logits of each
    chunk again in the backward, four. Equivalent to::

        policy_loss(F.linear(hidden, lm_head_weight, bias), targets, old_logprob=…, advantage=…, …)

    Inside a region of torch.utils.checkpoint it works, but the forward, gradients included, runs
    twice: checkpoint the layers before it. With fully_shard (FSDP2), call it in the forward of the
    module that holds the head, where the weight is a plain tensor; a DTensor is refused. FSDP's
    mixed precision casts the floating tensors that forward is called with, and bfloat16
    log-probabilities are off by 0.03 nat: pass them in a plain object. With DDP, too, call it in
    the forward of the wrapped module: outside, nothing averages the gradients over the ranks.
    Under torch.compile it is one operator of the graph.

    Args:
        hidden: (N, D) packed or (B, T, D) padded, float32, bfloat16, float16 or float64. For next-
            token targets ``hidden[:, :-1]`` copies N·D elements; shifted targets with weight 0 on
            the last position do not.
        lm_head_weight: (V, D), of the dtype of ``hidden``, except under autocast, where both are
            cast as F.linear casts them. Its gradient is accumulated in float32 and rounded once;
            with ``requires_grad`` False it is not computed.
        targets: (N,) or (B, T) token ids.
        bias: (V,); None = no bias.
        old_logprob: log-probabilities of the policy that the ratio is against, shaped like
            ``targets``; None = on-policy, r = 1 with gradient. Those of `linear_token_stats` with
            the same rows and ``chunk_rows``, not compacted, have the same bits as this pass's.
        advantage: shaped like ``targets``, or one per sequence: (B,) for padded rows, one per
            segment for packed ones.
        weight: shaped like ``targets``, floats: mask x normaliser, from `token_weights`; a mask by
            itself (bool or integers) is refused, and as floats it is the plain sum over all tokens.
            Rows whose weight and entropy weight are 0 take no part, whatever their hidden states
            and target.
        objective: an `Objective`, or a torch function ``(logprob, entropy, ctx) -> token_loss``.
        ref_logprob: reference policy's log-probabilities, for an objective with ``kl`` and for
            user-defined ones.
        rollout_logprob: inference engine's log-probabilities, for ``importance``, ``opsm``, BAPO as
            in the paper and user-defined objectives; the others do not look at them.
        segments: ``cu_seqlens`` (S + 1,) of packed tokens, for sequence-level terms; padding behind
            the last sequence is one more. Where S = N, N values are read as one per token, except
            the advantages of sequence-level objectives.
        temperature: number > 0, or a tensor of one per row or per sequence. No gradient.
        softcap: z = cap * tanh(x / cap) before the temperature, but -inf stays; None = off.
        entropy_weight: per-row weight of the entropy bonus, floats; None = ``weight``.
        loss_scale: 0-dim tensor folded into the gradients before they are rounded (GradScaler's
            factor for float16, ``scaler.scale(torch.ones((), device=…))``); scaling the loss by the
            same factor cancels it.
        chunk_rows: rows whose logits exist at a time; the last chunk is filled up. None = equal
            chunks of about 96 MiB of logits on CPU, 1.25 GiB on a GPU.
        compact: leave rows that take no part out of the matrix products, too. Counting them waits
            for the device, once here and, if not token-local, once in the backward.
        num_active: with ``compact``, at least the number of rows that take part: no counting, no
            waiting. Rows beyond it are left out of the loss and counted in ``rows_nonfinite`` (on
            CPU they raise).
        parallel: `Parallel`. ``vocab_group``: ``lm_head_weight`` and ``bias`` are this rank's rows
            of the head, ``hidden`` and the loss are the same on every rank (four products, one
            all-gather of 32 bytes per row); the gradient of ``hidden`` is added up over the group
            unless ``reduce_dhidden`` is False. The other groups as in `policy_loss`.

    Returns:
        `PolicyLossOutput`, as from `policy_loss`. Backward runs once.

    Raises:
        ValueError: as from `policy_loss`; dtypes of ``hidden`` and the head that differ outside
            autocast, a DTensor, ``chunk_rows`` < 1, ``num_active`` without ``compact``.

    Example:
        >>> import torch, reasonkern as rk
        >>> hidden, head = torch.ones(1, 2), torch.zeros(4, 2).requires_grad_()
        >>> one = torch.ones(1)
        >>> out = rk.linear_policy_loss(
        ...     hidden, head, torch.tensor([2]), advantage=one, weight=one,
        ...     objective=rk.Objective.reinforce(),
        ... )
        >>> out.loss.backward()
        >>> head.grad[:, 0]  # p - 1[v = target]
        tensor([ 0.2500,  0.2500, -0.7500,  0.2500])
    """
    head = canonical_head(hidden, "lm_head_weight", lm_head_weight, targets, bias, parallel)
    shard = parallel_linear.head_shard(lm_head_weight, parallel)
    given: dict[str, Any] = {
        "segments": segments, "temperature": temperature, "old_logprob": old_logprob,
        "advantage": advantage, "weight": weight, "ref_logprob": ref_logprob,
        "rollout_logprob": rollout_logprob, "entropy_weight": entropy_weight,
    }  # fmt: skip
    for name, x in given.items():
        if isinstance(x, Tensor):
            _checks.check_device(name, x, hidden, "hidden")
    vocab = lm_head_weight.shape[0] if shard is None else shard.vocab
    o, context, scaling, loss_scale = loss_inputs(
        objective, head.rows, head.targets, vocab,
        packed=hidden.ndim == 2, softcap=softcap, loss_scale=loss_scale, parallel=parallel, **given,
    )  # fmt: skip
    plan = head.plan(chunk_rows, compact, num_active)
    if num_active is not None:
        count_on_cpu(num_active, context.active)
    needs = head.needs()
    if shard is None and paths.is_fused(o, plan.dtype, any(needs), context, loss_scale):
        args = paths.fused_args(o, head.targets, context, scaling, loss_scale)
        out = linear_op.OPS.linear_policy_loss(*head.operands, *args, *plan, *needs)
        loss, token_loss, logprob, entropy = out[:4]
        rest: tuple[Any, ...] = (None, *paths.fused_choices(o, args))
    else:
        logprob, entropy = parallel_linear.linear_token_stats(
            head.operands, head.targets, context.active, scaling, plan, shard, parallel
        )[:2]
        mapped = paths.loss_of_statistics(o, logprob, entropy, context)
        loss, token_loss, logprob, entropy = mapped[:4]
        rest = mapped[4:]
    metrics = loss_metrics(context, logprob, entropy, *rest)
    token_loss, logprob, entropy = of_caller((token_loss, logprob, entropy), targets)
    return PolicyLossOutput(loss, token_loss, logprob, entropy, metrics)


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Checked operands of the matrix products."""

    rows: Tensor  # (B, T, D), stands for the logits where their shape and dtype matter
    targets: Tensor  # (B, T)
    operands: tuple[Tensor, Tensor, Tensor | None]  # (N, D), (V, D), (V,)
    dtype: torch.dtype

    def needs(self) -> Needs:
        """Which operands' gradients autograd will ask for."""
        enabled = torch.is_grad_enabled()
        return Needs(*(enabled and x is not None and x.requires_grad for x in self.operands))

    def plan(self, chunk_rows: int | None, compact: bool, num_active: int | None) -> Plan:
        """Checks and packs what says how the rows are cut."""
        for name, given, least in (("chunk_rows", chunk_rows, 1), ("num_active", num_active, 0)):
            if given is not None:
                _checks.check_integer(name, given, least, or_none=" or None")
        _checks.check_choice("compact", compact, (False, True))
        if num_active is not None and not compact:
            _checks.fail("num_active", "None without compact=True", num_active)
        return Plan(
            self.dtype,
            -1 if chunk_rows is None else chunk_rows,
            bool(compact),
            -1 if num_active is None else num_active,
        )


def count_on_cpu(num_active: int, active: Tensor) -> None:
    """Refuses a number below the count; on CUDA counting would synchronise."""
    if _checks.reads_values(active):
        count = int(active.sum())
        if count > num_active:
            _checks.fail("num_active", f"at least the {count} rows that take part", num_active)


def canonical_head(
    hidden: Tensor,
    weight_name: str,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    parallel: Parallel | None = None,
) -> LinearHead:
    """Checks the operands against each other; the dtype is the one F.linear would compute in."""
    check_tensor("hidden", hidden)
    check_tensor(weight_name, weight)
    check_tensor("targets", targets)
    _checks.check_dtype("hidden", hidden, *LOGITS_DTYPES)
    if hidden.ndim not in (2, 3) or hidden.shape[-1] == 0:
        _checks.fail("hidden", "shape (N, D) or (B, T, D), D >= 1", tuple(hidden.shape))
    operands: list[tuple[str, Any]] = [(weight_name, weight)]
    if bias is not None:
        operands.append(("bias", bias))
    for name, x in [("hidden", hidden), *operands]:
        if hasattr(x, "full_tensor"):
            _checks.fail(name, "a plain tensor (inside the forward of its module)", "a DTensor")
        _checks.check_device(name, x, hidden, "hidden")
    dtype = autocast_dtype(hidden)
    for name, x in operands:
        if autocast_dtype(x) != dtype:
            _checks.fail(name, f"the dtype of hidden, {hidden.dtype}", x.dtype)
    least = 1 if getattr(parallel, "vocab_group", None) is None else 0  # a rank may have none
    if weight.ndim != 2 or weight.shape[0] < least or weight.shape[1] != hidden.shape[-1]:
        expected = f"shape (V, {hidden.shape[-1]}) with V >= {least}"
        _checks.fail(weight_name, expected, tuple(weight.shape))
    if bias is not None:
        _checks.check_shape("bias", bias, weight.shape[:1], "(V,)")
    _checks.check_shape("targets", targets, hidden.shape[:-1], "hidden.shape[:-1]")
    _checks.check_dtype("targets", targets, torch.int64, torch.int32)
    _checks.check_device("targets", targets, hidden, "hidden")
    rows = hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
    y = targets.to(torch.int64).contiguous().view(rows.shape[:2])
    flat = hidden.reshape(-1, hidden.shape[-1])
    return LinearHead(rows, y, (flat, weight, bias), dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which F.linear computes with x: autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
