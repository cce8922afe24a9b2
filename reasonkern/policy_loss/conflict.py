"""GTPO's conflict tokens and entropy filter (arXiv 2508.03772)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor

LN_2 = math.log(2.0)


def conflict_token_weights(
    tokens: Tensor,
    advantage: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    amplify: float = 2.0,
    combine: str = "product",
    per_conflict_norm: bool = False,
) -> Tensor:
    """Factors per token that keep completions from pushing a shared start or end both ways.

    The conflict-aware correction of GTPO (arXiv 2508.03772).

    A token conflicts when the same id at the same position occurs in a completion of its group with
    A > 0 and in one with A < 0. Only the unbroken run of conflicts from the first trained token
    counts, with positions counted from it (forward), and the one up to the last trained token,
    with positions counted back from that (backward).
    Of each run, conflicts with A > 0 get the factor ``amplify``, those with A < 0 get 0, all other
    tokens 1. Tokens that are not trained (tool output) keep their position, never match, end the
    run and get 0; completions with A = 0 match nothing and get 1.

    The released code builds a histogram over vocabulary x length per group; the kernel compares
    columns and stops at the end of the run. That code also divides the loss of a completion by its
    number of conflicts (which it counts with the backward run in reversed positions;
    ``per_conflict_norm`` counts the tokens in either run).

    Args:
        tokens: (B, T) ids of the completions, int64 or int32, one per row, padded.
        advantage: (B,); only its sign is used, before `entropy_filter` changes it.
        group: (B,) int64, equal for the completions of one prompt; any order and sizes.
        mask: (B, T) bool or 0/1: the tokens that are trained.
        amplify: factor of conflicts with A > 0.
        combine: ``product`` of the two runs' factors: amplify**2 in both runs (the released code);
            or their ``max``: a token with A < 0 then gets 0 only in both runs.
        per_conflict_norm: divide a completion's factors by its number of conflicts, at least 1.

    Returns:
        float32 (B, T); for ``Objective.gtpo(conflict_weights=…)``.

    Raises:
        ValueError: wrong shape, dtype, number or choice; on CPU also a nonfinite advantage.

    Example:
        >>> import torch, reasonkern as rk
        >>> tokens = torch.tensor([[5, 6, 7, 9], [5, 8, 4, 9]])
        >>> advantage, group = torch.tensor([1.0, -1.0]), torch.tensor([0, 0])
        >>> rk.conflict_token_weights(tokens, advantage, group, torch.ones(2, 4))
        tensor([[2., 1., 1., 2.],
                [0., 1., 1., 0.]])
    """
    _check_inputs(tokens, advantage, group, mask)
    _checks.check_number("amplify", amplify, 0)
    _checks.check_choice("combine", combine, ("product", "max"))
    with torch.no_grad():
        trained = mask != 0
        sign = torch.sign(advantage).long()
        members, spans = _layout(group, trained)
        runs = torch.ops.reasonkern.conflict_runs(
            tokens.long().contiguous(), trained.contiguous(), sign, members, spans
        )
        column = torch.arange(tokens.shape[1], device=tokens.device)
        start, stop, first, last = (
            x.unsqueeze(1) for x in (*spans[:, 2:].unbind(1), *runs.unbind(1))
        )
        forward = trained & (column < start + first)
        backward = trained & (column >= stop - last)
        inside = (sign > 0).float().unsqueeze(1) * float(amplify)
        factors = [torch.where(run, inside, 1.0) for run in (forward, backward)]
        merge = torch.mul if combine == "product" else torch.maximum
        weights = torch.where(trained, merge(*factors), 0.0)
        if per_conflict_norm:
            weights = weights / (forward | backward).sum(1, keepdim=True).clamp_min(1)
    return weights.float()


def _check_inputs(tokens: Tensor, advantage: Tensor, group: Tensor, mask: Tensor) -> None:
    check_tensor("tokens", tokens)
    for name, x in (("advantage", advantage), ("group", group), ("mask", mask)):
        _checks.check_device(name, x, tokens, "tokens")
    for name, x in (("tokens", tokens), ("group", group)):
        _checks.check_dtype(name, x, torch.int64, torch.int32)
    if tokens.ndim != 2:
        _checks.fail("tokens", "shape (B, T)", tuple(tokens.shape))
    for name, x in (("advantage", advantage), ("group", group)):
        _checks.check_shape(name, x, tokens.shape[:1], "(B,)")
    _checks.check_shape("mask", mask, tokens.shape, "tokens.shape")
    _checks.check_mask("mask", mask)
    _checks.check_finite("advantage", advantage)


def _layout(group: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """(rows sorted by group (B,), per row: its group's range there and its trained columns)."""
    ordered, members = group.sort(stable=True)
    begin = torch.searchsorted(ordered, group)
    end = torch.searchsorted(ordered, group, right=True)
    column = torch.arange(trained.shape[1], device=group.device)
    # cat: an empty row of a batch without columns has a maximum, too.
    stop = torch.cat((torch.zeros_like(group)[:, None], (column + 1) * trained), 1).amax(1)
    start = torch.cat((stop[:, None], torch.where(trained, column, trained.shape[1])), 1).amin(1)
    return members, torch.stack((begin, end, start, stop), 1)


def conflict_runs(
    tokens: Tensor, mask: Tensor, sign: Tensor, members: Tensor, spans: Tensor
) -> Tensor:
    """The definition of the operator: lengths of the forward and backward run, (B, 2) int64.

    ``tokens`` (B, T) int64, ``mask`` (B, T) bool, ``sign`` (B,) of the advantage, ``members`` (B,)
    the rows in order of their group, ``spans`` (B, 4): the range of the row's group in ``members``
    and of its trained columns.
    """
    width = tokens.shape[1]
    begin, end, start, stop = (x.unsqueeze(1) for x in spans.unbind(1))
    position = torch.arange(width, device=tokens.device)
    runs = []
    for column in (start + position, stop - 1 - position):
        column = column.clamp(0, max(width - 1, 0))
        token = tokens.gather(1, column)
        trained = mask.gather(1, column) & (position < stop - start)
        conflict = torch.zeros_like(trained)
        others = (x.index_select(0, members) for x in (token, trained, sign))
        for at, (t, valid, s) in enumerate(zip(*others, strict=True)):
            opposite = (sign * s < 0).unsqueeze(1) & (begin <= at) & (at < end)
            conflict |= opposite & valid & (token == t)
        runs.append((conflict & trained).long().cumprod(1).sum(1))
    return torch.stack(runs, 1)


def entropy_filter(
    advantage: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    max_entropy: float = LN_2,
    coef: float = 0.1,
    initial_entropy: float | Tensor | None = None,
) -> Tensor:
    """GTPO's advantage shaping: ``A - coef <H>``, and 0 for completions with <H> > max_entropy.

    <H> is the mean entropy over the trained tokens of a completion, 0 for none. The paper (arXiv
    2508.03772) drops no completion while the model it started from has a mean entropy above ln 2:
    pass that as ``initial_entropy``. The released code has no such branch and compares with 0.7.
    Equivalent to, with ``h = (entropy * mask).sum(1) / mask.sum(1)``:
    ``torch.where(h <= max_entropy, advantage - coef * h, 0)``.

    Args:
        advantage: (B,), floating point.
        entropy: (B, T) nats, from `token_stats` or `policy_loss`.
        mask: (B, T) bool or 0/1: the tokens that are trained.
        max_entropy: mean entropy up to which a completion is kept, nats; ln 2.
        coef: of the mean entropy that is subtracted.
        initial_entropy: mean entropy of the initial policy, a number or 0-dim tensor; above
            ln 2 nothing is dropped. None = drop.

    Returns:
        (B,) shaped advantages, of the dtype of ``advantage``, without a gradient.

    Raises:
        ValueError: wrong shape, dtype or number; on CPU also an entropy of a trained token that is
            not finite (on CUDA its completion is NaN).

    Example:
        >>> import torch, reasonkern as rk
        >>> entropy = torch.tensor([[0.2, 0.4], [0.9, 0.9]])
        >>> rk.entropy_filter(torch.tensor([1.0, 1.0]), entropy, torch.ones(2, 2))
        tensor([0.9700, 0.0000])
    """
    check_tensor("entropy", entropy)
    for name, x in (("advantage", advantage), ("mask", mask)):
        _checks.check_device(name, x, entropy, "entropy")
    if entropy.ndim != 2:
        _checks.fail("entropy", "shape (B, T)", tuple(entropy.shape))
    _checks.check_shape("advantage", advantage, entropy.shape[:1], "(B,)")
    if not advantage.is_floating_point():
        _checks.fail("advantage", "floating point", advantage.dtype)
    _checks.check_shape("mask", mask, entropy.shape, "entropy.shape")
    _checks.check_mask("mask", mask)
    check_filter(max_entropy, coef, initial_entropy)
    trained = mask != 0
    _checks.check_finite("entropy", entropy, trained)
    total = torch.where(trained, entropy.detach().double(), 0.0).sum(1)
    mean = total / trained.sum(1).clamp_min(1)
    kept = filter_keeps(mean, max_entropy, initial_entropy)
    return shape_advantage(advantage.detach(), mean, coef, kept)


def check_filter(max_entropy: float, coef: float, initial_entropy: float | Tensor | None) -> None:
    """The numbers of `entropy_filter`."""
    _checks.check_number("max_entropy", max_entropy, 0)
    _checks.check_number("coef", coef)
    if isinstance(initial_entropy, Tensor):
        check_tensor("initial_entropy", initial_entropy)
        if initial_entropy.ndim:
            shape = tuple(initial_entropy.shape)
            _checks.fail("initial_entropy", "a number or a 0-dim tensor", f"shape {shape}")
    elif initial_entropy is not None:
        _checks.check_number("initial_entropy", initial_entropy, 0)


def shape_advantage(advantage: Tensor, mean_entropy: Tensor, coef: float, kept: Tensor) -> Tensor:
    """The filter for advantages and mean entropies of one shape; `kept` is by `filter_keeps`."""
    shaped = advantage.double() - coef * mean_entropy
    return torch.where(kept, shaped, 0.0).to(advantage.dtype)


def filter_keeps(
    mean_entropy: Tensor, max_entropy: float, initial_entropy: float | Tensor | None
) -> Tensor:
    """Which completions the filter does not drop."""
    # Compared in float32, as entropies are: that of two equal choices is above ln 2 in float64. NaN
    # is no reason to drop: it shows in the result.
    kept = ~(mean_entropy.float() > max_entropy)
    if isinstance(initial_entropy, Tensor):
        return kept | (initial_entropy.to(kept.device) > LN_2)
    # A number made a tensor of a CUDA device would wait for it.
    keeps_all = initial_entropy is not None and initial_entropy > LN_2
    return torch.ones_like(kept) if keeps_all else kept
