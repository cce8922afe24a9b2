"""The CUDA host simulator on small kernels: what it computes and what it must refuse."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_sim import build

SOURCE = Path(__file__).parent / "cuda_sim" / "selftest.cpp"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


@pytest.fixture(scope="module")
def sim():
    return build.load([SOURCE], "cuda_sim_selftest")


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


def run(sim, kernel, inputs, out, *, grid=1, block=32, cluster=1, shared=0, order="forward", **kw):
    """Starts a kernel over numpy arrays; n, the kernel's last argument, is out.size by default."""
    source = 0 if inputs is None else inputs.ctypes.data
    n, seed = kw.pop("n", out.size), kw.pop("seed", 0)
    args = (kernel, grid, block, cluster, shared, ORDERS[order], seed, source, out.ctypes.data, n)
    sim.run(*args, **kw)
    return out


def compose_all(maps):
    """The composition of affine maps over the integers modulo 2**32, one after another."""
    scale, shift = 1, 0
    for a, b in maps.tolist():
        scale, shift = (a * scale) % 2**32, (a * shift + b) % 2**32
    return scale, shift


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("warps", [1, 4, 32])
def test_reductions_keep_the_order_and_agree_in_every_thread(sim, order, warps, cluster):
    grid, block, n = 2 * cluster, 32 * warps, 5000
    rng = np.random.default_rng(warps)
    maps = rng.integers(0, 2**32, (2, n, 2), dtype=np.uint32)
    maps[..., 0] |= 1  # odd factors: no product collapses to zero
    out = np.zeros((2, cluster * block, 2), np.uint32)
    layout = {"grid": grid, "block": block, "cluster": cluster, "shared": 8 * warps, "n": n}
    run(sim, "compose", maps, out, order=order, **layout)
    for row in range(2):
        expected = compose_all(maps[row])
        assert expected != compose_all(maps[row][::-1])
        assert (out[row] == np.array(expected, np.uint32)).all()


def test_shuffles(sim, order):
    lane = np.arange(32)
    values = np.random.default_rng(0).standard_normal(32)
    out = run(sim, "shuffles", values, np.zeros((5, 32)), order=order, n=32)
    down = np.where(lane % 16 + 5 < 16, lane + 5, lane)
    sources = [lane * 7 % 40 % 32, np.maximum(lane - 3, lane * (lane < 3)), down, lane ^ 9]
    sources.append(np.where(lane < 16, 2, 20))
    for row, source in zip(out, sources, strict=True):
        np.testing.assert_array_equal(row, values[source])


def test_votes_matches_and_reductions(sim, order):
    lane = np.arange(32)
    values = np.random.default_rng(1).integers(0, 4, 32, dtype=np.int32)
    out = run(sim, "votes", values, np.zeros((6, 32), np.uint32), order=order, n=32)
    bit = 1 << lane
    equal = values[:, None] == values[None, :]
    np.testing.assert_array_equal(out[0], bit[values > 1].sum())
    np.testing.assert_array_equal(out[1], (equal * bit).sum(1))
    np.testing.assert_array_equal(out[2], 2 * (values == 3).any() + (values >= 0).all())
    np.testing.assert_array_equal(out[3], values.sum())
    np.testing.assert_array_equal(out[4], values.min() * 100 + values.max())
    odd = lane % 2 == 1
    np.testing.assert_array_equal(out[5][odd], bit[(values > 1) & odd].sum() | 16 << 8)
    assert 0 < (values > 1).sum() < 32


def test_atomics(sim, order):
    values = np.random.default_rng(2).integers(-1000, 1000, 300, dtype=np.int32)
    out = np.zeros(300, np.int32)
    run(sim, "atomics", values, out, grid=3, block=128, order=order)
    assert out[:4].tolist() == [values.sum(), values.max(), values.min(), values.sum()]
    assert out[4:6].tolist() == [1, 1]


def test_a_spinning_thread_lets_the_owner_of_the_lock_run(sim, order):
    out = np.zeros(2, np.int32)
    run(sim, "spinlock", None, out, block=128, order=order)
    assert out.tolist() == [0, 128]


def test_cluster_barrier_and_distributed_shared_memory(sim, order):
    out = np.zeros((2, 4, 64), np.float32)
    layout = {"grid": 8, "block": 64, "cluster": 4, "shared": 256}
    run(sim, "neighbours", None, out, order=order, n=0, **layout)
    threads = np.arange(512, dtype=np.float32).reshape(2, 4, 64)
    np.testing.assert_array_equal(out, np.roll(threads, -1, axis=1))
    with pytest.raises(RuntimeError, match="cluster_map: before the first cluster barrier"):
        run(sim, "neighbours", None, out, order=order, n=1, **layout)


def test_a_neighbour_that_has_exited_takes_its_shared_memory_along(sim):
    out = np.zeros((2, 64), np.float32)
    with pytest.raises(RuntimeError, match="cluster_map: threads of the block have exited"):
        layout = {"grid": 2, "block": 64, "cluster": 2, "shared": 256, "n": 2}
        run(sim, "neighbours", None, out, order="reverse", **layout)


def mail(sim, order, n):
    out = np.zeros((3, 2, 4, 4), np.float32)
    layout = {"grid": 8, "block": 4, "cluster": 4, "shared": 16 * 16 + 16}
    return run(sim, "mail", None, out, order=order, n=n, **layout)


def numbers_of_blocks():
    turn, block = np.arange(3)[:, None, None, None], np.arange(8).reshape(1, 2, 1, 4)
    return np.tile(block * 10 + turn, (1, 1, 4, 1))


def test_mail_between_blocks_comes_before_the_wait_is_over(sim, order):
    np.testing.assert_array_equal(mail(sim, order, 0), numbers_of_blocks())
    with pytest.raises(RuntimeError, match="livelock"):
        mail(sim, order, 2)
    with pytest.raises(RuntimeError, match="wait_for_turn: neither the turn under way nor the one"):
        mail(sim, order, 4)


def test_mail_that_comes_late_shows_a_read_without_a_wait(sim):
    with pytest.raises(RuntimeError, match="expect_bytes: twice in one turn"):
        mail(sim, "forward", 1)  # nobody waited for the turn before last
    with pytest.raises(RuntimeError, match="send: nobody waited for it"):
        mail(sim, "forward", 3)


def test_a_copy_that_comes_at_once_shows_a_write_over_what_is_still_read(sim, order):
    rows = np.arange(64, dtype=np.float32)

    def copied(n, seed):
        out, layout = np.zeros(64, np.float32), {"shared": 128 + 8, "order": order}
        return run(sim, "copies", rows, out, n=n, seed=seed, **layout)

    np.testing.assert_array_equal(copied(0, 0), rows)
    seeds = range(20 if order == "random" else 1)
    right = [(copied(1, seed) == rows).all() for seed in seeds]
    assert all(right) == (order == "forward")


def test_copies_of_vectors_are_there_after_the_wait(sim, order):
    """Those read before the wait are right where they land at once: never in forward order."""
    rows = np.arange(4 * 32, dtype=np.float32).reshape(32, 4)

    def copied(n):
        out = np.zeros((32, 4), np.float32)
        run(sim, "vectors", rows, out, block=32, shared=16 * 32, order=order, n=n)
        return out

    np.testing.assert_array_equal(copied(0), rows)
    right = (copied(1) == rows).all(1)
    assert right.all() == (order == "reverse") and right.any() == (order != "forward")


def test_a_warp_that_falls_behind_shows_what_no_barrier_orders(sim):
    """Two warps write the number of steps that each has made; a barrier at each would end the race,
    and without one neither gets far ahead of the other but in random order."""
    ahead = {}
    for order in ORDERS:
        out = np.zeros(2 * 100, np.int32)
        run(sim, "steps", None, out, block=64, shared=8, order=order, n=100)
        ahead[order] = np.abs(out.reshape(2, 100) - np.arange(1, 101)).max()
    assert ahead["random"] > 5 > ahead["forward"] + ahead["reverse"]


def test_shared_memory_is_garbage_at_the_start_of_every_block(sim, order):
    out = np.zeros(96, np.float32)
    run(sim, "read_unwritten", None, out, grid=3, block=32, shared=128, order=order)
    assert np.isnan(out).all()


DEADLOCKS = {
    "barrier_after_exit": ["16/64 threads wait at __syncthreads (selftest.cpp:", "48/64 threads h"],
    "two_barriers": ["divergent barrier: __syncthreads (selftest.cpp:", "meets __syncthreads ("],
    "missing_lane": ["62/64 threads wait at __shfl_xor_sync (selftest.cpp:", "2/64 threads have e"],
    "absent_block": [
        "block (0,0,0): 64/64 threads wait at the cluster barrier",
        "block (1,0,0): 64/",
    ],
}


@pytest.mark.parametrize("kernel", DEADLOCKS)
def test_a_barrier_that_not_all_threads_reach_is_an_error(sim, order, kernel):
    out = np.zeros(1, np.int32)
    started = time.perf_counter()
    with pytest.raises(RuntimeError) as error:
        run(sim, kernel, None, out, grid=2, block=64, cluster=2, order=order, n=16)
    assert time.perf_counter() - started < 1
    for words in DEADLOCKS[kernel]:
        assert words in str(error.value)
    # The machine is usable after the threads it abandoned.
    test_a_spinning_thread_lets_the_owner_of_the_lock_run(sim, order)


def test_endless_spinning_is_an_error(sim):
    with pytest.raises(RuntimeError, match="livelock"):
        run(sim, "spin_forever", None, np.zeros(1, np.int32), block=4)


def test_the_order_of_threads_shows_a_race(sim):
    out = np.zeros(1, np.uint32)
    last = {"forward": 255, "reverse": 0}
    for order, thread in last.items():
        assert run(sim, "last_writer", None, out, grid=4, block=64, order=order)[0] == thread
    random = {
        int(run(sim, "last_writer", None, out, grid=4, block=64, order="random", seed=s)[0])
        for s in range(20)
    }
    assert len(random) > 10
    repeated = {
        int(run(sim, "last_writer", None, out, grid=4, block=64, order="random", seed=7)[0])
        for _ in range(5)
    }
    assert len(repeated) == 1


def test_a_misaligned_vector_access_is_an_error(sim):
    x = np.arange(101, dtype=np.float32).view(np.uint32) >> 16  # integers below 256: exact
    source = np.zeros(108, np.uint16)
    source = source[next(i for i in range(8) if (source.ctypes.data + 2 * i) % 16 == 2) :][:101]
    source[:] = x
    expected = (np.arange(101, dtype=np.float32) + 1).view(np.uint32) >> 16
    # Equal offsets in both arrays; the 7 elements before the boundary are the head, 6 the tail.
    target = np.zeros(116, np.uint16)
    target = target[next(i for i in range(8) if (target.ctypes.data + 2 * i) % 16 == 2) :][:101]
    run(sim, "tiles", source, target, n=101)
    np.testing.assert_array_equal(target[:95], expected[:95])
    with pytest.raises(RuntimeError, match="load_global: the address is misaligned"):
        run(sim, "tiles", source, target, n=-101)


def test_scalar_functions(sim):
    x = np.float32(2.0) ** np.random.default_rng(4).uniform(-20, 6, 128).astype(np.float32)
    out = run(sim, "functions", x, np.zeros((9, 128)), block=128, n=128)
    wide = x.astype(np.float64)
    product = (x * x).astype(np.float64)
    real = [np.exp(wide), np.log(wide), wide**-0.5, 3 / wide, wide * wide - product]
    np.testing.assert_allclose(out[:5], real, rtol=3e-7)
    assert (out[4] != 0).any()
    np.testing.assert_array_equal(out[5], np.clip(wide, 1, 2))
    bits = [int(b) for b in x.view(np.uint32)]
    counts = [(b.bit_count(), (b & -b).bit_length(), 32 - b.bit_length()) for b in bits]
    np.testing.assert_array_equal(out[6], [p + 100 * f + 10000 * c for p, f, c in counts])
    np.testing.assert_array_equal(out[7], [b * 0x80000001 >> 32 for b in bits])
    assert not out[8].any()


def every_float16_neighbourhood():
    """All float16 numbers, the midpoints between them, and the float32 just beside both."""
    grid = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = (grid + np.roll(grid, 1)) / 2
        exact = np.concatenate([grid, middle, [1e-8, 65519.99, 65520, 1e30]]).astype(np.float32)
        return np.concatenate([exact, np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)])


def round_to_bf16(x):
    """Nearest bf16, ties to even, through float64 quanta rather than through bit tricks."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float64)
        _, exponent = np.frexp(wide)
        quantum = np.ldexp(1.0, np.maximum(exponent - 8, -133))
        rounded = np.rint(wide / quantum) * quantum
        limit = np.ldexp(255.0, 120)  # the largest finite bf16 number
        rounded = np.where(np.abs(rounded) > limit, np.copysign(np.inf, wide), rounded)
        return np.where(np.isfinite(wide), rounded, wide).astype(np.float32)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_sixteen_bit_formats_round_to_nearest_even(sim, kind):
    bits = np.random.default_rng(3).integers(0, 2**32, 100_000, dtype=np.uint64)
    anything = bits.astype(np.uint32).view(np.float32)
    ties = (np.arange(2**17, dtype=np.uint32) << 15).view(np.float32)  # bf16 and its midpoints
    x = np.concatenate([every_float16_neighbourhood(), anything, ties])
    out = run(sim, f"round_{kind}", x, np.zeros_like(x), grid=-(-x.size // 1024), block=1024)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32) if kind == "fp16" else round_to_bf16(x)
    np.testing.assert_array_equal(out, expected)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(out)[number], np.signbit(x)[number])


@pytest.mark.parametrize(
    "layout, message",
    [
        ({"block": 1025}, "a block has 1 to 1024 threads"),
        ({"grid": 3, "cluster": 2}, "grid.x is a multiple of the cluster size"),
        ({"grid": 17, "cluster": 17}, "a cluster has 1 to 16 blocks"),
        ({"shared": 227 * 1024 + 1}, "at most 227 KiB of shared memory"),
    ],
)
def test_a_launch_that_the_hardware_refuses_is_an_error(sim, layout, message):
    with pytest.raises(RuntimeError, match=message):
        run(sim, "last_writer", None, np.zeros(1, np.uint32), **layout)


def test_a_compile_error_shows_the_compiler_s_words(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text('#include "cuda_sim.h"\n__global__ void f() { __shared__ int x; }\n')
    with pytest.raises(RuntimeError, match="building broken failed:(.|\n)*__shared__"):
        build.build([source], "broken")


FAULTS = {"past_shared": "heap-buffer-overflow", "overflow": "signed integer overflow"}


@pytest.mark.skipif(build.SANITIZE not in os.environ, reason="for the run under sanitizers below")
@pytest.mark.parametrize("kernel", FAULTS)
def test_fault(sim, kernel):
    """Ends the process: run by the test below, one at a time."""
    n = 2**30 if kernel == "overflow" else 100
    run(sim, kernel, None, np.zeros(1, np.int32), shared=100, n=n)


@pytest.mark.slow
@pytest.mark.skipif(build.SANITIZE in os.environ, reason="starts the run under sanitizers")
def test_under_the_address_and_undefined_behaviour_sanitizers():
    pytest_arguments = ["-m", "pytest", "-s", "-p", "no:cacheprovider", "--noconftest", __file__]
    clean = build.run_sanitized([*pytest_arguments, "-k", "not fault and not livelock"])
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert int(re.search(r"(\d+) passed", clean.stdout)[1]) > 50
    for kernel, words in FAULTS.items():
        faulty = build.run_sanitized([*pytest_arguments, "-k", f"test_fault and {kernel}"])
        assert faulty.returncode != 0
        assert words in faulty.stdout + faulty.stderr
