"""What a model is asked in one pass: nodes, their positions, and which slots each of them sees."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..speculation import DraftTree
from .cache import SlotCache
from .trees import Timings


class Pass(NamedTuple):
    """One forward pass over N nodes of each of B requests."""

    tokens: Tensor
    """(B, N) int64."""
    positions: Tensor
    """(B, N) int64 position of each node in its text."""
    seen: Tensor
    """(B, N, S) bool: node n attends to slot s of the cache."""
    slot_positions: Tensor
    """(B, S) int64 position of what a slot holds; of slots that no node sees, anything."""
    cache: SlotCache
    """Its `update` takes the keys and values of the nodes and returns those of all S slots."""
    logits: bool
    """False: only the cache matters, and the result may be anything."""


class Model(Protocol):
    """A causal language model, as the decoding loop needs it."""

    vocab_size: int
    """Columns of its logits."""
    device: torch.device
    """Where it takes its inputs and gives its logits."""
    timings: Timings
    """Of steps, for ``tree="auto"``: a dict, empty at first, that the loop fills."""

    def __call__(self, given: Pass, /) -> Tensor:
        """Logits (B, N, V) in any floating dtype."""


@lru_cache(maxsize=256)
def _tree_mask(tree: DraftTree, device: torch.device) -> Tensor:
    return tree.attention_mask(device)


def tree_pass(tokens: Tensor, tree: DraftTree, cache: SlotCache, longest: int) -> Pass:
    """The nodes of a tree whose root is the token behind the committed ones."""
    mask = _tree_mask(tree, tokens.device)
    return _pass(tokens, mask, tree.tensors(tokens.device).depths, cache, longest, True)


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
    slots, used = cache.open(nodes, longest)
    every = torch.arange(used, device=tokens.device)
    positions = lengths + depths
    seen = (every < lengths)[:, None].expand(batch, nodes, used).contiguous()
    seen.scatter_(2, slots[:, None].expand(batch, nodes, nodes), mask.expand(batch, nodes, nodes))
    slot_positions = every.expand(batch, used).contiguous().scatter_(1, slots, positions)
    return Pass(tokens, positions, seen, slot_positions, cache, logits)
