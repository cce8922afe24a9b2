"""`token_weights`: every mode against a literal loop, packed and padded, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_literal import batch, sequences
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_weights


def literal_weights(
    mask: list[list[bool]],
    mode: str,
    *,
    count_empty: bool = True,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    max_length: int | None = None,
    data_parallel_size: int = 1,
) -> list[list[float]]:
    tokens = num_tokens or sum(map(sum, mask)) or 1
    kept = [row for row in mask if any(row) or count_empty]
    rows = num_sequences or len(kept) or 1
    out = []
    for row in mask:
        length = sum(row) or 1
        w = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / (rows * length),
            "seq-mean-token-sum": 1 / rows,
            "constant": 1 / (rows * (max_length or len(row) or 1)),
        }[mode]
        out.append([w * data_parallel_size if trained else 0.0 for trained in row])
    return out


MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
OWN = {mode: {"num_sequences"} for mode in MODES} | {"token-mean": {"num_tokens"}}
OWN["constant"] |= {"max_length"}
NORMALISERS = {"num_tokens", "num_sequences", "max_length"}


def own(mode: str, options: dict[str, Any]) -> dict[str, Any]:
    """Without the normalisers of other modes, which are refused."""
    return {k: v for k, v in options.items() if k not in NORMALISERS - OWN[mode]}


masks = st.integers(1, 5).flatmap(
    lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1, max_size=5)
)
normalisers = st.fixed_dictionaries(
    {"count_empty": st.booleans()},
    optional={
        "num_tokens": st.integers(1, 1000),
        "num_sequences": st.integers(1, 100),
        "max_length": st.integers(1, 100),
        "data_parallel_size": st.integers(1, 8),
    },
)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(mask=masks, options=normalisers)
def test_weights_are_a_literal_loop(mode: str, mask: Any, options: dict[str, Any]) -> None:
    options = own(mode, options)
    found = token_weights(torch.tensor(mask), mode, **options)
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor(literal_weights(mask, mode, **options)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(mask=masks, lengths=st.data(), options=normalisers)
def test_packed_weights_equal_padded_ones(
    mode: str, mask: Any, lengths: Any, options: dict[str, Any]
) -> None:
    """Padding is what lies behind the length of a sequence; masked tokens inside it stay."""
    t = len(mask[0])
    sizes = [lengths.draw(st.integers(0, t)) for _ in mask]
    mask = [
        [m and i < size for i, m in enumerate(row)] for row, size in zip(mask, sizes, strict=True)
    ]
    options = own(mode, {"max_length": t} | options)
    padded = token_weights(torch.tensor(mask), mode, **options)
    kept = torch.arange(t) < torch.tensor(sizes)[:, None]
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    packed = token_weights(torch.tensor(mask)[kept], mode, segments=offsets, **options)
    assert_close(packed, padded[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_weights_sum_to_one_and_take_any_mask_dtype(mode: str, dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
    w = token_weights(mask.to(dtype), mode)
    total = {"token-mean": 1.0, "seq-mean-token-mean": 2 / 3, "constant": 4 / 9}
    assert_close(w.sum().item(), total.get(mode, 4 / 3))
    assert w.dtype == torch.float32 and torch.equal(w != 0, mask != 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_no_trained_token_gives_zeros(shape: tuple[int, int], count_empty: bool, mode: str) -> None:
    w = token_weights(torch.zeros(shape), mode, count_empty=count_empty)
    assert w.shape == shape and not w.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_window_without_tokens_gives_zeros(mode: str) -> None:
    """The normalisers are 0-dim tensors that every rank got from a sum, and the sum may be 0."""
    zero = torch.tensor(0)
    given = own(mode, {"num_tokens": zero, "num_sequences": zero})
    w = token_weights(torch.zeros(2, 3), mode, **given)
    assert torch.equal(w, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_tensor_normalisers_equal_numbers(mode: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    numbers = own(mode, {"num_tokens": 7, "num_sequences": 5})
    tensors = {name: torch.tensor(x) for name, x in numbers.items()}
    assert torch.equal(token_weights(mask, mode, **numbers), token_weights(mask, mode, **tensors))


MASK = torch.ones(2, 3)
WEIGHT_ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (MASK, {"mode": "mean"}, "mode: expected 'token-mean' or .*, got 'mean'"),
    ([1], {}, "mask: expected a tensor, got list"),
    (MASK / 2, {}, r"mask: expected bool or 0/1 values, got 0.5 at \(0, 0\)"),
    (-MASK.int(), {}, r"mask: expected bool or 0/1 values, got -1 at \(0, 0\)"),
    (MASK[None], {}, r"mask: expected shape \(B, T\) or \(N,\), got \(1, 2, 3\)"),
    (MASK[0], {"mode": "constant"}, "segments: expected cu_seqlens for packed tokens in mode "),
    (
        MASK[0],
        {"mode": "constant", "segments": torch.tensor([0, 3])},
        "max_length: expected L_max for packed tokens in mode constant, got None",
    ),
    *(
        (
            MASK,
            {"mode": mode, "segments": torch.tensor([0, 3])},
            r"segments: expected None for padded \(B, T\) tokens .* take squeeze\(0\)\), got cu_",
        )
        for mode in ("constant", "token-mean")
    ),
    (
        MASK[0],
        {"mode": "seq-mean-token-sum", "segments": torch.tensor([0, 2])},
        r"segments: expected non-decreasing offsets from 0 to 3 \(padding .*, got \[0, 2\]",
    ),
    (
        MASK[0],
        {"mode": "seq-mean-token-sum", "segments": torch.tensor([0, 3]).to("meta")},
        "segments: expected the device of mask, cpu, got meta",
    ),
    (MASK, {"num_tokens": 0}, "num_tokens: expected a finite number > 0, got 0"),
    (MASK, {"num_sequences": math.nan}, "num_sequences: expected a finite number > 0, got nan"),
    (
        MASK,
        {"num_tokens": MASK},
        r"num_tokens: expected a number or a 0-dim tensor, got shape \(2, 3\)",
    ),
    (
        MASK,
        {"num_tokens": torch.tensor(6).to("meta")},
        "num_tokens: expected the device of mask, cpu, got meta",
    ),
    (MASK, {"parallel": 2}, "parallel: expected a Parallel or None, got int"),
    (
        MASK,
        {"mode": "seq-mean-token-mean", "num_tokens": 6},
        "num_tokens: expected None in mode seq-mean-token-mean, which takes num_sequences, got 6",
    ),
    (
        MASK,
        {"num_sequences": torch.tensor(2)},
        "num_sequences: expected None in mode token-mean, which takes num_tokens, got 2",
    ),
    (
        MASK,
        {"mode": "constant", "num_tokens": 6},
        "num_tokens: expected None in mode constant, which takes num_sequences and max_length, ",
    ),
    (
        MASK,
        {"mode": "seq-mean-token-sum", "max_length": 3},
        "max_length: expected None in mode seq-mean-token-sum, which takes num_sequences, got 3",
    ),
    (MASK, {"max_length": 0}, "max_length: expected a finite number > 0, got 0"),
    (MASK, {"data_parallel_size": 0}, "data_parallel_size: expected an integer >= 1, got 0"),
    (MASK, {"data_parallel_size": 1.5}, "data_parallel_size: expected an integer >= 1, got 1.5"),
]


@pytest.mark.parametrize(("mask", "options", "message"), WEIGHT_ERRORS)
def test_weight_errors(mask: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        token_weights(mask, **options)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_weights_give_the_mean_loss(form: str) -> None:
    """The point of it: sum(w l) of the op is the mean that the mode names."""
    b = batch(form)
    counts = [len(rows) for rows in sequences(b)]
    w = token_weights(b.mask, "seq-mean-token-mean", segments=b.segments, count_empty=False)
    out = policy_loss(b.logits, b.targets, objective=Objective.gpg(), **b.given(weight=w))
    losses = [out.token_loss.flatten()[rows].mean() for rows in sequences(b) if len(rows)]
    assert counts == [5, 0, 2, 1]
    assert_close(out.loss, sum(losses) / 3, rtol=1e-6, atol=1e-8)
