"""`sample_controlled`: checks, then one operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from ..speculation.inputs import check_logits, check_mask, row_parameters
from . import sampler_op as _sampler_op  # noqa: F401  (defines the operators)
from .state import ModulationState


@documented
class Sampled(NamedTuple):
    """A token per row, and what its row says about it; each (R,).

    A bad row (see `reasonkern.sample`) has no law: its statistics are -inf.

    Attributes:
        token: int64 the token, -1 where the row has none.
        logprob: float32 of the token, under the law after mask and control at temperature 1,
            unfiltered.
        entropy: float32 nats, of the law that the token is drawn from: after temperature and
            filters. 0 in greedy rows.
        entropy_raw: float32 nats, of the row as it came, at temperature 1. -inf where that has NaN
            or +inf.
        confidence: float32 ``-mean(log p)`` over the 20 most likely tokens, fewer where fewer are
            possible, of the law of `logprob`: large where it is peaked.
        max_prob: float32 largest probability of the law of `logprob`.
        trigger: bool ``entropy`` is above the threshold of the request's `EntropyTrigger`.
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    entropy_raw: Tensor
    confidence: Tensor
    max_prob: Tensor
    trigger: Tensor


def sample_controlled(
    logits: Tensor,
    state: ModulationState | None,
    slot: Tensor | None,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    position: int | Tensor,
    mask: Tensor | None = None,
) -> Sampled:
    """Controls a row, draws its token and describes it, without a copy of the logits.

    The token is that of `reasonkern.sample` on the float32 logits after control. The state is read,
    not written: `reasonkern.commit_` hears of the token, and of ``entropy`` and ``confidence`` for
    the request's windows. Equivalent to::

        z = logits.float().masked_fill(~mask, -inf)
        modulate_logits_(z, state, slot, temperature=temperature, ...)
        token = sample(z, temperature=temperature, ...)
        logprob = z.log_softmax(-1)[token]
        entropy = Categorical(logits=filtered(z / temperature)).entropy()

    Args:
        logits: (R, V) float32, bfloat16, float16 or float64 (read as float32), the last dimension
            contiguous. They are not changed.
        state: a `ModulationState`, or None, with ``slot`` None, for no control.
        slot: (R,) int64 slot of each row's request, -1 = a row without control.
        temperature: as in `reasonkern.sample`.
        top_k: as in `reasonkern.sample`. None = off.
        top_p: as in `reasonkern.sample`. None = off.
        min_p: as in `reasonkern.sample`. None = off.
        seed: as in `reasonkern.sample`.
        position: as in `reasonkern.sample`.
        mask: (R, ceil(V / 32)) int32 bitmask of the allowed tokens; control sees the others as
            -inf. None = every token.

    Returns:
        `Sampled`. A forced row is one of probability 1: its logprob is 0 and its confidence, with
        the other tokens 3e4 below, in the ten thousands.

    Raises:
        ValueError: wrong shape, dtype or device, a state that names an id beyond V; on CPU also a
            parameter out of its range or a slot outside the state.

    Example:
        >>> import torch, reasonkern as rk
        >>> logits = torch.tensor([[0.0, 2.0, 2.0]])
        >>> out = rk.sample_controlled(logits, None, None, temperature=0.0, seed=1, position=0)
        >>> out.token.tolist(), round(out.max_prob.item(), 4), out.entropy.item()
        ([1], 0.4683, 0.0)
    """
    check_logits(logits, 2, "(R, V)")
    rows = row_parameters(logits, temperature, top_k, top_p, min_p, seed, position)
    mask = check_mask("mask", mask, logits)
    slots, storage = control_arguments(state, slot, logits)
    with torch.no_grad():
        return Sampled(*torch.ops.reasonkern.sample_controlled(logits, mask, *rows, slots, storage))


def control_arguments(
    state: ModulationState | None, slot: Tensor | None, logits: Tensor
) -> tuple[Tensor | None, list[Tensor]]:
    """`slot` and `state` of the operators, checked against logits (R, …, V)."""
    if state is None and slot is None:
        return None, []
    if not isinstance(state, ModulationState):
        _checks.fail("state", "a ModulationState beside a slot", type(state).__name__)
    if slot is None:
        _checks.fail("slot", "a (R,) tensor beside a state", None)
    _checks.check_dtype("slot", slot, torch.int64)
    _checks.check_device("slot", slot, logits, "logits")
    _checks.check_shape("slot", slot, logits.shape[:1], "(R,)" if logits.ndim == 2 else "(B,)")
    storage = list(state.tensors)
    _checks.check_device("state", storage[0], logits, "logits")
    _checks.check_range("slot", slot, -1, state.max_requests)
    if state.max_id >= logits.shape[-1]:
        expected = f"a vocabulary that holds the state's ids, up to {state.max_id}"
        _checks.fail("logits", expected, tuple(logits.shape))
    return slot.contiguous(), storage


def check_statistics(state: ModulationState, stats: bool) -> None:
    """Windows cannot be followed along a path whose rows nobody describes."""
    if not stats and state.watches_statistics:
        _checks.fail("stats", "True for requests with a DeepConf or an EntropyTrigger", stats)
