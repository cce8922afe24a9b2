"""The operator contract (contract.py) on the operators of verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import run_contract
from speculation_cases import random_logits, random_mask, random_step, rows

from reasonkern import _load

OPS = torch.ops.reasonkern
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_sample(dtype):
    logits = random_logits((4, 70), 1, dtype)
    samples = [
        (logits, None, *rows(4, 70, 1).args()),
        (logits, random_mask((4, 70), 2), *rows(4, 70, 2, "off").args()),
        (logits[:1, :1].contiguous(), None, *rows(1, 1, 3).args()),
        (logits[:0], None, *rows(0, 70, 4).args()),
    ]
    run_contract(OPS.sample.default, samples)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_verify_tree(dtype):
    small = {"batch": 3, "nodes": 5, "vocab": 40, "dtype": dtype}
    plain = random_step(2, limits=False, **small)
    samples = [
        plain.args(),
        random_step(1, **small).args(),
        random_step(3, rejection=True, **small).args(),
        replace(plain, topk=1).args(),
        random_step(4, batch=1, nodes=1, vocab=3, dtype=dtype, limits=False).args(),
    ]
    run_contract(OPS.verify_tree.default, samples)


def compact_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    path, accepted = torch.tensor([[0, 2, 3], [0, -1, -1]]), torch.tensor([3, 1])
    lengths, start = torch.tensor([1, 2]), torch.tensor([1, 4])
    dense = [random_logits((2, 2, 8, 4), s, dtype) for s in (1, 2)]
    paged = [random_logits((6, 3, 2, 4), s, dtype) for s in (3, 4)]
    table = torch.tensor([[3, 0, 5], [1, 2, 4]])
    rest = (lengths, path, accepted, start)
    return [(*dense, *rest, None), (*paged, *rest, table)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_compact_kv(dtype):
    run_contract(OPS.compact_kv_.default, compact_samples(dtype), mutable=(0, 1))


# ---- what raw calls on the CPU are refused for: place of an argument, what is made of it, message

REQUESTS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
STEP: list[tuple[int, Callable[[Any], Any], str]] = [
    (0, lambda x: x[0], "logits: expected 3 dimensions"),
    (0, lambda x: x.long(), "logits: expected float32"),
    (0, lambda x: x[..., :0], "logits: expected a vocabulary of 1 to 2.22 - 1, got 0"),
    (0, lambda x: x[..., :1].expand(-1, -1, 1 << 22), "logits: expected a vocabulary .*4194304"),
    (0, lambda x: x.mT.contiguous().mT, "logits: expected a contiguous last dimension"),
    (0, lambda x: x[:, :0], "mask: expected shape"),
    (1, lambda x: x[1:], "tokens: expected shape"),
    (2, lambda x: x.long(), "valid: expected dtype"),
    (3, lambda x: None, "q_ids, q_logprob: expected both or neither"),
    (3, lambda x: x[0], r"q_ids: expected shape \(B, N, K\)"),
    (3, lambda x: x[..., :0], "q_ids: expected 1 to 64 tokens, got 0"),
    (3, lambda x: x.repeat(1, 1, 11), "q_ids: expected 1 to 64 tokens, got 66"),
    (3, lambda x: x[1:], "q_ids: expected shape"),
    (4, lambda x: x[1:], "q_logprob: expected shape"),
    (5, lambda x: x[1:], "child_ptr: expected shape"),
    (6, lambda x: x[1:], "child_index: expected shape"),
    *((7 + k, lambda x: x[1:], f"{name}: expected shape") for k, name in enumerate(REQUESTS)),
    (13, lambda x: x.int(), "eos: expected dtype"),
    (14, lambda x: x[1:], "max_length: expected shape"),
    (15, lambda x: x.long(), "mask: expected dtype"),
    (15, lambda x: x[..., 1:], "mask: expected shape"),
    (15, lambda x: x.mT.contiguous().mT, "mask: expected a contiguous last dimension"),
    (16, lambda x: x[1:], "num_nodes: expected shape"),
    (17, lambda x: -1, "depth: expected 0 to nodes - 1, got -1"),
    (17, lambda x: 5, "depth: expected 0 to nodes - 1, got 5"),
    (18, lambda x: -1, "max_children: expected 0 to nodes - 1, got -1"),
    (18, lambda x: 5, "max_children: expected 0 to nodes - 1, got 5"),
    (19, lambda x: 0, "topk: expected 1 to 64, got 0"),
    (19, lambda x: 65, "topk: expected 1 to 64, got 65"),
]
DENSE: list[tuple[int, Callable[[Any], Any], str]] = [
    (0, lambda x: x[0], "expected 4, 2 and 1 dimensions"),
    (2, lambda x: x[None], "expected 4, 2 and 1 dimensions"),
    (3, lambda x: x[0], "expected 4, 2 and 1 dimensions"),
    (0, lambda x: x[:1].expand_as(x), "cache: expected rows that do not overlap"),
    (0, lambda x: x[..., ::2], "cache: expected a contiguous last dimension"),
    (0, lambda x: x[:1], "cache: expected one block per request"),
    (0, lambda x: x.repeat(2, 1, 1, 1), "cache: expected one block per request"),
    (3, lambda x: x[1:], "path: expected shape"),
    (4, lambda x: x[1:], "accepted: expected shape"),
    (5, lambda x: x[1:], "start: expected shape"),
]
PAGED: list[tuple[int, Callable[[Any], Any], str]] = [
    (6, lambda x: x[0], "block_table: expected shape"),
    (6, lambda x: x[1:], "block_table: expected shape"),
]


def refused() -> Iterator[tuple[Any, ...]]:
    """(operator, its arguments, changes)."""
    step = random_step(3, batch=3, nodes=5, vocab=40, rejection=True).args()
    yield OPS.verify_tree, step, STEP
    bare = step[:15] + (None,) + step[16:]
    yield OPS.verify_tree, bare, [(0, lambda x: x[:, :0], "logits: expected one row per node")]
    plain = (random_logits((3, 40), 1), random_mask((3, 40), 2), *rows(3, 40, 1).args())
    masks = [
        (0, lambda x: x[None], "logits: expected 2 dimensions"),
        (1, lambda x: x[:, 1:], "mask: expected shape"),
    ]
    yield OPS.sample, plain, masks
    for sample, changes in zip(compact_samples(torch.float32), (DENSE, PAGED), strict=True):
        yield OPS.compact_kv_, sample, changes


@pytest.mark.skipif(not _load.available("cpu"), reason="library _C is not built")
def test_raw_calls_on_the_cpu_are_checked():
    """Past the fronts nothing is read or written out of bounds."""
    for op, sample, changes in refused():
        for place, change, message in changes:
            args = list(sample)
            args[place] = change(args[place])
            with pytest.raises(RuntimeError, match=message):
                op(*args)
