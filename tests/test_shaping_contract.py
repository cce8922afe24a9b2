"""The operator contract (contract.py) on the operators of shaping and scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import run_contract
from tolerance import randn

from reasonkern.shaping import op

OPS = torch.ops.reasonkern
DTYPES = (torch.float32, torch.float64)


def gae_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    reward, value = randn(3, 9, seed=1).to(dtype), randn(3, 9, seed=2).to(dtype)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) < 0.7
    row = torch.tensor([0.9, 1.0, 0.0], dtype=dtype)
    truncated = torch.tensor([True, False, True])
    one, none = torch.ones(1, 1, dtype=dtype), torch.ones(0, 4, dtype=dtype)
    return [
        (reward, value, None, None, None, None, None, 0.99, 0.95, 1.0, False),
        (reward, value, mask, row, row, row, truncated, 0.99, 0.0, 0.0, False),
        (reward, value.requires_grad_(), mask, None, row, None, truncated, 1.0, 1.0, 0.5, True),
        (one, one, None, None, None, None, None, 1.0, 1.0, 1.0, True),
        (none, none, None, None, None, None, None, 1.0, 1.0, 1.0, False),
    ]


def select_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    h = randn(2, 11, 6, seed=4).to(dtype)
    return [(h, 5, 0.1), (h, 11, 0.01), (h[:, :1, :1].contiguous(), 1, 1.0), (h[:0], 2, 0.1),
            (h, 0, 0.1)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_gae(dtype: torch.dtype) -> None:
    run_contract(OPS.gae.default, gae_samples(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_elliptical_select(dtype: torch.dtype) -> None:
    run_contract(OPS.elliptical_select.default, select_samples(dtype))


def test_every_operator_has_a_contract_test() -> None:
    assert set(op.SCHEMAS) == {"gae", "elliptical_select"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gae", {0: torch.zeros(3)}, "reward: expected 2 dimensions"),
        ("gae", {1: torch.zeros(2, 4)}, "value: expected shape"),
        ("gae", {1: torch.zeros(2, 3).double()}, "value: expected dtype"),
        ("gae", {0: torch.zeros(3, 2).T}, "reward: expected a contiguous last dimension"),
        ("gae", {2: torch.ones(2, 3)}, "mask: expected dtype"),
        ("gae", {1: torch.zeros(3, 2).T}, "value: expected a contiguous last dimension"),
        ("gae", {2: torch.ones(2, 4) > 0}, "mask: expected shape"),
        ("gae", {3: torch.ones(3)}, "row_lam: expected shape"),
        ("gae", {4: torch.ones(3)}, "row_lam_value: expected shape"),
        ("gae", {5: torch.ones(3)}, "bootstrap_value: expected shape"),
        ("gae", {6: torch.ones(3) > 0}, "truncated: expected shape"),
        ("elliptical_select", {0: torch.zeros(2, 3)}, "features: expected 3 dimensions"),
        ("elliptical_select", {0: torch.zeros(1, 2, 3).half()}, "expected float32 or float64"),
        ("elliptical_select", {0: torch.zeros(1, 3, 4).mT}, "features: expected a contiguous last"),
        ("elliptical_select", {1: -1}, "k: expected 0 to 4, got -1"),
        ("elliptical_select", {1: 5}, "k: expected 0 to 4, got 5"),
        ("elliptical_select", {2: 0.0}, "lam: expected a positive number"),
    ],
)
def test_raw_calls_are_checked(name: str, change: dict[int, Any], message: str) -> None:
    x = torch.zeros(2, 3)
    args: dict[str, list[Any]] = {
        "gae": [x, x, None, None, None, None, None, 1.0, 1.0, 1.0, False],
        "elliptical_select": [torch.zeros(1, 4, 3), 2, 0.1],
    }
    for index, value in change.items():
        args[name][index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name)(*args[name])
