"""Along the tokens of a row: `gae`, `length_adaptive_lambda`, `tppo_masks`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .groups import check_flags, check_length, wide

BOOTSTRAPS = ("zero", "last", "given")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor,
    lam_value: float | Tensor | None = None,
    bootstrap: str = "zero",
    bootstrap_value: Tensor | None = None,
    truncated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of generalised advantage estimation (arXiv 1506.02438).

    ``A_t = sum_i (gamma lam)^i delta_(t+i)`` with ``delta_t = r_t + gamma V_(t+1) - V_t`` over the
    tokens that count; the targets are ``A_t + V_t`` with ``lam_value`` in place of ``lam``
    (decoupled GAE of VC-PPO, 2503.01491, and VAPO, 2504.05118). Equivalent to, for each row::

        carry, following = 0.0, bootstrap
        for t in reversed(mask.nonzero()[:, 0]):
            carry = reward[t] + gamma * following - value[t] + gamma * lam * carry
            following, advantage[t] = value[t], carry

    Masked tokens (tool outputs, padding) are not read and hand the state on, as in verl, whose
    advantages there are the carried ones; here they are 0. No gradient: both are targets.

    Args:
        reward: (B, T), float32, float64, bfloat16 or float16. A reward at a masked token is not
            read: put the outcome on a token that counts.
        value: (B, T), same dtype as ``reward``.
        mask: (B, T) bool or 0/1 numbers, 1 = the token counts; None = all.
        gamma: discount in [0, 1].
        lam: λ in [0, 1], a number or one per row (B,) (`length_adaptive_lambda`).
        lam_value: λ of the targets, a number or (B,); None = ``lam``. T-PPO, VC-PPO and VAPO: 1.
        bootstrap: V after the last token: "zero"; "last", the V of the last token itself, the
            EGAE of T-PPO (arXiv 2506.15050), so that the last delta is r + (gamma - 1) V; or
            "given", from ``bootstrap_value``.
        bootstrap_value: (B,), for "given" only.
        truncated: (B,) bool, rows that are bootstrapped, the others end with V = 0; None = all.

    Returns:
        (advantage, returns), both (B, T), float32 (float64 for float64 rewards), 0 at masked
        tokens. Not whitened.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown bootstrap, numbers outside [0, 1]; on
            CPU also a mask with other values than 0 and 1.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import gae
        >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), lam=0.5)[0]
        tensor([[0.1250, 0.2500, 0.5000]])
    """
    _check_rows(reward, value, mask)
    _checks.check_number("gamma", gamma, 0, 1)
    _check_end(reward, bootstrap, bootstrap_value, truncated)
    dtype = torch.float64 if reward.dtype == torch.float64 else torch.float32
    number, row_lam = number_value, row_lam_value = _lambda("lam", lam, reward, dtype)
    if lam_value is not None:
        number_value, row_lam_value = _lambda("lam_value", lam_value, reward, dtype)
    rows = [x.detach().to(dtype) for x in (reward, value)]
    out: tuple[Tensor, Tensor] = torch.ops.reasonkern.gae(
        *(x if x.stride(1) == 1 else x.contiguous() for x in rows),
        None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).contiguous(),
        row_lam,
        row_lam_value,
        None if bootstrap_value is None else bootstrap_value.detach().to(dtype).contiguous(),
        None if truncated is None else truncated.contiguous(),
        float(gamma),
        number,
        number_value,
        bootstrap == "last",
    )
    return out


def _check_rows(reward: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if check_tensor("reward", reward).ndim != 2:
        _checks.fail("reward", "shape (B, T)", tuple(reward.shape))
    _checks.check_dtype("reward", reward, *FLOATS)
    _checks.check_dtype("value", value, reward.dtype)
    _check_beside("value", value, reward, reward.shape)
    if mask is not None:
        _check_beside("mask", mask, reward, reward.shape)
        _checks.check_mask("mask", mask)


def _check_end(
    reward: Tensor, bootstrap: str, bootstrap_value: Tensor | None, truncated: Tensor | None
) -> None:
    _checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    if (bootstrap == "given") != (bootstrap_value is not None):
        expected = "a tensor" if bootstrap == "given" else "None"
        _checks.fail("bootstrap_value", f"{expected} for bootstrap={bootstrap!r}", bootstrap_value)
    if bootstrap_value is not None:
        _check_beside("bootstrap_value", bootstrap_value, reward, reward.shape[:1])
    if truncated is not None:
        _checks.check_dtype("truncated", truncated, torch.bool)
        _check_beside("truncated", truncated, reward, reward.shape[:1])


def _check_beside(
    name: str, x: Tensor, first: Tensor, shape: torch.Size, first_name: str = "reward"
) -> None:
    _checks.check_shape(name, x, shape, "(B, T)" if len(shape) == 2 else "(B,)")
    _checks.check_device(name, x, first, first_name)


def _lambda(
    name: str, lam: float | Tensor, reward: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """(number, tensor): the operator takes the tensor if there is one."""
    if not isinstance(lam, Tensor):
        _checks.check_number(name, lam, 0, 1)
        return float(lam), None
    _check_beside(name, lam, reward, reward.shape[:1])
    if _checks.reads_values(lam) and not all(0 <= x <= 1 for x in _checks.extremes(lam)):
        _checks.check_all(name, lam, (lam >= 0) & (lam <= 1), "values in [0, 1]")
    return 0.0, lam.detach().to(dtype).contiguous()


def length_adaptive_lambda(length: Tensor, alpha: float = 0.05) -> Tensor:
    """λ = 1 - 1 / (alpha L), at least 0: a longer answer looks further ahead (VAPO, 2504.05118).

    Equivalent to ``(1 - 1 / (alpha * length)).clamp(min=0)``; Enigmata trains with it.

    Args:
        length: tokens of each answer, (B,), any dtype; 0 gives λ = 0.
        alpha: the larger, the closer λ is to 1.

    Returns:
        (B,) float32, for ``gae(lam=…)``.

    Raises:
        ValueError: no tensor of one dimension, or alpha not above 0; on CPU also a length that is
            negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import length_adaptive_lambda
        >>> length_adaptive_lambda(torch.tensor([10, 40, 400]))
        tensor([0.0000, 0.5000, 0.9500])
    """
    if check_tensor("length", length).ndim != 1:
        _checks.fail("length", "shape (B,)", tuple(length.shape))
    check_length(length)
    _checks.check_number("alpha", alpha, 0.0, exclusive=True)
    return (1 - 1 / (alpha * wide(length))).clamp_min(0).float()


def tppo_masks(
    mask: Tensor,
    generated_this_step: Tensor,
    finished: Tensor,
    *,
    truncated: Tensor | None = None,
    drop_tail: int = 0,
) -> tuple[Tensor, Tensor]:
    """Which tokens train the policy and which the value function in T-PPO (arXiv 2506.15050).

    The policy trains on tokens of the current window only, the value function on finished
    trajectories only, over all their tokens. Equivalent to, for ``drop_tail=0``::

        policy, value = mask & generated_this_step, mask & finished[:, None]

    Args:
        mask: (B, T) bool, tokens of the response that count.
        generated_this_step: (B, T) bool, tokens of the current window.
        finished: (B,) bool, trajectories that have ended.
        truncated: (B,) bool, trajectories cut at the end of the window; None = ``~finished``.
        drop_tail: the last tokens of a truncated row that the policy leaves out: their advantage
            has the highest variance. The paper discards such tokens but its number is not known.

    Returns:
        (policy mask, value mask), both (B, T) bool.

    Raises:
        ValueError: wrong shape, dtype or device, or a negative ``drop_tail``.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import tppo_masks
        >>> every, window = torch.ones(1, 4).bool(), torch.tensor([[False, False, True, True]])
        >>> policy, value = tppo_masks(every, window, torch.tensor([False]), drop_tail=1)
        >>> policy, value.any()
        (tensor([[False, False,  True, False]]), tensor(False))
    """
    if check_tensor("mask", mask).ndim != 2:
        _checks.fail("mask", "shape (B, T)", tuple(mask.shape))
    _checks.check_dtype("mask", mask, torch.bool)
    _check_beside("generated_this_step", generated_this_step, mask, mask.shape, "mask")
    _checks.check_dtype("generated_this_step", generated_this_step, torch.bool)
    check_flags("finished", finished)
    _check_beside("finished", finished, mask, mask.shape[:1], "mask")
    if truncated is not None:
        check_flags("truncated", truncated, finished, "finished")
    _checks.check_integer("drop_tail", drop_tail, 0)
    policy = mask & generated_this_step
    if drop_tail:
        cut = ~finished if truncated is None else truncated
        from_end = mask.flip(1).cumsum(1).flip(1)  # 1 for the last token of the row
        policy &= ~(cut[:, None] & (from_end <= drop_tail))
    return policy, mask & finished[:, None]
