"""`token_weights`: every aggregation mode of the trainers as one weight per token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .inputs import PADDED, canonical_segments
from .parallel import Parallel, check_parallel, total

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
# The arguments that are a mode's normaliser; the others would be ignored.
NORMALISERS = {
    "token-mean": ("num_tokens",),
    "seq-mean-token-mean": ("num_sequences",),
    "seq-mean-token-sum": ("num_sequences",),
    "constant": ("num_sequences", "max_length"),
}


def token_weights(
    mask: Tensor,
    mode: str = "token-mean",
    *,
    segments: Tensor | None = None,
    max_length: int | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    data_parallel_size: int = 1,
    count_empty: bool = True,
    parallel: Parallel | None = None,
) -> Tensor:
    """Weights w such that ``sum(w * token_loss)`` is the loss in the given aggregation mode.

    ========================  ==============================================  ==================
    mode                      loss                                            used by
    ========================  ==============================================  ==================
    ``token-mean``            sum(mask * l) / num_tokens                      DAPO, BNPO
    ``seq-mean-token-mean``   mean over sequences of sum(mask * l) / length   GRPO, SAPO
    ``seq-mean-token-sum``    mean over sequences of sum(mask * l)            RLOO, LUSPO
    ``constant``              sum(mask * l) / (num_sequences * max_length)    Dr.GRPO
    ========================  ==============================================  ==================

    Args:
        mask: bool or 0/1 numbers, (B, T) padded or (N,) packed; True = the token is trained.
        mode: one of the table.
        segments: ``cu_seqlens`` (S + 1,) for packed tokens; needed by the sequence modes.
        max_length: L_max of mode ``constant``, for it alone; default T of a padded mask, which
            micro-batches cut to their longest sequence do not share.
        num_tokens: normaliser of ``token-mean``, for it alone, a number or 0-dim tensor: the
            trained tokens of the whole accumulation window over all ranks. Default: those of this
            mask.
        num_sequences: likewise for the three other modes. Default: the sequences of this mask.
        data_parallel_size: weights are multiplied by it, because DDP and FSDP average gradients.
        count_empty: whether a sequence without trained tokens counts in the default
            ``num_sequences`` (TRL counts it, verl does not).
        parallel: the default ``num_tokens`` and ``num_sequences`` are those of all ranks of its
            ``data_group``, and with a ``segment_group`` the mask holds pieces of sequences, whose
            tokens and lengths are summed over it. Every rank must make the call.

    Returns:
        float32 tensor of the mask's shape. An empty sequence or an all-masked batch gives zeros.

    Raises:
        ValueError: unknown mode, missing ``segments`` or ``max_length`` (always needed with a
            ``segment_group``), wrong shape or number, the normaliser of another mode; on CPU also a
            mask with other values than 0 and 1.

    Example:
        >>> import torch, reasonkern as rk
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> rk.token_weights(mask, "seq-mean-token-mean")
        tensor([[0.2500, 0.2500, 0.0000],
                [0.5000, 0.0000, 0.0000]])
    """
    _checks.check_choice("mode", mode, MODES)
    check_tensor("mask", mask)
    _checks.check_mask("mask", mask)
    if mask.ndim not in (1, 2):
        _checks.fail("mask", "shape (B, T) or (N,)", tuple(mask.shape))
    _checks.check_integer("data_parallel_size", data_parallel_size, 1)
    if max_length is not None:
        _checks.check_number("max_length", max_length, 0, exclusive=True)
    for name, value in (("num_tokens", num_tokens), ("num_sequences", num_sequences)):
        if isinstance(value, Tensor):
            _checks.check_device(name, value, mask, "mask")
            if value.ndim:
                _checks.fail(name, "a number or a 0-dim tensor", f"shape {tuple(value.shape)}")
        elif value is not None:
            _checks.check_number(name, value, 0, exclusive=True)
    _check_normalisers(mode, max_length, num_tokens, num_sequences)
    check_parallel(parallel)
    if segments is not None and mask.ndim == 2:
        _checks.fail("segments", PADDED, "cu_seqlens")
    trained = (mask if mask.ndim == 2 else mask.unsqueeze(0)) != 0
    if mode == "token-mean":
        if num_tokens is None:
            num_tokens = count(trained.sum(), parallel)
        weights = _share(trained, num_tokens)
    else:
        weights = _sequence_weights(
            trained, mask.ndim == 1, mode, segments, max_length, num_sequences, count_empty,
            parallel,
        )  # fmt: skip
    return (weights * data_parallel_size).float().reshape(mask.shape)


def _check_normalisers(mode: str, max_length: object, tokens: object, sequences: object) -> None:
    given = {"max_length": max_length, "num_tokens": tokens, "num_sequences": sequences}
    own = NORMALISERS[mode]
    for name, value in given.items():
        if value is not None and name not in own:
            _checks.fail(name, f"None in mode {mode}, which takes {' and '.join(own)}", value)


def count(x: Tensor, parallel: Parallel | None) -> Tensor:
    """Sum of a 0-dim count over the ranks with other rows."""
    return x if parallel is None else total(x, parallel.segment_group, parallel.data_group)


def _share(trained: Tensor, total: float | Tensor) -> Tensor:
    """1 / total where trained; a window without a trained token has total 0 and weights 0."""
    return torch.where(trained, trained.double() / total, 0.0)


def _sequence_weights(
    trained: Tensor,
    packed: bool,
    mode: str,
    cu_seqlens: Tensor | None,
    max_length: int | None,
    num_sequences: float | Tensor | None,
    count_empty: bool,
    parallel: Parallel | None,
) -> Tensor:
    if packed and cu_seqlens is None:
        _checks.fail("segments", f"cu_seqlens for packed tokens in mode {mode}", None)
    segments = canonical_segments(cu_seqlens, trained, packed, parallel, "mask")
    length = segments.sum(trained)
    if num_sequences is None and count_empty:
        num_sequences = float(segments.count(trained))
        if parallel is not None:  # pieces of one sequence count once
            num_sequences = total(length.new_full((), num_sequences), parallel.data_group)
    elif num_sequences is None:
        # Each trained token carries 1 / length of its sequence, so a non-empty one adds up to 1.
        num_sequences = count((trained / length.clamp_min(1)).sum(), parallel).round()
    weights = _share(trained, num_sequences)
    if mode == "seq-mean-token-mean":
        weights = weights / length.clamp_min(1)
    if mode == "constant":
        if max_length is None and (packed or segments.is_pieces):
            of = "packed tokens" if packed else "pieces of sequences"
            _checks.fail("max_length", f"L_max for {of} in mode constant", None)
        weights = weights / (trained.shape[-1] if max_length is None else max_length)
    return weights
