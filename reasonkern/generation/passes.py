"""What a model is asked in one pass: nodes, their positions, and which slots each of them sees."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from ..speculation import DraftTree
from .cache import SlotCache
from .trees import Timings


@documented
class Pass(NamedTuple):
    """One forward pass over N nodes of each of B requests.

    Attributes:
        tokens: (B, N) int64.
        positions: (B, N) int64 position of each node in its text; of drafts that a text has no room
            for, the last one that it has.
        seen: (B, N, S) bool: node n attends to slot s of the cache.
        slot_positions: (B, S) int64 position of what a slot holds; of slots that no node sees,
            anything.
        cache: its ``update`` takes the keys and values of the nodes and returns those of all S
            slots.
        logits: False: only the cache matters, and the result may be anything.
    """

    tokens: Tensor
    positions: Tensor
    seen: Tensor
    slot_positions: Tensor
    cache: SlotCache
    logits: bool


class Model(Protocol):
    """A causal language model, as the decoding loop needs it.

    Attributes:
        vocab_size: columns of its logits.
        device: a ``torch.device``, where it takes its inputs and gives its logits.
        timings: of steps, for ``tree="auto"``: a dict, empty at first, that the loop fills.
    """

    vocab_size: int
    device: torch.device
    timings: Timings

    def __call__(self, given: Pass, /) -> Tensor:
        """Logits (B, N, V) in any floating dtype."""


def logits_of(model: Model, given: Pass) -> Tensor:
    """What the model gives for a pass; logits that the pass asks for are checked."""
    found = model(given)
    if given.logits:
        shape = (*given.tokens.shape, model.vocab_size)
        _checks.check_shape("the model's logits", found, shape, "(B, N, vocab_size)")
    return found


@lru_cache(maxsize=256)
def _tree_mask(tree: DraftTree, device: torch.device) -> Tensor:
    return tree.attention_mask(device)


def tree_pass(
    tokens: Tensor, tree: DraftTree, cache: SlotCache, longest: int, left: Tensor | None = None
) -> Pass:
    """The nodes of a tree whose root is the token behind the committed ones.

    ``left`` (B,): tokens that may still follow, 0 once a text is over: a model with a table of
    positions has none for what is beyond, and never accepted. None = any number.
    """
    mask = _tree_mask(tree, tokens.device)
    depths = tree.tensors(tokens.device).depths
    if left is not None:
        depths = torch.minimum(depths, left[:, None] - 1)
    return _pass(tokens, mask, depths, cache, longest, True)


def prompt_pass(tokens: Tensor, cache: SlotCache, longest: int, logits: bool) -> Pass:
    """Consecutive tokens behind the committed ones."""
    nodes = tokens.shape[1]
    mask = torch.ones(nodes, nodes, dtype=torch.bool, device=tokens.device).tril_()
    depths = torch.arange(nodes, device=tokens.device)
    return _pass(tokens, mask, depths, cache, longest, logits)


def _pass(
    tokens: Tensor, mask: Tensor, depths: Tensor, cache: SlotCache, longest: int, logits: bool
) -> Pass:
    batch, nodes = tokens.shape
    lengths = cache.lengths[:, None]
    slots, every = cache.open(nodes, longest)
    positions = lengths + depths
    seen = (every < lengths)[:, None].expand(batch, nodes, len(every)).contiguous()
    seen.scatter_(2, slots[:, None].expand(batch, nodes, nodes), mask.expand(batch, nodes, nodes))
    slot_positions = every.expand(batch, len(every)).scatter(1, slots, positions)
    return Pass(tokens, positions, seen, slot_positions, cache, logits)
