"""What only the CUDA kernels have: slices, clusters, launch shapes and alignments.

The family's tests run over the simulated kernels as backend ``cuda-sim`` in one launch shape; here
the shape varies. Threads run in forward, reverse and random order: a result that depends on the
order is a race.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import assert_same_bits, embed
from policy_loss_cases import INF, LossArgs
from policy_loss_checks import check_loss, check_stats, simple_loss
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the simulator needs g++")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLICES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def sim() -> Iterator[Any]:
    from cuda_sim import backend

    yield backend


def loss_args(x: Tensor, y: Tensor) -> LossArgs:
    """PPO with entropy bonus and k3; the second row is inactive."""
    a = simple_loss(x, y, values=(0.9, 1.1, 3.0, INF, 0.0, 0.0, 0.1, 0.1, 20.0), kl_kind=3)
    a.weight[0, 1] = 0
    return replace(a, ref_logprob=a.old_logprob.flip(1).contiguous() / 9)


def every_result(sim: Any, a: LossArgs) -> tuple[Tensor, ...]:
    """Statistics, their gradient, the loss and its gradient, in place too."""
    scaling = (a.row_temperature, a.temperature, a.softcap)
    stats = sim.token_stats(a.logits, a.targets, a.weight != 0, *scaling)
    saved = (stats[0], stats[1], stats[3], stats[5], stats[7])
    g = a.advantage.contiguous()
    gradient = sim.token_stats_backward(a.logits, a.targets, *scaling, *saved, g, g, None, g)
    loss = sim.policy_loss(*a.args(), True)
    assert_same_bits(sim.policy_loss(*a.args(), False)[:4], loss[:4])
    assert_same_bits(loss[2:4], stats[:2])  # the bit rule
    x = a.logits.clone()
    assert_same_bits(sim.policy_loss_(x, *a.args()[1:]), loss[:4])
    assert_same_bits(x, loss[4])
    return (*stats, gradient, *loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slices", SLICES)
def test_no_launch_shape_changes_a_bit(sim: Any, dtype: torch.dtype, slices: int) -> None:
    x, y = cases.hard_logits(1003, dtype, seed=slices)
    x[0, 2, :900] = -INF
    a = loss_args(x, y)
    shapes: list[dict[str, Any]] = [
        {"order": "reverse", "blocks": 1},
        {"order": "random", "seed": 1, "resident": False, "blocks": 5},
        {"order": "random", "seed": 2, "groups": min(slices, 4), "resident": False},
        {"order": "random", "seed": 3, "blocks": 20},
    ]
    with sim.using(slices=slices):
        expected = every_result(sim, a)
        for shape in shapes:
            with sim.using(**shape):
                assert_same_bits(every_result(sim, a), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_and_neighbours_change_no_bit(sim: Any, dtype: torch.dtype) -> None:
    """The same rows at every misalignment, with padded rows, and one row alone."""
    x, y = cases.hard_logits(301, dtype, seed=4)
    a = loss_args(x, y)
    expected = every_result(sim, a)
    for offset in range(16 // x.element_size()):
        buffer, view = embed(x, offset)
        before = buffer.clone()
        assert_same_bits(sim.token_stats(view, y, None, None, 1.0, 0.0)[:2], stats_of(sim, x, y))
        assert_same_bits(sim.policy_loss(view, *a.args()[1:], True), expected[9:])
        sim.policy_loss_(view, *a.args()[1:])
        assert_same_bits(view, expected[-1])
        view.copy_(x)
        assert torch.equal(buffer, before)  # nothing outside the view was touched
    alone = sim.token_stats(x[1:, 2:3], y[1:, 2:3].contiguous(), None, None, 1.0, 0.0)
    assert_same_bits(alone[0], stats_of(sim, x, y)[0][1:, 2:3])


def stats_of(sim: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(sim.token_stats(x, y, None, None, 1.0, 0.0)[:2])


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 128, 129, 4099])
def test_every_number_of_slices_is_accurate(sim: Any, vocab: int, slices: int) -> None:
    """Empty slices, slices of one vector, a tail in any of them."""
    dtype = DTYPES[(vocab + slices) % 3]
    x, y = cases.hard_logits(vocab, dtype, seed=vocab)
    backend = Backend("cuda-sim", "cpu", lambda op: getattr(sim, op))
    for shape in ({"resident": True}, {"resident": False, "groups": min(slices, 2)}):
        with sim.using(slices=slices, group=64, order="random", seed=vocab, **shape):
            check_stats(backend, x[:1], y[:1])
            check_loss(backend, simple_loss(x[:1], y[:1]))


@pytest.mark.parametrize("value", [INF, float("nan")])
@pytest.mark.parametrize("place", [0, 5, 299])
def test_nonfinite_logits_in_any_slice(sim: Any, value: float, place: int) -> None:
    """Beside -inf only, beside finite logits, first and last: the row is nonfinite, no other is."""
    x, y = cases.hard_logits(300, torch.bfloat16, seed=5)
    x[0, 0] = -INF
    x[0, 0, place] = x[1, 1, place] = value
    for resident in (True, False):
        with sim.using(slices=4, resident=resident, order="random"):
            loss, _, logprob, entropy, grad = sim.policy_loss(*loss_args(x, y).args(), True)
        for row in ((0, 0), (1, 1)):
            assert logprob[row].isnan() and entropy[row].isnan()
            assert loss[row] == 0 and (grad[row] == 0).all()
        assert logprob.isnan().sum() == 2 and torch.isfinite(grad).all()


def test_launch_configuration(sim: Any) -> None:
    """Three blocks of a cluster fit on an SM of 228 KiB; too long or too old means two sweeps."""
    hopper, opt_in = 90, 227 * 1024
    for vocab, bytes_, slices in (
        (32_000, 2, 1), (128_256, 2, 4), (151_936, 2, 4), (262_144, 2, 8),
        (32_000, 4, 2), (128_256, 4, 8), (151_936, 4, 8),
    ):  # fmt: skip
        c = sim.module().loss_config(vocab, bytes_, True, hopper, opt_in)
        assert c["resident"] and c["cluster"] == c["slices"] == slices
        assert 3 * (c["shared_bytes"] + 1024) <= 228 * 1024
        assert c["slices"] * c["slice_len"] >= vocab and c["slice_len"] * bytes_ % 16 == 0
        for other in (
            sim.module().loss_config(vocab, bytes_, True, 80, opt_in),
            sim.module().loss_config(vocab, bytes_, False, hopper, opt_in),
            sim.module().stats_config(8192, vocab, bytes_),
            sim.module().stats_config(64, vocab, bytes_),
        ):
            assert not other["resident"] and other["cluster"] == 1
            assert (other["slices"], other["slice_len"]) == (c["slices"], c["slice_len"])
            assert other["block"] <= 1024 and other["shared_bytes"] <= 48 * 1024
    assert [sim.module().stats_config(n, 151_936, 2)["block"] for n in (64, 264, 265)] == [
        1024, 512, 256,
    ]  # fmt: skip
    assert sim.module().stats_config(64, 151_936, 8)["block"] == 256
    # Few rows: one a block; many: up to four, and single ones for the blocks that end first.
    for rows, each in ((1, 1), (64, 1), (528, 1), (3167, 1), (3168, 2), (8192, 4), (2**33, 4)):
        blocks, again = sim.module().stats_turns(rows, 151_936, 2)
        assert blocks < 2**31 and 0 < again <= blocks
        assert rows == 2**33 or rows == blocks + again * (each - 1)
        assert each == 1 or blocks - again >= (each - 1) * 264 or again == blocks
    for rows, vocab, slices in ((8192, 151_936, 1), (8192, 262_144, 2), (64, 32_000, 8)):
        assert sim.module().rowwise_config(rows, vocab, 2)["slices"] == slices
    assert not sim.module().loss_config(10**6, 4, True, hopper, opt_in)["resident"]
    assert not sim.module().loss_config(32_000, 8, True, hopper, opt_in)["resident"]
    for shared in (99 * 1024, 227 * 1024):  # a row that does not fit on sm_120, or anywhere
        sizes = [sim.module().loss_config(n << 15, 2, True, 120, shared) for n in range(1, 40)]
        assert max(c["shared_bytes"] for c in sizes) <= shared
        assert {c["resident"] for c in sizes} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["undefined", "address"])
def test_under_sanitizers(sanitizers: str) -> None:
    """Out-of-bounds accesses and undefined behaviour end the process."""
    from cuda_sim.build import run_sanitized

    chosen = "every_number_of_slices or nonfinite or alignment"
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = run_sanitized([*command, str(Path(__file__))], sanitizers)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
