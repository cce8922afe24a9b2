"""The forward of OpenRLHF's actor, from logits to the log-probabilities of actions."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..policy_loss.inputs import Scaling, canonical_logits
from ..policy_loss.paths import statistics
from ._peer import import_peer, require_arguments

TESTED = "0.11"
_models = import_peer("openrlhf.models", TESTED)
_ring = import_peer("openrlhf.models.ring_attn_utils", TESTED)
require_arguments(
    "openrlhf", TESTED, _models.Actor.forward, "sequences", "action_mask", "attention_mask",
    "return_output", "ring_attn_group", "return_entropy",
)  # fmt: skip


def fuse(actor: Any) -> Any:
    """Has an ``openrlhf.models.Actor`` read its logits as they are, and write the gradient there.

    OpenRLHF's own forward makes a float32 copy of the logits, and its backward a float32 gradient.
    This one only reads rows of ``action_mask``; log-probabilities and entropies are 0 elsewhere,
    and ``output.logits`` is None. Calls without ``action_mask`` are OpenRLHF's.

    Returns:
        The actor, whose ``forward`` is replaced.

    Raises:
        ValueError: a vision-language model.
    """
    if getattr(actor, "is_vlm", False):
        _checks.fail("actor", "a language model", "a vision-language model")
    plain = actor.forward

    @functools.wraps(plain)
    def forward(
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        *,
        ring_attn_group: Any = None,
        return_entropy: bool = False,
        **others: Any,
    ) -> Any:
        if action_mask is None:
            return plain(
                sequences, None, attention_mask, return_output, ring_attn_group=ring_attn_group,
                return_entropy=return_entropy, **others,
            )  # fmt: skip
        shape, actions = sequences.shape, action_mask.shape[1]
        # Of the positions before the actions, which predict them.
        mask = F.pad(action_mask != 0, (shape[1] - 1 - actions, 1))
        if actor.packing_samples:
            sequences, positions, targets, padding, indices = _ring.unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            mask, attention_mask = mask.flatten()[indices][None], None
            if ring_attn_group is not None:
                args = (mask, ring_attn_group, False)
                mask, _ = _ring.get_tensor_in_current_ring_attn_rank(*args)
        else:
            assert attention_mask is not None
            targets = sequences.roll(-1, 1)
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = actor.model(sequences, attention_mask=attention_mask, position_ids=positions)
        logits, targets = canonical_logits(output["logits"], targets)
        output["logits"] = None  # the gradient will be there
        scaling = Scaling(None, float(actor.temperature), 0.0)
        rows: Any = statistics(logits, targets, mask.contiguous(), scaling, inplace=True)
        if actor.packing_samples:
            args = (ring_attn_group, padding, indices, *shape)
            rows = (_ring.gather_and_pad_tensor(x, *args) for x in rows)
        logprob, entropy = (x[:, :-1] for x in rows)
        if return_entropy:
            output.entropy = entropy
        logprob = logprob[:, -actions:]
        return (logprob, output) if return_output else logprob

    actor.forward = forward
    return actor
