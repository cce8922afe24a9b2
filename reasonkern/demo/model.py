"""A small decoder-only transformer; input and output embeddings are tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → the same."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, T, width), what the head is multiplied with."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def parameter_count(self) -> int:
        """Tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def seeded(vocabulary: int, window: int, width: int, layers: int, seed: int) -> Transformer:
    """A model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Transformer(vocabulary, window, width, layers)
