"""Decisions between steps: where a sequence forks, which of two answers a position holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..speculation.inputs import INTEGERS, LOGITS_DTYPES


def entropy_forks(entropy: Tensor, mask: Tensor, n: int) -> Tensor:
    """The n most uncertain positions of each sequence: where ETTRL's trees fork (2508.11356).

    The paper's ETMR samples M responses in full and B continuations from the prefix before each of
    the N positions, M(1 + B·N) rollouts in all; N = 3, B = 2 cost about 60 % of as many full ones.
    Equivalent to, without ties::

        entropy.masked_fill(~mask, -torch.inf).topk(n).indices

    Args:
        entropy: (B, T) of the tokens, as from `token_stats` or the sampler, any floating dtype.
        mask: (B, T) bool, the positions that may fork: no prompt, no padding.
        n: positions per sequence, in [0, 2^31).

    Returns:
        (B, n) int64, the largest entropy first; equal ones: the earlier position. A sequence with
        fewer than n positions ends in -1.

    Raises:
        ValueError: wrong shape, dtype or device, n out of range; on CPU an entropy under the mask
            that is not finite (on CUDA NaN counts as the largest).

    Example:
        >>> import torch, reasonkern as rk
        >>> entropy = torch.tensor([[0.1, 2.0, 0.5, 2.0], [9.0, 0.1, 0.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True, True], [False, True, False, False]])
        >>> rk.entropy_forks(entropy, mask, 2)
        tensor([[ 1,  3],
                [ 1, -1]])
    """
    _checks.check_dtype("entropy", entropy, *LOGITS_DTYPES)
    if entropy.ndim != 2:
        _checks.fail("entropy", "shape (B, T)", tuple(entropy.shape))
    _checks.check_shape("mask", mask, entropy.shape, "entropy.shape")
    _checks.check_dtype("mask", mask, torch.bool)
    _checks.check_device("mask", mask, entropy, "entropy")
    if not _checks.is_integer(n) or not 0 <= n < 1 << 31:
        _checks.fail("n", "an integer in [0, 2^31)", repr(n))
    _checks.check_finite("entropy", entropy, mask, "finite values under the mask")
    # Sorted rather than topk: which of two equal entropies topk returns is not defined.
    order = (
        entropy.detach().masked_fill(~mask, -torch.inf).sort(stable=True, descending=True).indices
    )
    forks = torch.where(mask.gather(1, order), order, -1)[:, :n]
    return torch.nn.functional.pad(forks, (0, n - forks.shape[1]), value=-1)


def completion_probe(
    logits: Tensor,
    slot: Tensor,
    ids_a: Sequence[int] | Tensor,
    ids_b: Sequence[int] | Tensor,
) -> Tensor:
    """Difference log p(A) - log p(B) of two answers at each row, from the logits of the step.

    Solve-Detect-Verify (2505.11966) asks at a hesitation word whether the solution is complete, and
    compares the log-probabilities of "yes" and "no". The softmax's normaliser cancels, so only the
    logits of the named ids are read. Equivalent to, for ids that all requests share::

        logp = logits.float().log_softmax(-1)
        logp[:, ids_a].logsumexp(-1) - logp[:, ids_b].logsumexp(-1)

    Args:
        logits: (R, V), float32, bfloat16, float16 or float64, at T = 1.
        slot: (R,) int64 or int32, the request of each row; -1 = padding row.
        ids_a: token ids of answer A (spellings of "yes", say), whose probabilities are added: a
            sequence for all requests, or a tensor (S, K) with a row per slot, filled up with -1.
        ids_b: those of answer B, likewise.

    Returns:
        (R,) float32 (float64 for float64 logits): positive where A is likelier. NaN for padding
        rows and where neither answer has a finite logit; ±inf where one has none.

    Raises:
        ValueError: wrong shape, dtype or device, no id or an id twice in a sequence; on CPU also
            ids outside [0, V) and slots outside [-1, S).

    Example:
        >>> import torch, reasonkern as rk
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
        >>> rk.completion_probe(logits, torch.tensor([0, -1]), ids_a=[0], ids_b=[2])
        tensor([1., nan])
    """
    _checks.check_dtype("logits", logits, *LOGITS_DTYPES)
    if logits.ndim != 2:
        _checks.fail("logits", "shape (R, V)", tuple(logits.shape))
    _checks.check_shape("slot", slot, logits.shape[:1], "(R,)")
    _checks.check_dtype("slot", slot, *INTEGERS)
    _checks.check_device("slot", slot, logits, "logits")
    a, b = (_answer(logits, slot, name, ids) for name, ids in (("ids_a", ids_a), ("ids_b", ids_b)))
    return torch.where(slot < 0, torch.nan, a - b)


def _answer(logits: Tensor, slot: Tensor, name: str, ids: Sequence[int] | Tensor) -> Tensor:
    """Log of the sum of the ids' exponentials, by row."""
    table = _id_table(name, ids, logits)
    _checks.check_range(name, table, -1 if isinstance(ids, Tensor) else 0, logits.shape[1])
    high = table.shape[0] if isinstance(ids, Tensor) else torch.iinfo(slot.dtype).max
    _checks.check_range("slot", slot, -1, high)
    row = slot.clamp_min(0) if isinstance(ids, Tensor) else torch.zeros_like(slot)
    chosen = table[row]
    z = logits.gather(1, chosen.clamp_min(0))
    z = z if z.dtype == torch.float64 else z.float()
    return z.masked_fill(chosen < 0, -torch.inf).logsumexp(-1)


def _id_table(name: str, ids: Sequence[int] | Tensor, logits: Tensor) -> Tensor:
    """(S, K) int64; a sequence is one row."""
    if isinstance(ids, Tensor):
        if ids.ndim != 2 or ids.shape[1] == 0:
            _checks.fail(name, "a sequence of ids, or a tensor (S, K), K >= 1", tuple(ids.shape))
        _checks.check_dtype(name, ids, *INTEGERS)
        _checks.check_device(name, ids, logits, "logits")
        return ids.to(torch.int64)
    if not isinstance(ids, Sequence) or not all(map(_checks.is_integer, ids)):
        _checks.fail(name, "a sequence of token ids", repr(ids))
    listed = list(ids)
    if not listed or len(set(listed)) < len(listed):
        _checks.fail(name, "one id or more, each once", listed)
    return _checks.filled(listed, logits.device).unsqueeze(0)
