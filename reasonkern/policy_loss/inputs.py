"""From what a trainer holds to what the operators take: rows (B, T), one dtype, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .objective import Objective
from .objective_fields import Importance
from .parallel import Parallel
from .reference import accumulator_dtype
from .reference_objective import active_rows
from .sequence import Segments

WEIGHTED = " in rows with a weight (of a mask such as targets != -100)"  # targets of losses
KEPT = " in rows that mask= keeps (such as targets != -100)"  # targets of statistics
PADDED = "None for padded (B, T) tokens (packed ones of shape (1, N) take squeeze(0))"
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Temperature and soft-cap as the operators take them."""

    row_temperature: Tensor | None
    temperature: float
    softcap: float


@dataclass(frozen=True, eq=False)
class RowContext:
    """The rows of a batch: every tensor is (B, T), or (1, N) for packed tokens; None = not given.

    This is the ``ctx`` of a user-defined objective. ``sequence_sum(x)`` sums over each sequence and
    gives the sum back to each of its rows; rows of weight 0 count, too, unless x is 0 there, as
    ``torch.where(ctx.active, x, 0)`` is. Rows whose logits give nothing finite have weight 0 here.
    ``parallel`` is what was given to the loss. ``importance`` is a detached factor of the policy
    term, in the place of the objective's own.
    """

    old_logprob: Tensor | None
    advantage: Tensor
    weight: Tensor
    entropy_weight: Tensor | None
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    segments: Segments = field(repr=False)
    advantage_per_sequence: bool = False
    importance: Tensor | None = None

    @property
    def active(self) -> Tensor:
        """Rows that are read: weight != 0 or entropy_weight != 0."""
        return active_rows(self.weight, self.entropy_weight)

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Sum over all rows and pieces of each sequence, in float64, spread back to its rows."""
        return self.segments.sum(x)

    @property
    def parallel(self) -> Parallel | None:
        return self.segments.parallel


def canonical_logits(logits: Tensor, targets: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Views (B, T, V) and (B, T) of (N, V), (N,) or (B, T, V), (B, T) inputs, V >= `least`."""
    check_tensor("logits", logits)
    _checks.check_dtype("logits", logits, *LOGITS_DTYPES)
    if logits.ndim not in (2, 3):
        _checks.fail("logits", "shape (N, V) or (B, T, V)", tuple(logits.shape))
    if logits.shape[-1] < least:
        _checks.fail("logits", "a vocabulary of at least 1", tuple(logits.shape))
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        expected = "the last dimension contiguous (logits.contiguous() copies them)"
        _checks.fail("logits", expected, f"strides {logits.stride()}")
    shape = logits.shape[:-1]
    if not _checks.is_contiguous(targets, shape, torch.int64, logits.device):
        _checks.check_shape("targets", targets, shape, "logits.shape[:-1]")
        _checks.check_dtype("targets", targets, torch.int64, torch.int32)
        _checks.check_device("targets", targets, logits, "logits")
        targets = targets.to(torch.int64).contiguous()
    if logits.ndim == 2:
        return logits.unsqueeze(0), targets.unsqueeze(0)
    return logits, targets


def of_caller(rows: Sequence[Tensor], targets: Tensor) -> Sequence[Tensor]:
    """Rows (B, T) in the shape of the caller's targets, (N,) where they are packed."""
    return rows if targets.ndim == 2 else [x.view_as(targets) for x in rows]


def canonical_mask(
    mask: Tensor | None, targets: Tensor, shape: torch.Size, device_of: str = "logits"
) -> Tensor | None:
    """`mask`, of the `shape` of the caller's targets, as bools in that of the canonical ones."""
    if mask is None:
        return None
    _checks.check_shape("mask", mask, shape, "targets.shape")
    _checks.check_device("mask", mask, targets, device_of)
    _checks.check_mask("mask", mask)
    kept = mask if mask.dtype == torch.bool else mask != 0
    return kept.reshape(targets.shape).contiguous()


def canonical_scaling(
    logits: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    segments: Segments | None = None,
) -> Scaling:
    """A tensor temperature is 0-dim, per sequence, or per row; `logits` are (B, T, V)."""
    if softcap is not None:
        _checks.check_number("softcap", softcap, 0, exclusive=True)
    cap = 0.0 if softcap is None else float(softcap)
    if not isinstance(temperature, Tensor):
        _checks.check_number("temperature", temperature, 0, exclusive=True)
        return Scaling(None, float(temperature), cap)
    rows = row_tensor("temperature", temperature, logits, per_sequence=True, segments=segments)
    if _checks.reads_values(rows):
        right = (rows > 0) & torch.isfinite(rows)
        _check_all("temperature", rows, right, "finite positive values", temperature, segments)
    return Scaling(rows, 1.0, cap)


def row_tensor(
    name: str,
    x: Tensor,
    logits: Tensor,
    *,
    per_sequence: bool = False,
    segments: Segments | None = None,
    sequence_first: bool = False,
) -> Tensor:
    """`x` as contiguous (B, T) rows of the accumulator dtype, detached.

    With as many segments as packed tokens, `sequence_first` reads (N,) as one value per segment.
    """
    shape = logits.shape[:2]
    dtype = accumulator_dtype(logits.dtype)
    if not sequence_first and _checks.is_contiguous(x, shape, dtype, logits.device):
        return x.detach() if x.requires_grad else x
    check_tensor(name, x)
    batch, tokens = shape
    _checks.check_device(name, x, logits, "logits")
    per_token = x.shape == shape or (batch == 1 and x.shape == (tokens,))
    if per_sequence and (sequence_first or not per_token):
        x = _spread(name, x, shape, segments)
    if batch == 1 and x.shape == (tokens,):
        x = x.unsqueeze(0)
    if x.shape != shape:
        # Packed tokens, of shape (N,) to their owner, are rows of shape (1, N) here.
        expected = f"one value per token, {(tokens,) if batch == 1 else (batch, tokens)}"
        if per_sequence and batch == 1 and (segments is None or segments.cu_seqlens is None):
            expected += " (for one per sequence, packed logits need segments=cu_seqlens)"
        elif per_sequence:
            expected += f", or one per sequence, {(batch,)}"
        _checks.fail(name, expected, f"shape {tuple(x.shape)}")
    return x.detach().to(dtype).contiguous()


def _spread(name: str, x: Tensor, shape: torch.Size, segments: Segments | None) -> Tensor:
    if x.ndim == 0:
        return x.expand(shape)
    if segments is not None and segments.cu_seqlens is not None and segments.ids is not None:
        count = segments.cu_seqlens.numel() - 1
        if x.shape != (count,):
            _checks.fail(name, f"one value per segment, {(count,)}", f"shape {tuple(x.shape)}")
        return x[segments.ids]
    # Not `x.shape in (…)`: traced by Dynamo, 3 is in no tuple whose 3 is a symbol.
    if x.shape[:1] == shape[:1] and x.shape[1:] in ((), (1,)):
        return x.reshape(-1, 1).expand(shape)
    return x


def canonical_segments(
    cu_seqlens: Tensor | None,
    targets: Tensor,
    packed: bool,
    parallel: Parallel | None = None,
    device_of: str = "targets",
) -> Segments:
    """Checks ``cu_seqlens``: int, (S + 1,), from 0 to N and, on CPU, non-decreasing."""
    if cu_seqlens is None:
        return Segments(parallel=parallel)
    if not packed:
        _checks.fail("segments", PADDED, "cu_seqlens")
    _checks.check_dtype("segments", cu_seqlens, torch.int32, torch.int64)
    _checks.check_device("segments", cu_seqlens, targets, device_of)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        _checks.fail("segments", "cu_seqlens of shape (S + 1,), S >= 1", tuple(cu_seqlens.shape))
    if _checks.reads_values(targets):
        ends = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if ends != (0, targets.shape[-1]) or (cu_seqlens.diff() < 0).any():
            last = f"{targets.shape[-1]} (padding is a segment, too)"
            expected = f"non-decreasing offsets from 0 to {last}"
            _checks.fail("segments", expected, cu_seqlens.tolist())
    return Segments.of(targets, cu_seqlens, parallel)


def _check_all(
    name: str, rows: Tensor, right: Tensor, expected: str, given: Tensor, segments: Segments | None
) -> None:
    """`_checks.check_all` of rows (B, T); of values per sequence, the index is the sequence's."""
    segments = segments or Segments()
    if given.numel() == segments.count(rows) and not right.all():
        b, t = (~right).nonzero()[0].tolist()
        sequence = b if segments.ids is None else segments.ids[b, t].item()
        _checks.fail(name, expected, f"{rows[b, t].item()} at ({sequence},)")
    _checks.check_all(name, rows, right, expected)


def check_rows(context: RowContext, targets: Tensor, vocab: int, advantage: Tensor) -> None:
    """Values that would otherwise only be counted as nonfinite: refused on CPU."""
    if not _checks.reads_values(targets):
        return
    active = context.active
    _checks.check_finite("weight", context.weight, expected="finite values")
    if context.entropy_weight is not None:
        _checks.check_finite("entropy_weight", context.entropy_weight, expected="finite values")
    right = torch.isfinite(context.advantage) | ~active
    _check_all("advantage", context.advantage, right, "finite values", advantage, context.segments)
    _checks.check_range("targets", targets, 0, vocab, active, WEIGHTED)


def as_objective(objective: Objective | Callable[..., Tensor]) -> Objective:
    if isinstance(objective, Objective):
        return objective
    check_no_constructor(objective)
    if not callable(objective):
        expected = "an Objective, such as Objective.dapo(), or a function"
        _checks.fail("objective", expected, repr(objective))
    return Objective.custom(objective)


def check_no_constructor(objective: object) -> None:
    """Refuses ``Objective.dapo`` where ``Objective.dapo()`` is meant: it is a function, too."""
    if getattr(objective, "__self__", None) is Objective:
        name = f"Objective.{getattr(objective, '__name__', '…')}"
        _checks.fail("objective", f"an Objective, {name}()", f"its constructor, {name}")
    if isinstance(objective, type):
        _checks.fail("objective", "an Objective, such as Objective.dapo()", "a class")


def canonical_loss_scale(loss_scale: Tensor | None, context: RowContext) -> Tensor | None:
    if loss_scale is None:
        return None
    _checks.check_device("loss_scale", loss_scale, context.weight, "logits")
    if loss_scale.ndim:
        _checks.fail("loss_scale", "a 0-dim tensor", f"shape {tuple(loss_scale.shape)}")
    return loss_scale.detach().to(context.weight)


def row_context(
    o: Objective,
    logits: Tensor,
    segments: Segments,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    entropy_weight: Tensor | None,
    importance: Tensor | None = None,
) -> RowContext:
    def optional(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else row_tensor(name, x, logits)

    for name, x in (("weight", weight), ("entropy_weight", entropy_weight)):
        if x is not None and not check_tensor(name, x).is_floating_point():
            # A mask by itself, which would sum the tokens of the batch.
            expected = "mask x normaliser in floats, from token_weights"
            _checks.fail(name, expected, f"a tensor of {x.dtype}")
    spread = row_tensor(
        "advantage", advantage, logits, per_sequence=True, segments=segments,
        sequence_first=o.level == "sequence",
    )  # fmt: skip
    return RowContext(
        old_logprob=optional("old_logprob", old_logprob),
        advantage=spread,
        weight=row_tensor("weight", weight, logits),
        entropy_weight=optional("entropy_weight", entropy_weight),
        ref_logprob=optional("ref_logprob", ref_logprob),
        rollout_logprob=optional("rollout_logprob", rollout_logprob),
        segments=segments,
        advantage_per_sequence=advantage.numel() == 1
        or advantage.numel() == segments.count(spread),
        importance=optional("importance", importance),
    )


class LossInputs(NamedTuple):
    """What both forms of the loss compute from, whatever their logits are made of."""

    objective: Objective
    context: RowContext
    scaling: Scaling
    loss_scale: Tensor | None


def loss_inputs(
    objective: Objective | Callable[..., Tensor],
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    *,
    packed: bool,
    segments: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    loss_scale: Tensor | None,
    parallel: Parallel | None,
    **rows: Any,
) -> LossInputs:
    """Everything but the logits, (B, T, V) or rows like them, checked; `rows` as `row_context`."""
    o = as_objective(objective)
    sequences = canonical_segments(segments, targets, packed, parallel)
    scaling = canonical_scaling(logits, temperature, softcap, sequences)
    context = row_context(o, logits, sequences, **rows)
    check_objective(o, context, packed)
    check_rows(context, targets, vocab, rows["advantage"])
    return LossInputs(o, context, scaling, canonical_loss_scale(loss_scale, context))


def check_objective(o: Objective, context: RowContext, packed: bool) -> None:
    if o.kl is not None and context.ref_logprob is None:
        _checks.fail("ref_logprob", f"a tensor for objective {o.name} with kl", None)
    if (o.importance is not None or o.opsm is not None) and context.rollout_logprob is None:
        _checks.fail("rollout_logprob", "a tensor for importance or opsm", None)
    if o.rule is not None and o.rule.needs_rollout and context.rollout_logprob is None:
        expected = f"a tensor for {o.name} as in the paper (old_logprob, if that policy sampled)"
        _checks.fail("rollout_logprob", expected, None)
    by_sequence = o.level == "sequence" or _sequence_importance(o) or o.opsm is not None
    by_sequence = by_sequence or (o.rule is not None and o.rule.by_sequence)
    if by_sequence and packed and context.segments.cu_seqlens is None:
        _checks.fail("segments", f"cu_seqlens for packed tokens with objective {o.name}", None)
    if o.level == "sequence" and not context.advantage_per_sequence:
        of = f"({context.segments.count(context.advantage)},), for objective {o.name}"
        got = f"shape {tuple(context.advantage.shape)}"
        _checks.fail("advantage", f"one value per sequence, {of}", got)


def _sequence_importance(o: Objective) -> bool:
    return isinstance(o.importance, Importance) and o.importance.level == "sequence"
