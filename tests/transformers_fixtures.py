"""Tiny random models of transformers, in float64, and what the tests of generation share."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch

import reasonkern as rk

VOCAB, NEW, T = 48, 40, 0.2
LEAST = 1.3  # tokens per step below which a test of speculation tests nothing
TREE = rk.DraftTree.default(24)
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 12}),
    "qwen2, one layer with a window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
}  # fmt: skip
LETTERS = "!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"  # of the tokenizer, one per id
# Left-padded: rows of 9, 4, 1 and 6 tokens.
IDS = torch.randint(1, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(9) >= torch.tensor([0, 5, 8, 3])[:, None]).long()


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module")
def ours(transformers: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.transformers")


@pytest.fixture(scope="module")
def make(transformers: ModuleType) -> Any:
    models: dict[Any, Any] = {}

    def build(kind: str = "qwen3", attention: str = "sdpa", dtype: torch.dtype = torch.float64):
        key = kind, attention, dtype
        if key not in models:
            family, changes = KINDS[kind]
            config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
            config._attn_implementation = attention
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # logits that are not all alike, and depend on the context
                    scale = 0.5 if "lm_head" in name else 0.25
                    torch.nn.init.normal_(parameter, std=scale)
            models[key] = model.to(dtype)
        return models[key]

    return build


@pytest.fixture(scope="module")
def tokenizer(transformers: ModuleType) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: i for i, letter in enumerate(LETTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!")


def taught(ours: ModuleType, model: Any, temperature: float = T) -> rk.NgramTable:
    """A table that has seen other trajectories of the prompts."""
    table = rk.NgramTable(1 << 14, vocab_size=VOCAB)
    ours.generate(
        model, IDS, attention_mask=MASK, temperature=temperature, max_new_tokens=NEW, seed=99,
        num_trajectories=16, table=table, tree=rk.DraftTree.default(8),
    )  # fmt: skip
    return table
