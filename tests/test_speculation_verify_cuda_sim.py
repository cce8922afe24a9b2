"""The verification kernels in the simulator: launch shapes, thread orders, ties, sanitizers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from contract import assert_same_bits
from modulation_sampler_cases import SETS, random_requests
from speculation_cases import random_logits, random_step, rows
from test_speculation_verify import OUTPUTS, chain, check_lse

import reasonkern as rk
from reasonkern import _load

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def simulated():
    from cuda_sim import verify_backend

    return verify_backend


def same(simulated, step):
    expected = _load.implementation("verify_tree", "reference")(*step.args())
    got = simulated.verify_tree(*step.args())
    for name, g, e in zip(OUTPUTS, got, expected, strict=True):
        if name == "lse":
            check_lse(step, expected[2], g, e)
        else:
            assert_same_bits(g, e)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (1, 64), (2, 32), (4, 64), (8, 32)])
def test_launch_shapes_change_nothing(simulated, blocks, threads, order):
    with simulated.using(blocks=blocks, threads=threads, order=order, seed=5, teams=2):
        same(simulated, random_step(1, batch=5, vocab=304, rejection=blocks != 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("label", ["peaked", "flat", "ties"])
@pytest.mark.parametrize(("vocab", "top_p"), [(6112, 1.0), (6112, 0.9), (6107, 1.0)])
def test_rows_of_many_groups(simulated, dtype, label, vocab, top_p):
    """A thread takes several groups of 16 tokens: nearly all of a peaked row are passed over, in a
    flat one the bar rises from group to group. 6107: slices are not of whole words."""
    blocks, threads = 2, 32
    assert vocab > 3 * 16 * blocks * threads
    x = torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(8))
    if label == "peaked":
        x[..., 5], x[..., -7] = 30.0, 29.5
    elif label == "ties":
        x = x.clamp(-0.5, 0.5)
    step = random_step(1, batch=3, vocab=vocab, nodes=2, filters="off", bad=False, limits=False)
    step = replace(step, logits=x.to(dtype), rows=replace(step.rows, top_p=torch.full((3,), top_p)))
    with simulated.using(blocks=blocks, threads=threads, order="random", seed=2, teams=1):
        same(simulated, step)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_team_takes_requests_of_either_kind(simulated, blocks, order):
    """Filtered ones need the row's top before the draw. No slice is copied, so no wait for one lies
    between what a thread writes of a request and what the others read of it."""
    x, r = random_logits((7, 304), 3), rows(7, 304, 3, "mixed")
    off = torch.arange(7) % 2 == 0
    r = replace(
        r, top_k=r.top_k.masked_fill(off, 0), top_p=r.top_p.masked_fill(off, 1.0),
        min_p=r.min_p.masked_fill(off, 0.0),
    )  # fmt: skip
    expected = _load.implementation("sample", "reference")(x, None, *r.args())
    with simulated.using(teams=1, blocks=blocks, threads=64, stages=0, order=order, seed=7):
        assert_same_bits(simulated.sample(x, None, *r.args()), expected)


@pytest.mark.parametrize(("blocks", "seeds"), [(1, 60), (4, 12)])
def test_warps_that_fall_behind_change_nothing(simulated, blocks, seeds):
    """Random order also lets what is on its way between blocks, and copies, come early or late."""
    x, r = random_logits((3, 304), 6), rows(3, 304, 6)
    expected = _load.implementation("sample", "reference")(x, None, *r.args())
    for seed in range(seeds):
        shape = {"blocks": blocks, "threads": 64, "teams": 1, "stages": seed % 3}
        with simulated.using(order="random", seed=seed, **shape):
            assert_same_bits(simulated.sample(x, None, *r.args()), expected)
            if seed < 8:
                same(simulated, random_step(seed, batch=3, vocab=160, rejection=seed % 3 == 0))


@pytest.mark.parametrize(("blocks", "seeds"), [(1, 40), (4, 8)])
def test_warps_that_fall_behind_change_nothing_under_control(simulated, blocks, seeds):
    for seed in range(seeds):
        state = rk.ModulationState(3, SETS)
        for index, request in enumerate(random_requests(2, seed)):
            state.add(index, request.spec, prompt_tokens=[15, 1], generated_tokens=[3, 4, 8, 9])
        step = random_step(seed, batch=3, vocab=160, rejection=seed % 3 == 0)
        args = (*step.args(), torch.tensor([0, -1, 1]), list(state.tensors), True)
        expected = _load.implementation("verify_controlled", "reference")(*args)
        with simulated.using(order="random", seed=seed, blocks=blocks, threads=64, teams=1):
            got = simulated.verify_controlled(*args)
        for result in (0, 1, 2, 6, 12):  # tokens, length, path, status, trigger
            assert_same_bits(got[result], expected[result])
        for theirs, ours in zip(expected[7:12], got[7:12], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [304, 299])
@pytest.mark.parametrize("filters", ["off", "mixed"])
def test_where_a_slice_lies_changes_nothing(simulated, filters, vocab, dtype):
    """In shared memory or not; rows of 299 tokens are copied where they happen to be aligned."""
    step = random_step(4, batch=6, vocab=vocab, filters=filters, dtype=dtype)
    for stages in (0, 1, 2):
        with simulated.using(stages=stages, blocks=4, threads=64):
            same(simulated, step)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("stages", [1, 2])
def test_guesses_come_true_for_a_while(simulated, stages, order):
    """One team takes walks along a chain of which 0, 1, 2 ... drafts are right. The next row takes
    the place of a peaked one, and of one summed in full, before it is known to be visited."""
    batch, nodes, vocab = 5, 5, 2048
    x = torch.randn(batch, nodes, vocab, generator=torch.Generator().manual_seed(9))
    drawn = torch.arange(nodes) * 300 + 7
    x[:, torch.arange(nodes), drawn] = 60.0
    x[:, 2] = x[:, 2] / 60
    x[:, 2, drawn[2]] = 8.0  # likely enough
    step = chain(drawn.tolist(), vocab)
    right = torch.arange(batch)[:, None] >= torch.arange(nodes)
    step = replace(
        step, logits=x, tokens=torch.where(right, step.tokens, 1),
        valid=torch.ones(batch, nodes, dtype=torch.bool),
        rows=replace(rows(batch, vocab, 4, "off"), temperature=torch.full((batch,), 0.3)),
    )  # fmt: skip
    expected = _load.implementation("verify_tree", "reference")(*step.args())
    assert expected[1].tolist() == [1, 2, 3, 4, 5]  # the length says how many guesses were right
    for seed in range(3):
        with simulated.using(teams=1, blocks=2, threads=64, stages=stages, order=order, seed=seed):
            same(simulated, step)


@pytest.mark.parametrize("vocab", [1200, 2600])
@pytest.mark.parametrize(("blocks", "abreast"), [(1, False), (3, True)])
def test_more_ties_than_candidates(simulated, blocks, abreast, vocab):
    """Logits that are all equal overflow the candidates of the statistics; so do a few values."""
    step = chain([3, 1, 4], vocab)
    step.logits[0, 0] = 2.0
    step.logits[0, 1] = torch.arange(vocab) % 2
    with simulated.using(blocks=blocks, threads=32, abreast=abreast):
        same(simulated, step)


@pytest.mark.parametrize("abreast", [False, True])
def test_the_order_of_threads_does_not_change_the_sum(simulated, abreast):
    """Most logits are so low that they are looked at only as long as the draw's bar is. The sums
    differ by a 64th of what a float tells apart: a few logits more or less are seen in some."""
    batch, vocab = 64, 4096
    x = torch.full((batch, 1, vocab), -24.5)
    x[..., ::68], x[..., 3000] = -16.0, 0.0
    x[:, 0, 2000] = -torch.linspace(11.0, 11.0072, batch)
    step = random_step(1, batch=batch, vocab=vocab, nodes=1, filters="off", bad=False, limits=False)
    step = replace(step, logits=x, rows=replace(step.rows, temperature=torch.ones(batch)))
    outs = []
    for order, seed in [("forward", 0), ("random", 1), ("random", 2)]:
        with simulated.using(blocks=1, threads=64, abreast=abreast, order=order, seed=seed):
            outs.append(simulated.verify_tree(*step.args()))
    assert (outs[0][5].diff(dim=0) != 0).any()
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (2, 64), (3, 32), (5, 64), (8, 32)])
def test_rows_abreast_change_nothing(simulated, blocks, threads, order):
    """These seeds have bad rows at the root and behind it."""
    shape = {"blocks": blocks, "threads": threads, "teams": 2, "abreast": True}
    for seed in (2, 3):
        with simulated.using(order=order, seed=seed, **shape):
            same(simulated, replace(random_step(seed, batch=6, vocab=304), node_mask=None))


@pytest.mark.parametrize(
    ("dtype", "vocab", "threads"),
    [(torch.bfloat16, 26_000, 32), (torch.float32, 13_000, 32), (torch.bfloat16, 26_000, 512)],
)
def test_long_rows_abreast(simulated, dtype, vocab, threads):
    """A thread's share is several batches of 15 chunks, some of which are listed."""
    assert threads > 32 or vocab > 3 * 15 * threads * (16 // dtype.itemsize)
    x = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(8))
    x[:, 0, [2401, -7]] = torch.tensor([30.0, 29.5])
    x[:, 1, vocab // 2] = 40.0
    step = random_step(1, batch=2, vocab=vocab, nodes=3, filters="off", bad=False, limits=False)
    step = replace(step, logits=x.to(dtype), tokens=torch.tensor([[0, 2401, vocab // 2]] * 2))
    with simulated.using(blocks=3, threads=threads, teams=2, abreast=True):
        same(simulated, step)


@pytest.mark.parametrize(
    ("blocks", "order", "seeds"), [(2, "forward", 1), (3, "random", 8), (4, "reverse", 1)]
)
def test_walks_leave_the_likeliest_path(simulated, blocks, order, seeds):
    """By the second child of each node of the path in turn, and go on below it; a first child that
    may not be entered is not on it. One node has more children than a warp has lanes."""
    path, side = [0, 1, 3, 5, 7], {1: 2, 2: 4, 3: 6, 4: 8}  # by depth: the second child
    parents = [-1, 0, 0, 1, 1, 3, 3, 5, 5] + [2] * 40 + [4, 6, 8]
    tree, vocab, batch = rk.DraftTree(parents), 304, 6
    below, drawn = {2: 48, 4: 49, 6: 50, 8: 51}, 200
    tokens = torch.arange(len(parents)).repeat(batch, 1)
    x = torch.randn(batch, len(parents), vocab, generator=torch.Generator().manual_seed(3))
    walks = []
    for b in range(batch):
        walk = path[: b + 1] + ([side[b + 1], below[side[b + 1]]] if b + 1 in side else [])
        for node, child in zip(walk, [*walk[1:], None], strict=True):
            x[b, node, drawn if child is None else tokens[b, child]] = 70.0
        walks.append(walk)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[4, 1] = False  # the second child of the root is its likeliest then
    x[4, 0, 2] = 90.0
    x[4, 2, 300] = 90.0
    walks[4] = [0, 2]
    step = replace(
        random_step(1, batch=batch, vocab=vocab, filters="off", bad=False, limits=False),
        logits=x, tokens=tokens, valid=valid, tree=tree,
    )  # fmt: skip
    expected = _load.implementation("verify_tree", "reference")(*step.args())
    assert [path[path >= 0].tolist() for path in expected[2]] == walks
    for seed in range(seeds):
        shape = {"blocks": blocks, "threads": 64, "teams": 2, "abreast": True}
        with simulated.using(order=order, seed=seed, **shape):
            same(simulated, step)


def test_blocks_without_a_row_fall_behind(simulated):
    """A walk of second children, whose likeliest path is two nodes wherever it comes. Greedy rows
    are short: a warp may miss two."""
    levels, vocab = 12, 32
    parents = [-1] + [p for level in range(levels) for p in (2 * level, 2 * level)]
    x = torch.zeros(1, len(parents), vocab)
    x[0, torch.arange(0, 2 * levels, 2), torch.arange(2, 2 * levels + 2, 2)] = 70.0
    step = replace(
        random_step(1, batch=1, vocab=vocab, filters="off", bad=False, limits=False), logits=x,
        tokens=torch.arange(len(parents))[None], valid=torch.ones(1, len(parents)) > 0,
        tree=rk.DraftTree(parents), rows=replace(rows(1, vocab, 1), temperature=torch.zeros(1)),
    )  # fmt: skip
    expected = _load.implementation("verify_tree", "reference")(*step.args())
    assert expected[1].item() == levels + 1
    for seed in range(40):
        shape = {"blocks": 4, "threads": 64, "teams": 1, "abreast": True}
        with simulated.using(order="random", seed=seed, **shape):
            same(simulated, step)


def test_blocks_that_fall_behind_change_nothing_abreast(simulated):
    for seed in range(16):
        shape = {"blocks": 2 + seed % 3, "threads": 64, "teams": 1, "abreast": True}
        with simulated.using(order="random", seed=seed, **shape):
            same(simulated, replace(random_step(seed, batch=3, vocab=160), node_mask=None))


def test_the_last_tie_of_top_k_and_top_p(simulated):
    x = torch.zeros(4, 90)
    x[:, ::7] = 1.0
    r = replace(
        rows(4, 90, 0, "off"), temperature=torch.full((4,), 0.7),
        top_k=torch.tensor([5, 13, 14, 40]), top_p=torch.tensor([1.0, 0.3, 1.0, 0.9]),
    )  # fmt: skip
    expected = _load.implementation("sample", "reference")(x, None, *r.args())
    assert_same_bits(simulated.sample(x, None, *r.args()), expected)


def test_launch_decisions(simulated):
    shape, word = simulated.module().team_shape, simulated.module().word_bytes

    def blocks(batch, vocab=151_936, size=2, arch=90, inside=2, shared=227, walk=True):
        return shape(batch, vocab, size, 14_000, inside, 132, arch, shared * 1024, walk)

    assert [blocks(b)[0] for b in (1, 8, 28, 32, 64, 132, 256)] == [8, 8, 8, 4, 4, 4, 4]
    assert [blocks(256, vocab)[0] for vocab in (32_000, 128_256, 262_144)] == [1, 4, 8]
    assert [blocks(b, inside=1)[0] for b in (1, 8, 14, 16, 32, 256)] == [8, 8, 8, 4, 4, 2]
    assert blocks(256) == (4, 1, 14_000 + 37_984 * 2)
    assert blocks(28) == (8, 2, 14_000 + 2 * 38_016)
    assert blocks(32) == (4, 1, 14_000 + 37_984 * 2)  # no second wave of teams
    assert blocks(1, 1 << 21, 4) == (8, 0, 14_000)  # a slice of a MiB
    assert blocks(1, 1 << 18, 4) == (8, 1, 14_000 + (1 << 17))
    assert blocks(1, 1 << 18, 4, arch=120, shared=99) == (8, 0, 14_000)  # less room in a block
    assert blocks(1, arch=80) == (1, 0, 14_000)  # no clusters there
    rows = [(1, 151_936), (132, 151_936), (133, 151_936), (256, 151_936), (256, 32_000)]
    kinds = [blocks(batch, vocab, walk=False)[:2] for batch, vocab in rows]
    assert kinds == [(8, 2), (4, 1), (1, 0), (1, 0), (1, 1)]  # 133 rows fill the device
    abreast = simulated.module().abreast_shape
    shapes = [abreast(batch, 8, 132) for batch in (1, 23, 24, 46, 57, 77, 132, 133)]
    rows = [5, 5, 5, 5, 4, 3, 2, 1]  # as many as find room, in wide blocks if they then do, too
    assert shapes == list(zip(rows, [512] * 2 + [256] * 6, strict=True))
    assert [abreast(batch, 1, 132) for batch in (1, 66, 67)] == [(2, 512), (2, 512), (2, 256)]
    assert [word(256, 64), word(24, 16), word(6, 2), word(3, 1)] == [16, 8, 2, 1]


@pytest.mark.parametrize(
    ("arch", "shared"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_no_launch_asks_for_more_shared_memory_than_a_block_has(simulated, arch, shared):
    module, room = simulated.module(), shared * 1024
    vocabularies = [8 * round(1.3**k) for k in range(4, 50)]  # to 2^22
    # Two scratch sizes: about those of TeamShared and of ControlShared.
    teams = product(
        (1, 32, 132, 512), vocabularies, (2, 4, 8), (20_000, 33_000), (1, 2), (True, False)
    )
    for batch, vocab, size, scratch, inside, walk in teams:
        shape = module.team_shape(batch, vocab, size, scratch, inside, 132, arch, room, walk)
        assert shape[2] <= room and (arch >= 90 or shape[:2] == (1, 0))
    abreast = [module.abreast_bytes(n, v, arch, room) for n in (1, 80, 4096) for v in vocabularies]
    assert max(abreast) <= room and (max(abreast) > 0) == (arch >= 90)


SANITIZED = """
import sys; sys.path.insert(0, "tests")
from dataclasses import replace
from itertools import product
from speculation_cases import random_step, rows, random_logits
from cuda_sim import verify_backend as sim
for rejection in (False, True):
    for vocab in (150, 160):
        step = random_step(2, batch=5, nodes=5, vocab=vocab, rejection=rejection)
        sim.verify_tree(*step.args())
        with sim.using(abreast=vocab == 160 and not rejection):
            sim.verify_tree(*replace(step, node_mask=None).args())
sim.sample(random_logits((3, 77), 1), None, *rows(3, 77, 1).args())
print("clean")
"""


@pytest.mark.slow
def test_sanitizers_find_nothing():
    from cuda_sim.build import run_sanitized

    done = run_sanitized(["-c", SANITIZED])
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]
