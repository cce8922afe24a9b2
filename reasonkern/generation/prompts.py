"""Prompts: once per distinct one, in chunks, and the table learns from all of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..speculation import NgramTable, table_inputs
from .cache import SlotCache
from .passes import Model, logits_of, prompt_pass

if TYPE_CHECKING:
    from .loop import Request

CHUNK = 512  # tokens of a prompt per pass
LOGITS = 1 << 26  # at most so many at a time: 256 MiB in fp32


def read(
    model: Model, requests: Sequence[Request], table: NgramTable | None, scope: Tensor
) -> SlotCache:
    """The cache of the requests, all tokens but the last in it: the first step's root is that one.

    Equal prompts are computed once. The table learns the model's output after each token; logits
    exist for a chunk at a time.
    """
    found: dict[tuple[int, ...], int] = {}
    rows = [found.setdefault(tuple(r.text), len(found)) for r in requests]
    first = [rows.index(row) for row in range(len(found))]
    lengths = [len(prompt) - 1 for prompt in found]
    device, total = model.device, max(lengths)
    cache = SlotCache(len(found), device)
    padded = [[*prompt, *(0,) * (total + 1 - len(prompt))] for prompt in found]
    tokens = torch.tensor(padded, device=device)[:, :total]
    ends = torch.tensor(lengths, device=device)
    scope = scope[torch.tensor(first, device=device)]
    chunk = CHUNK
    if table is not None:
        chunk = max(1, min(CHUNK, LOGITS // (len(found) * model.vocab_size)))
    for begin in range(0, total, chunk):
        part = tokens[:, begin : begin + chunk]
        logits = logits_of(model, prompt_pass(part, cache, begin, table is not None))
        if table is not None:
            _learn(table, tokens, ends, begin, logits, scope)
        # What was written behind the end of a shorter prompt is not kept.
        cache.lengths = torch.minimum(ends, cache.lengths + part.shape[1])
    cache.take(torch.tensor(rows, device=device))
    return cache


def _learn(
    table: NgramTable, tokens: Tensor, ends: Tensor, begin: int, logits: Tensor, scope: Tensor
) -> None:
    """The logits (D, C, V) are the model's output after tokens[:, begin : begin + C]."""
    count, width = logits.shape[1], table.orders[0]
    windows = pad(tokens, (width - 1, 0), value=-1).unfold(1, width, 1)[:, begin : begin + count]
    inside = torch.arange(begin, begin + count, device=tokens.device) < ends[:, None]
    context = windows.where(inside[..., None], -1).flatten(0, 1)
    ids, values, lse = table_inputs.laws_of(table, logits.flatten(0, 1))
    table.update(context, ids, values, lse=lse, scope=scope.repeat_interleave(count))


def scopes_of(prompts: Sequence[Sequence[int]], table: NgramTable) -> list[int]:
    """A scope for each distinct prompt: the same one in every call, by a hash of its tokens.

    Prompts of one call never share a scope, as long as there are enough of them.
    """
    found: dict[tuple[int, ...], int] = {}
    for prompt in map(tuple, prompts):
        if prompt in found:
            continue
        digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=8).digest()
        scope = int.from_bytes(digest, "little") % table.max_scopes
        taken = set(found.values())
        while scope in taken and len(taken) < table.max_scopes:
            scope = (scope + 1) % table.max_scopes
        found[prompt] = scope
    return [found[tuple(prompt)] for prompt in prompts]
