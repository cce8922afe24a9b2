"""OpenRLHF's own code on a CPU, without DeepSpeed, flash-attn, PEFT and vLLM.

What it imports of them has a stand-in while it is imported, and for unpadding the few lines that
flash-attn has in Python. Nothing else of them runs in these tests.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = (
    "aiohttp", "deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero",
    "deepspeed.runtime.zero.partition_parameters", "flash_attn", "flash_attn.bert_padding",
    "flash_attn.utils", "flash_attn.utils.distributed", "peft", "peft.tuners", "peft.tuners.lora",
    "pylatexenc", "torchdata", "torchdata.stateful_dataloader", "vllm", "vllm.inputs", "vllm.utils",
)  # fmt: skip
# What asks once whether one of them is there, and remembers the answer.
FIRST = ("transformers.trainer", "transformers.integrations.deepspeed")


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, offsets, int(lengths.max()), lengths


def pad_input(x: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    empty = x.new_zeros(batch * seqlen, *x.shape[1:])
    return empty.index_put((indices,), x).unflatten(0, (batch, seqlen))


@contextmanager
def stand_ins() -> Iterator[None]:
    names = [name for name in ABSENT if name not in sys.modules]
    for name in names:
        module = MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    padding: Any = sys.modules["flash_attn.bert_padding"]
    padding.unpad_input, padding.pad_input = unpad_input, pad_input
    padding.index_first_axis = lambda x, indices: x[indices]
    padding.rearrange = lambda x, pattern: x.flatten(0, 1)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def load(name: str) -> ModuleType:
    for module in FIRST:
        importlib.import_module(module)
    with stand_ins():
        return importlib.import_module(name)


def load_workers() -> ModuleType:
    """The module of the policy's worker and its trainer, without CUDA and ranks."""
    workers: Any = load("openrlhf.trainer.ray.ppo_actor")
    workers.NaiveReplayBuffer = lambda *_: None
    workers.torch_dist_barrier_and_cuda_sync = lambda: None
    workers.get_tokenizer = lambda *_, **__: None
    # Compiled where it is first called.
    actor: Any = sys.modules["openrlhf.models.actor"]
    actor.compute_entropy = inspect.unwrap(actor.compute_entropy)
    return workers


def load_script() -> dict[str, Any]:
    """The names of ``python -m openrlhf.cli.train_ppo_ray`` before it looks at its arguments."""
    with stand_ins():
        return runpy.run_module("openrlhf.cli.train_ppo_ray")
