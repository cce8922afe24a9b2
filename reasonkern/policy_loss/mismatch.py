"""`rollout_mismatch`: how far the inference engine's log-probabilities lie from the trainer's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .inputs import canonical_segments
from .metrics import Metrics, estimators, extent
from .parallel import Parallel, check_parallel
from .selection import trained_rows

CLAMP = 20.0  # of a log-ratio before exp, as `Objective` and verl have it
TOKEN_SUMS = (
    "rows_active", "rows_skipped", "rows_nonfinite", "abs_diff_mean", "kl_k1", "kl_k3",
    "ratio_mean", "square",
)  # fmt: skip
PERPLEXITIES = ("old_ppl", "rollout_ppl", "ppl_ratio", "log_ppl_abs_diff")
SEQUENCE_SUMS = ("sequences", *PERPLEXITIES, "ratio_seq", "square_seq")


@dataclass(frozen=True, eq=False)
class MismatchMetrics(Metrics):
    """What `rollout_mismatch` returns: statistics of the trained tokens, in float64 on the device.

    ``a + b`` merges micro-batches, `all_reduce` merges ranks, `compute` gives the values. Pickling
    leaves process groups behind: `all_reduce` of a copy is given one, unless it is added to metrics
    that have theirs.
    """

    # `flat`: minimum and maximum of old_logprob - rollout_logprob, TOKEN_SUMS, and of known
    # sequences SEQUENCE_SUMS.

    def _merged(self, other: MismatchMetrics) -> Tensor:
        a, b = self.flat, other.flat
        if a.shape != b.shape:
            _checks.fail("metrics", "segments in both or in neither", "them in one")
        low, high = torch.minimum(a[:1], b[:1]), torch.maximum(a[1:2], b[1:2])
        return torch.cat((low, high, a[2:] + b[2:]))

    def compute(self) -> dict[str, Tensor]:
        """0-dim float64 tensors by name; a mean over no tokens is 0 (see ``rows_active``).

        With d = old_logprob - rollout_logprob and r = exp(d), d clamped to +-20 there:

        * ``rows_active``, ``rows_skipped`` (mask 0), ``rows_nonfinite`` (trained, but one of the
          two is not finite: left out of everything else)
        * ``abs_diff_mean``, ``abs_diff_max`` of abs(d)
        * ``kl_k1`` = mean(-d), ``kl_k3`` = mean(r - 1 - d): estimates of KL(engine || trainer), as
          the engine has drawn the tokens
        * ``ratio_mean``, ``ratio_min``, ``ratio_max`` of r
        * ``chi2`` = mean(r^2) - 1 and ``ess_frac`` = mean(r)^2 / mean(r^2)

        Where the sequences are known, means over those with a token in ``rows_active``:

        * ``sequences``, their number
        * ``old_ppl``, ``rollout_ppl``: perplexity exp(-mean of log p), and of the two ``ppl_ratio``
          = exp(-mean d) and ``log_ppl_abs_diff`` = abs(mean d); not clamped, so inf where the mean
          of log p is below -709
        * ``chi2_seq``, ``ess_frac_seq``: as above, of a sequence's product of ratios exp(sum d)
        """
        names = ("low", "high", *TOKEN_SUMS, *SEQUENCE_SUMS)
        s = dict(zip(names, self.flat.unbind(), strict=False))
        n = s["rows_active"]
        per_row = 1 / n.clamp_min(1)
        out = {name: s[name] for name in ("rows_active", "rows_skipped", "rows_nonfinite")}
        for name in ("abs_diff_mean", "kl_k1", "kl_k3", "ratio_mean"):
            out[name] = s[name] * per_row
        out["abs_diff_max"] = torch.where(n > 0, torch.maximum(-s["low"], s["high"]), 0.0)
        for name, end in (("ratio_min", s["low"]), ("ratio_max", s["high"])):
            out[name] = torch.where(n > 0, _ratio(end), 0.0)
        out["chi2"], out["ess_frac"] = _spread(n, s["ratio_mean"], s["square"])
        if "sequences" in s:
            n = out["sequences"] = s["sequences"].round()  # of shares that add up to 1 each
            for name in PERPLEXITIES:
                out[name] = s[name] / n.clamp_min(1)
            out["chi2_seq"], out["ess_frac_seq"] = _spread(n, s["ratio_seq"], s["square_seq"])
        return out


def rollout_mismatch(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    mask: Tensor,
    *,
    segments: Tensor | None = None,
    parallel: Parallel | None = None,
) -> MismatchMetrics:
    """How far the engine that sampled the tokens lies from the trainer, to be plotted.

    Kernels, precisions and weights that differ make an inference engine give a token another
    probability than the trainer does, which makes the training off-policy, and is a common cause of
    its collapse (https://richardli.xyz/rl-collapse). Equivalent to, for some of them::

        d = (old_logprob.double() - rollout_logprob.double())[mask]
        abs_diff_mean, abs_diff_max = d.abs().mean(), d.abs().max()
        kl_k1, kl_k3 = -d.mean(), (d.exp() - 1 - d).mean()
        ratio_mean, chi2 = d.exp().mean(), (2 * d).exp().mean() - 1

    and so on: `MismatchMetrics.compute` lists them. They have other names elsewhere: TRL's
    ``sampling/sampling_logp_difference/{mean,max}``, slime's ``train_rollout_logprob_abs_diff``
    (``abs_diff_*``), and ``kl``, ``k3_kl``, ``chi2_token``, ``training_ppl``, ``rollout_ppl``,
    ``ppl_ratio``, ``log_ppl_abs_diff``, ``chi2_seq`` of verl's ``compute_offpolicy_metrics``.
    Nothing waits for the device.

    Args:
        old_logprob: the trainer's log-probabilities of the sampled tokens, (B, T) padded or (N,)
            packed, of the weights that the engine had.
        rollout_logprob: the engine's, of that shape, at the same temperature: that of `Sampled` and
            `Verified` is 1.
        mask: bool or 0/1, of that shape: the tokens that are trained.
        segments: ``cu_seqlens`` (S + 1,) of packed tokens. None = the rows of padded tokens; of
            packed ones the sequences are not known, and their values left out.
        parallel: a sequence is all of its pieces on the ranks of its ``segment_group``, and
            ``all_reduce()`` merges over that and ``data_group``. Every rank must make the call.
            None = whole sequences, and all ranks.

    Returns:
        `MismatchMetrics`, which add up over micro-batches: ``sum(metrics).compute()``.

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also a mask with other values than 0 and 1
            and segments that are no offsets. Values that are not finite are counted.

    Example:
        >>> import torch, reasonkern as rk
        >>> old, rollout = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
        >>> found = rk.rollout_mismatch(old, rollout, torch.tensor([[1, 1, 0]])).compute()
        >>> round(found["abs_diff_mean"].item(), 4), round(found["ratio_max"].item(), 4)
        (0.25, 1.6487)
    """
    for name, x in (("old_logprob", old_logprob), ("rollout_logprob", rollout_logprob)):
        trained = trained_rows(name, x, mask)
    if mask.ndim not in (1, 2):
        _checks.fail("mask", "shape (B, T) or (N,)", tuple(mask.shape))
    check_parallel(parallel)
    packed = mask.ndim == 1
    trained, old, rollout = (
        x.unsqueeze(0) if packed else x for x in (trained, old_logprob, rollout_logprob)
    )
    of = canonical_segments(segments, trained, packed, parallel, "mask")
    with torch.no_grad():
        used = trained & torch.isfinite(old) & torch.isfinite(rollout)
        old, rollout = (torch.where(used, x.double(), 0.0) for x in (old, rollout))
        d = old - rollout
        r, (k1, _, k3) = _ratio(d), estimators(d, CLAMP)
        columns = [used, ~trained, trained & ~used, d.abs(), k1, k3]
        columns += [torch.where(used, x, 0.0) for x in (r, r * r)]
        if of.cu_seqlens is not None or not packed:
            length = of.sum(used).clamp_min(1)
            log_p, log_q, w = of.sum(old) / length, of.sum(rollout) / length, _ratio(of.sum(d))
            gap = log_q - log_p
            perplexities = (-log_p).exp(), (-log_q).exp(), gap.exp(), gap.abs()
            values = (torch.ones_like(d), *perplexities, w, w * w)
            # Each token carries its share, so a sequence counts once, in however many pieces.
            columns += [torch.where(used, x / length, 0.0) for x in values]
        sums = torch.stack([x.double() for x in columns]).flatten(1).sum(-1)
        return MismatchMetrics(torch.cat((extent(d, used), sums)), parallel)


def _ratio(d: Tensor) -> Tensor:
    return d.clamp(-CLAMP, CLAMP).exp()


def _spread(n: Tensor, r: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(chi2, ess_frac) of n ratios with the sums r and square; 0 of none."""
    mean, mean_square = r / n.clamp_min(1), square / n.clamp_min(1)
    some = n > 0
    return torch.where(some, mean_square - 1, 0.0), torch.where(some, mean**2 / mean_square, 0.0)
