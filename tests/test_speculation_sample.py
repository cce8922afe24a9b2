"""`sample` on every backend against the definition, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract import assert_same_bits
from speculation_cases import (
    DTYPES,
    INF,
    cases,
    generator,
    on,
    random_logits,
    random_mask,
    rows,
)
from torch import Tensor

from reasonkern import _load
from reasonkern.speculation import noise, reference_row


def sample_everywhere(backend, logits, mask, r):
    expected = _load.implementation("sample", "reference")(logits, mask, *r.args())
    got = backend("sample", *on(backend, (logits, mask, *r.args())))
    assert_same_bits(got.cpu(), expected)
    return expected


@pytest.mark.parametrize("filters", ["off", "mixed"])
@pytest.mark.parametrize("masked", [False, True])
def test_sample_random_rows(backend, monkeypatch, filters, masked):
    if backend.name == "triton" and backend.slow:  # few tokens, but several blocks
        monkeypatch.setattr("reasonkern.speculation.triton_verify.BLOCK", 64)
    for seed in cases(backend, 3, 25):
        vocab = (1, 2, 31, 64, 509, 515, 2081, 700)[seed % 8] if seed else 137
        if backend.slow:
            vocab = min(vocab, 700)
        batch = 3 if backend.name == "triton" and backend.slow else 6
        logits = random_logits((batch, vocab), seed)
        mask = random_mask(logits.shape, seed) if masked else None
        sample_everywhere(backend, logits, mask, rows(batch, vocab, seed, filters))


def literal_sample(x: Tensor, words: Tensor, temperature, top_k, top_p, min_p, seed, position):
    """One row token by token: mask, temperature, top-k, top-p, min-p, and Gumbel's maximum."""
    legal = [v for v in range(len(x)) if int(words[v // 32]) >> v % 32 & 1]
    z = x / (temperature if temperature > 0 else 1)
    score = z + noise.gumbel_noise(seed, position, torch.arange(len(x))) if temperature > 0 else z
    order = sorted(legal, key=lambda v: (-z[v], v))[: top_k if top_k > 0 else None]
    odds = [math.exp(z[v] - z[order[0]]) for v in order]
    kept = [
        v for i, v in enumerate(order)
        if (i == 0 or top_p >= 1 or sum(odds[:i]) < top_p * sum(odds)) and odds[i] >= min_p
    ]  # fmt: skip
    return max(kept if temperature > 0 else order[:1], key=lambda v: (score[v], -v))


def test_the_definition_is_the_literal_sampler():
    """Every backend is compared with the definition, which nothing else holds."""
    sample = _load.implementation("sample", "reference")
    for seed in range(12):
        logits, r = random_logits((6, 45), seed), rows(6, 45, seed)
        words = random_mask((6, 45), seed)
        got = sample(logits, words, *r.args()).tolist()
        assert got == [literal_sample(*row) for row in zip(logits, words, *r.args(), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_dtypes(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    logits = random_logits((5, 333), 3, dtype)
    if dtype == torch.float64:  # more than fp32 holds: read as fp32
        logits = logits + 1e-9 * torch.randn(logits.shape, generator=generator(4)).double()
    sample_everywhere(backend, logits, None, rows(5, 333, 3, "off"))


def test_sample_strided_rows(backend):
    wide = random_logits((5, 500), 5)
    mask = random_mask((5, 500), 6)
    sample_everywhere(backend, wide[:, 3:400], mask[:, 1:14], rows(5, 397, 5, "off"))


def bad_rows(vocab: int) -> Tensor:
    x = random_logits((9, vocab), 8)
    x[0, 7] = float("nan")
    x[1, 9] = INF
    x[2] = -INF
    x[3] = float("nan")
    x[4] = -INF
    x[4, 11] = -3.0  # one finite
    x[5] = float("nan")
    x[5, 5] = x[5, 2] = 1.5  # finite ones tie
    x[6, :] = 0.0
    x[7] = INF
    x[7, 3] = -1e30
    x[8, 1:] = -INF
    return x


@pytest.mark.parametrize("filters", ["off", "mixed"])
def test_sample_bad_rows(backend, filters):
    if backend.name == "triton" and backend.slow and filters == "mixed":
        pytest.skip("interpreted filters are slow; bad rows do not reach them")
    x = bad_rows(70)
    r = rows(9, 70, 2, filters)
    token = sample_everywhere(backend, x, None, r)
    finite = torch.isfinite(x)
    best = torch.where(finite, x, -INF).argmax(-1)
    assert token[[0, 1, 5, 7]].tolist() == best[[0, 1, 5, 7]].tolist()
    assert token[[2, 3]].tolist() == [-1, -1]
    assert token[4] == 11 and token[5] == 2 and token[8] == 0


def test_sample_overflow_of_the_temperature_is_a_bad_row(backend):
    x = torch.tensor([[1.0, 2e38, 3e38, -3e38], [0.0, 1.0, 3e38, -1.0]])
    r = replace(rows(2, 4, 1, "off"), temperature=torch.full((2,), 1e-3))
    assert sample_everywhere(backend, x, None, r).tolist() == [2, 2]


def test_sample_where_the_inverse_of_the_temperature_overflows(backend):
    temperature = torch.full((12,), 1e-42)
    x = -1e-43 * torch.arange(40.0).expand(12, 40)
    assert torch.isinf(1 / temperature).all() and torch.isfinite(x / temperature[:, None]).all()
    r = replace(rows(12, 40, 5, "off"), temperature=temperature)
    assert sample_everywhere(backend, x, None, r).unique().numel() > 2


@pytest.mark.parametrize("top", [0.0, 8.0, 24.0, 26.0, 1e30])
def test_sample_where_one_token_is_far_above(backend, monkeypatch, top):
    """So far that others are within reach of the noise, just so, or not; 1e30 swallows any."""
    if backend.name == "triton":
        monkeypatch.setattr("reasonkern.speculation.triton_verify.BLOCK", 16)
    x = torch.zeros(8, 70)
    x[torch.arange(8), torch.tensor([0, 3, 17, 40, 47, 60, 64, 69])] = top
    r = replace(rows(8, 70, 6, "off"), temperature=torch.ones(8))
    sample_everywhere(backend, x, None, r)


def test_a_masked_token_may_be_anything(backend):
    x = torch.zeros(2, 40)
    x[0, 33], x[1, 0] = float("nan"), INF
    mask = torch.full((2, 2), -1, dtype=torch.int32)
    mask[0, 1] = -1 & ~2
    mask[1, 0] = -1 & ~1
    token = sample_everywhere(backend, x, mask, rows(2, 40, 3, "off"))
    assert token[0] != 33 and token[1] != 0


def test_an_empty_mask_allows_nothing(backend):
    x = random_logits((2, 40), 1)
    mask = torch.zeros(2, 2, dtype=torch.int32)
    mask[1, 1] = 4
    assert sample_everywhere(backend, x, mask, rows(2, 40, 3)).tolist() == [-1, 34]


def test_greedy_takes_the_lowest_of_ties_and_ignores_filters(backend):
    x = torch.tensor([[0.0, 2.0, 2.0, -0.0], [-0.0, 0.0, -1.0, -1.0]])
    r = replace(rows(2, 4, 1), temperature=torch.zeros(2))
    assert sample_everywhere(backend, x, None, r).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [("top_p", 0.5, 2), ("top_p", float("nan"), 1), ("top_k", 3, 3), ("min_p", 1.0, 4)],
)
def test_filters_of_equal_tokens(backend, monkeypatch, name, value, kept):
    """A mass before a token that is P leaves it out, top-k keeps just k, min-p what is at it.
    Devices look at no values: P may be NaN."""
    if backend.name == "triton":
        monkeypatch.setattr("reasonkern.speculation.triton_verify.BLOCK", 16)
    batch = {"cuda-sim": 16}.get(backend.name, 2) if backend.slow else 64
    r = replace(rows(batch, 4, 3, "off"), temperature=torch.ones(batch))
    r = replace(r, **{name: torch.full_like(getattr(r, name), value)})
    token = sample_everywhere(backend, torch.zeros(batch, 4), None, r)
    assert token.max() < kept and (backend.slow or token.unique().numel() == kept)


def rows_to_filter() -> dict[str, Tensor]:
    g = generator(9)
    x = torch.randn(6, 130, generator=g) * 6
    few = torch.where(torch.rand(6, 130, generator=g) < 0.9, -INF, x)
    few[:, 7] = 1.0
    last_bits = torch.randint(0, 40, (6, 130), generator=g)
    return {
        "spread": x,
        "float16": x.half(),
        "ties": (x / 2).round() * 2,
        "ties of bfloat16": x.round().bfloat16(),
        "both zeros": torch.where(x < 0, -0.0, 0.0),
        "a power of two of ties": torch.where(torch.arange(130) < 128, 0.0, -INF).repeat(6, 1),
        "few finite": few,
        "denormal": x * 1e-41,
        "ties by rounding": 1 + 2.0**-23 * last_bits,  # where T > 1
        "a total above 2^53": torch.where(torch.rand(6, 9000, generator=g) < 0.1, 0.01, 0.0),
    }


@pytest.mark.parametrize("name", rows_to_filter())
def test_triton_keeps_what_the_definition_keeps(name):
    triton_kernel = pytest.importorskip("speculation_triton_filters")
    logits = rows_to_filter()[name]
    f = reference_row.Filters(
        torch.tensor([1.0, 1.9, 1.3, 0.7, 1.0, 1.6]),
        torch.tensor([0, 40, 0, 129, 20, 0]),
        torch.tensor([1.0, 1.0, 0.95, 0.5, 0.99, 1e-20]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 1e-6]),
    )
    value = logits.float() / f.temperature[:, None]
    expected, _ = reference_row._filter(value, f)
    got = triton_kernel.kept(logits, f, 128 if value.shape[1] < 1000 else 4096)
    finite = value > -INF  # the others weigh nothing
    assert torch.equal(got & finite, expected & finite)
    assert (expected & finite).sum(-1).unique().numel() > 3
