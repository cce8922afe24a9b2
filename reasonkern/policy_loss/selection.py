"""Token selections that depend on the whole batch, exact, on the device, without a synchronisation.

The k-th largest value comes from a radix select over integers in the order of the floats: two
passes of 16 bits for float32, four for float64, each with one histogram, which ranks add up. There
is no limit on the number of elements (`torch.quantile` refuses more than 2^24).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor, signed
from .parallel import as_groups, gather, total

Groups = Sequence[Any]  # of ranks whose elements form one batch: axes of a mesh
DIGIT = 16
ROUNDING = 2.0**-51  # of a share's binary fraction and its product with a count, at most
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64-bit words
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def high_entropy_mask(
    entropy: Tensor, mask: Tensor, rho: float = 0.2, *, data_group: Any = None
) -> Tensor:
    """The tokens of highest entropy: those with H >= the ceil(rho n)-th largest of the batch.

    "Beyond the 80/20 rule" (arXiv 2506.01939) trains on these alone. Equivalent to, with n trained
    tokens, ``mask & (entropy >= entropy[mask].sort().values[n - ceil(rho * n)])``.
    Ties are kept. TRL interpolates between two order statistics instead, which selects the same
    tokens up to one and its ties.

    Args:
        entropy: per token, any shape, nats; float16 and bfloat16 are compared as float32.
        mask: bool or 0/1, of that shape: the tokens that are trained, n in all.
        rho: share of the tokens in (0, 1], read as the decimal fraction it prints as.
        data_group: process group whose ranks form one batch. None = this process alone.

    Returns:
        bool, of the shape of ``entropy``.

    Raises:
        ValueError: wrong shape or rho; on CPU also NaN in a trained token.

    Example:
        >>> import torch, reasonkern as rk
        >>> rk.high_entropy_mask(torch.tensor([0.1, 2.0, 0.3, 9.0]), torch.tensor([1, 1, 1, 0]))
        tensor([False,  True, False, False])
    """
    trained = trained_rows("entropy", entropy, mask)
    _checks.check_number("rho", rho, 0, 1, exclusive=True)
    _checks.check_finite("entropy", entropy, trained)
    with torch.no_grad():
        return select_high(entropy, trained, rho, as_groups(data_group))


def select_high(entropy: Tensor, trained: Tensor, rho: float, groups: Groups) -> Tensor:
    """`high_entropy_mask` on checked inputs."""
    count = _added(trained.sum(), groups)
    rank = torch.minimum(_part(count, rho).ceil().long(), count)
    return _at_least_kth(entropy, trained, rank, groups)


def covariance_mask(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    mode: str = "clip",
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    candidates: Tensor | None = None,
    seed: int | Tensor = 0,
    data_group: Any = None,
) -> Tensor:
    """The tokens whose covariance of logprob and advantage drives the entropy down (2505.22617).

    cov = (A - mean A) (logp - mean logp), means over the n trained tokens, float64.

    * ``mode="clip"`` (Clip-Cov drops these from the loss): ``max(floor(fraction n), 1)`` tokens
      drawn at random from the candidates with low < cov < high, all of them if there are fewer.
    * ``mode="kl"`` (KL-Cov penalises these): the ``max(floor(fraction n), 1)`` tokens of largest
      covariance; of equal ones the first.

    The paper's means and counts are over the batch, verl's over the micro-batch: pass
    ``data_group`` for the former. verl draws with ``torch.randperm`` and waits for the device; here
    token i gets a key by a hash of (seed, i) and the smallest keys win, so the draw is the same on
    every device, and on ranks the same as on one process over the concatenated tokens.

    Args:
        logprob: of the sampled tokens under the current policy, any shape.
        advantage: per token, of that shape (it may broadcast to it).
        mask: bool or 0/1, of that shape: the tokens that are trained.
        mode: ``clip`` or ``kl``.
        fraction: share of the tokens that is selected, in (0, 1].
        low: lower end of the covariance for ``clip``.
        high: upper end of the covariance for ``clip``.
        candidates: bool, of that shape, for ``clip``: tokens that the ratio has not clipped
            already. None = all trained ones.
        seed: of the draw, an int or a 0-dim int64 tensor; another one each step.
        data_group: process group whose ranks form one batch. None = this process alone.

    Returns:
        bool, of the shape of ``logprob``: the selected tokens.

    Raises:
        ValueError: wrong shape, mode or number; on CPU also nonfinite values in trained tokens.

    Example:
        >>> import torch, reasonkern as rk
        >>> logprob, advantage = torch.tensor([-9.0, -1.0, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
        >>> rk.covariance_mask(logprob, advantage, torch.ones(3), mode="kl")
        tensor([ True, False, False])
    """
    trained = trained_rows("logprob", logprob, mask)
    _checks.check_choice("mode", mode, ("clip", "kl"))
    _checks.check_number("fraction", fraction, 0, 1, exclusive=True)
    _checks.check_number("low", low)
    _checks.check_number("high", high, low)
    advantage = _checks.expanded("advantage", advantage, logprob, "logprob")
    if candidates is not None:
        _checks.check_dtype("candidates", candidates, torch.bool)
        _checks.check_device("candidates", candidates, logprob, "logprob")
        _checks.check_shape("candidates", candidates, logprob.shape, "logprob.shape")
    for name, x in (("logprob", logprob), ("advantage", advantage)):
        _checks.check_finite(name, x, trained)
    check_seed(seed)
    groups = as_groups(data_group)
    with torch.no_grad():
        cov, count = covariance(logprob, advantage, trained, groups)
        if mode == "kl":
            return select_top(cov, trained, count, fraction, groups)
        drawn = trained if candidates is None else trained & candidates
        return draw_between(cov, drawn, count, fraction, low, high, seed, groups)


def check_seed(seed: int | Tensor) -> None:
    """An integer, or a tensor that a captured graph reads anew."""
    if isinstance(seed, Tensor):
        _checks.check_dtype("seed", seed, torch.int64)
        _checks.check_shape("seed", seed, (), "0-dim")
    else:
        _checks.check_seed("seed", seed)


def covariance(
    logprob: Tensor, advantage: Tensor, trained: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """((A - mean A)(logp - mean logp) in float64, number of trained tokens)."""
    lp = torch.where(trained, logprob.double(), 0.0)
    a = torch.where(trained, advantage.double(), 0.0)
    sums = torch.stack((trained.sum().double(), lp.sum(), a.sum()))
    if groups:
        sums = total(sums, *groups)
    count = sums[0]
    mean_lp, mean_a = (sums[1:] / count.clamp_min(1)).unbind()
    return (a - mean_a) * (lp - mean_lp), count.long()


def select_top(
    cov: Tensor, trained: Tensor, count: Tensor, fraction: float, groups: Groups
) -> Tensor:
    """KL-Cov's tokens; where the advantages are equal, so are all covariances."""
    rank = torch.minimum(_share(count, fraction), count)
    keys = ordered_integers(cov)
    kth = kth_largest(keys, trained, rank, 64, groups)
    above, tied = trained & (keys > kth), trained & (keys == kth)
    room = rank - _added(above.sum(), groups)
    place = _offset(tied.sum(), groups) + tied.flatten().cumsum(0)
    return above | (tied & (place <= room).view_as(tied))


def draw_between(
    cov: Tensor,
    candidates: Tensor,
    count: Tensor,
    fraction: float,
    low: float,
    high: float,
    seed: int | Tensor,
    groups: Groups,
) -> Tensor:
    """Clip-Cov's tokens."""
    eligible = candidates & (cov > low) & (cov < high)
    rank = torch.minimum(_share(count, fraction), _added(eligible.sum(), groups))
    keys = random_keys(cov.numel(), seed, cov.device, groups).view(cov.shape)
    return eligible & (keys >= kth_largest(keys, eligible, rank, 64, groups)) & (rank > 0)


def _share(count: Tensor, fraction: float) -> Tensor:
    return _part(count, fraction).floor().long().clamp_min(1)


def _part(count: Tensor, share: float) -> Tensor:
    """The share of a count in float64, whole where that of the decimal fraction is."""
    if not isinstance(share, (int, float)):
        share = float(Fraction(str(share)))  # NumPy's 0.2 in float32 is more than 0.2
    part = count.double() * share
    whole = part.round()
    return torch.where((part - whole).abs() <= ROUNDING * part, whole, part)


def _at_least_kth(x: Tensor, used: Tensor, rank: Tensor, groups: Groups) -> Tensor:
    """Elements >= the rank-th largest used one; none when there is none."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    keys, bits = ordered_integers(x), 8 * x.element_size()
    return used & (keys >= kth_largest(keys, used, rank, bits, groups)) & (rank > 0)


def ordered_integers(x: Tensor) -> Tensor:
    """int64 in the order of float32 or float64 values: negative floats have their bits flipped."""
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = (x + 0.0).contiguous().view(integer)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits).long()


def kth_largest(keys: Tensor, used: Tensor, k: Tensor, bits: int, groups: Groups) -> Tensor:
    """The k-th largest key where ``used``, 0-dim int64, 1 <= k <= how many there are.

    ``keys`` are int64 that fit ``bits`` signed bits. From the top digit down: a histogram of the
    keys that agree so far says which digit the k-th one has.
    """
    keys, used = keys.reshape(-1), used.reshape(-1)
    found = keys.new_zeros(())
    for shift in range(bits - DIGIT, -1, -DIGIT):
        # The top digit carries the sign: shifted to start at 0.
        offset = 1 << (DIGIT - 1) if shift == bits - DIGIT else 0
        digit = ((keys >> shift) + offset) & ((1 << DIGIT) - 1)
        histogram = keys.new_zeros(1 << DIGIT).scatter_add_(0, digit, used.long())
        histogram = _added(histogram, groups)
        at_least = histogram.flip(0).cumsum(0).flip(0)
        chosen = ((at_least >= k).sum() - 1).clamp_min(0)
        k = k - element(at_least, chosen) + element(histogram, chosen)
        used = used & (digit == chosen)
        found = (found << DIGIT) + (chosen - offset)
    return found


def element(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` of a 0-dim index without waiting for it; Inductor compiles no `Tensor.take`."""
    return x.gather(0, index.unsqueeze(0)).squeeze(0)


def random_keys(count: int, seed: int | Tensor, device: torch.device, groups: Groups) -> Tensor:
    """Distinct int64 by a hash of (seed, index); indices go on from rank to rank."""
    index = torch.arange(count, device=device)
    if groups:
        index = index + _offset(torch.full((), count, device=device), groups)
    base = seed.to(index) if isinstance(seed, Tensor) else index.new_full((), signed(int(seed)))
    return _mix(_mix(base + signed(GOLDEN)) + index * signed(GOLDEN))


def uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float64 inside (0, 1) by such a hash: no generator, which a graph cannot hold."""
    return (_shift_right(random_keys(count, seed, device, ()), 12).double() + 0.5) * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    for shift, factor in MIX:
        x = (x ^ _shift_right(x, shift)) * signed(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, shift: int) -> Tensor:
    """Without copies of the sign."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _offset(size: Tensor, groups: Groups) -> Tensor:
    """Sum of sizes on the ranks before this one; the first group's ranks follow each other."""
    offset = torch.zeros_like(size)
    for group in groups:
        sizes = gather(size, group)
        offset = offset + sizes[: torch.distributed.get_rank(group)].sum()
        size = sizes.sum()
    return offset


def _added(counts: Tensor, groups: Groups) -> Tensor:
    """Integers, summed over the ranks in place: their order does not matter."""
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    return counts


def trained_rows(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The checked mask as bools; x is a float tensor of its shape, any."""
    check_tensor(name, x)
    check_tensor("mask", mask)
    _checks.check_dtype(name, x, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    _checks.check_shape("mask", mask, x.shape, f"{name}.shape")
    _checks.check_device("mask", mask, x, name)
    _checks.check_mask("mask", mask)
    return mask != 0
