"""The noise contract: Random123's known answers, and the same bits on every backend."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from contract import assert_same_bits
from torch import Tensor

from reasonkern.speculation import noise

ANSWERS = Path(__file__).with_name("data") / "philox4x32_10.txt"


def known_answers() -> list[tuple[list[int], list[int], list[int]]]:
    rows = []
    for line in ANSWERS.read_text().splitlines():
        if not line.startswith("#"):
            w = [int(x, 16) for x in line.split()]
            rows.append((w[:4], w[4:6], w[6:]))
    return rows


def as_int64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def hard_words() -> Tensor:
    """Both ends, every binade, and a spread biased to small words, whose noise is large."""
    g = torch.Generator().manual_seed(0)
    spread = (torch.rand(200_000, generator=g, dtype=torch.float64) ** 6 * 2**32).long()
    plain = torch.randint(0, 2**32, (200_000,), generator=g)
    edges = [torch.arange(4096), 2**32 - 1 - torch.arange(4096)]
    edges += [(1 << b) + torch.arange(-2, 3) for b in range(2, 32)]
    return torch.cat([*edges, spread, plain])


@pytest.fixture(scope="module")
def simulator():
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    from cuda_sim.build import load

    return load([Path(__file__).parent / "cuda_sim" / "noise_sim.cpp"], "noise_sim")


# ---- Philox


@pytest.mark.parametrize(("counter", "key", "expected"), known_answers())
def test_known_answers_reference(counter, key, expected):
    words = noise.philox(
        tuple(torch.tensor(c) for c in counter), torch.tensor(as_int64(key[1] << 32 | key[0]))
    )
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize(("counter", "key", "expected"), known_answers())
def test_known_answers_compiled(simulator, counter, key, expected):
    assert list(simulator.philox(counter, key[1] << 32 | key[0])) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), known_answers())
def test_known_answers_triton(counter, key, expected):
    triton_kernel = pytest.importorskip("speculation_triton_noise")
    assert triton_kernel.philox(counter, as_int64(key[1] << 32 | key[0])) == expected


# ---- Gumbel noise


def test_noise_is_gumbel_noise():
    word = hard_words()
    u = (word.clamp_min(1).double() * 2.0**-32).float().double().clamp_max(1 - 2.0**-24)
    truth = -torch.log(-torch.log1p(-u))
    error = (noise.gumbel(word).double() - truth).abs() / truth.abs().clamp_min(1)
    assert error.max() < 3e-7
    assert (
        noise.gumbel(word).max() == noise.gumbel(torch.tensor(1)) == noise.gumbel(torch.tensor(0))
    )
    assert noise.gumbel(torch.tensor(1)).item() == pytest.approx(32 * math.log(2))


def test_moments_of_the_noise():
    n = 1 << 20
    g = noise.gumbel_noise(torch.tensor(5), torch.tensor(9), torch.arange(n)).double()
    assert abs(g.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(g.var() - math.pi**2 / 6) < 5 * math.sqrt(5.4 - 1) * (math.pi**2 / 6) / math.sqrt(n)


def test_compiled_noise_has_the_same_bits(simulator):
    word = hard_words()
    stored, out = word.to(torch.uint32), torch.empty(len(word))
    simulator.gumbel(stored.data_ptr(), out.data_ptr(), len(word))
    assert_same_bits(out, noise.gumbel(word))


CASES = [
    (0, 0, noise.TARGET, 0), (7, 3, noise.TARGET, 0), (-1, 1 << 40, noise.TARGET, 0),
    (1 << 62, 11, noise.DRAFT, 3), (-(1 << 63), 2**33 + 5, noise.RESIDUAL, 255),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "position", "stream", "depth"), CASES)
def test_device_noise_has_the_same_bits(simulator, seed, position, stream, depth):
    n = 1001
    word, out = torch.empty(n, dtype=torch.uint32), torch.empty(n)
    simulator.device_noise(
        seed % 2**64, position, stream, depth, n, word.data_ptr(), out.data_ptr()
    )
    args = torch.tensor(seed), torch.tensor(position), torch.arange(n), stream, depth
    assert torch.equal(word.long(), noise.words(*args))
    assert_same_bits(out, noise.gumbel_noise(*args))


@pytest.mark.parametrize(("seed", "position", "stream", "depth"), CASES)
def test_triton_noise_has_the_same_bits(seed, position, stream, depth):
    triton_kernel = pytest.importorskip("speculation_triton_noise")
    n = 1001
    args = torch.tensor(seed), torch.tensor(position), torch.arange(n), stream, depth
    word, out = triton_kernel.noise(n, seed, position, stream, depth)
    assert torch.equal(word, noise.words(*args))
    assert_same_bits(out, noise.gumbel_noise(*args))


def test_triton_gumbel_of_hard_words():
    triton_kernel = pytest.importorskip("speculation_triton_noise")
    word = hard_words()
    assert_same_bits(triton_kernel.gumbel(word), noise.gumbel(word))


def test_triton_passes_over_what_no_noise_can_lift():
    rows = pytest.importorskip("reasonkern.speculation.triton_rows")
    noise_of_ends = noise.gumbel(torch.tensor([0, 2**32 - 1]))
    assert rows.MIN_NOISE.value < noise_of_ends[1] < rows.MIN_NOISE.value + 1e-3
    assert rows.MAX_NOISE.value - 1e-3 < noise_of_ends[0] < rows.MAX_NOISE.value


# ---- the exponential, of which masses are


def exponents() -> Tensor:
    """Of every power of two that is not 0, dense near 0; the last ones give 0."""
    near = -torch.logspace(-9, 0, 5000)
    return torch.cat([torch.zeros(1), near, -torch.linspace(0.5, 86.99, 50_000), -torch.tensor(
        [87.0, 88.0, 1e30, float("inf"), float("nan")]
    )])  # fmt: skip


def test_the_exponential():
    x = exponents()
    got, truth = noise.exp(x).double(), x.double().exp()
    assert ((got - truth).abs() <= 1.2e-7 * truth)[:-5].all() and got[0] == 1
    assert (got[-5:] == 0).all()


def test_the_compiled_exponential_has_the_same_bits(simulator):
    x = exponents()
    out = torch.empty(len(x))
    simulator.exp(x.data_ptr(), out.data_ptr(), len(x))
    assert_same_bits(out, noise.exp(x))


def test_the_triton_exponential_has_the_same_bits():
    triton_kernel = pytest.importorskip("speculation_triton_noise")
    assert_same_bits(triton_kernel.exp(exponents()), noise.exp(exponents()))


# ---- what words depend on


def test_streams_depths_positions_and_seeds_differ():
    token = torch.arange(64)
    seen = {
        tuple(noise.words(torch.tensor(s), torch.tensor(p), token, stream, depth).tolist())
        for s in (0, 1, 1 << 32) for p in (0, 1, 1 << 32)
        for stream, depth in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1))
    }  # fmt: skip
    assert len(seen) == 3 * 3 * 7


@pytest.mark.parametrize(("seed", "position", "stream", "depth"), CASES)
def test_words_are_laid_out_as_the_contract_says(seed, position, stream, depth):
    """Token v has word v % 4 of counter (v / 4, position, stream and depth) under key seed."""
    expected = []
    for v in range(23):
        counter = (v // 4, position % 2**32, position // 2**32, 256 * depth + stream)
        words = noise.philox(tuple(map(torch.tensor, counter)), torch.tensor(seed))
        expected.append(int(words[v % 4]))
    where = torch.tensor(seed), torch.tensor(position)
    assert noise.words(*where, torch.arange(23), stream, depth).tolist() == expected
    row = noise.row_words(*(x[None] for x in where), 23, stream, depth)
    assert row.tolist() == [expected]


def test_words_do_not_depend_on_shape_or_row():
    seed, position = torch.tensor([3, 4, 3]), torch.tensor([8, 8, 8])
    token = torch.arange(37)
    rows = noise.words(seed[:, None], position[:, None], token)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    picked = torch.tensor([36, 0, 5])
    assert torch.equal(noise.words(seed[:1], position[:1], picked), rows[0][picked])
