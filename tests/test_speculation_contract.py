"""The operator contract (contract.py) on the operators of verification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import run_contract
from speculation_cases import random_logits, random_mask, random_step, rows

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_compact_kv(dtype):
    path, accepted = torch.tensor([[0, 2, 3], [0, -1, -1]]), torch.tensor([3, 1])
    lengths, start = torch.tensor([1, 2]), torch.tensor([1, 4])
    dense = [random_logits((2, 2, 8, 4), s, dtype) for s in (1, 2)]
    paged = [random_logits((6, 3, 2, 4), s, dtype) for s in (3, 4)]
    table = torch.tensor([[3, 0, 5], [1, 2, 4]])
    samples = [
        (*dense, lengths, path, accepted, start, None),
        (*paged, lengths, path, accepted, start, table),
    ]
    run_contract(OPS.compact_kv_.default, samples, mutable=(0, 1))
