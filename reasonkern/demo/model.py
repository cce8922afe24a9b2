"""A small decoder-only transformer; input and output embeddings are tied."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..generation import Pass
from ..generation.trees import Timings

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q, k, v), each (B, heads, T, width of a head) → the same."""


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to itself and to those before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """Causal attention and an MLP, both on a normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """(B, T, width) → the same."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = attend(layer, q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return out


class Transformer(nn.Module):
    """Token ids (B, T) → logits (B, T, V)."""

    def __init__(self, vocabulary: int, window: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(window, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head(self) -> Tensor:
        """(V, width): the embeddings again."""
        return self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, T, V)."""
        return F.linear(self.hidden(ids), self.head)

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, attend: Attend = causal
    ) -> Tensor:
        """(B, T) int64 → (B, T, width), what the head is multiplied with.

        Without positions (B, T) the tokens of a row follow one another from position 0.
        """
        window = self.positions.weight
        x = self.tokens(ids) + (window[: ids.shape[1]] if positions is None else window[positions])
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        out: Tensor = self.norm(x)
        return out

    def parameter_count(self) -> int:
        """Tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())


class Decoding:
    """The model as `reasonkern.generation` asks it: a tree's mask and positions, and a cache."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.vocab_size, self.device = len(model.head), model.head.device
        self.window = len(model.positions.weight)
        self.timings: Timings = {}

    def __call__(self, given: Pass) -> Tensor:
        """Logits (B, N, V)."""
        # What attention would make of a mask of bools, once for all layers.
        seen = given.seen[:, None]
        mask = seen.new_zeros(seen.shape, dtype=self.model.head.dtype)
        mask.masked_fill_(~seen, -torch.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = given.cache.update(k, v, layer)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        hidden = self.model.hidden(given.tokens, given.positions, attend)
        return F.linear(hidden, self.model.head) if given.logits else hidden


def seeded(vocabulary: int, window: int, width: int, layers: int, seed: int) -> Transformer:
    """A model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Transformer(vocabulary, window, width, layers)
