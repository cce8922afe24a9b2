"""The kernels of logit control in the simulator: launch shapes, thread orders, sanitizers."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from contract import assert_same_bits
from modulation_cases import END, START, VOCAB, make_state, random_requests

import reasonkern as rk
from reasonkern import _load

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

INF, NAN = float("inf"), float("nan")
PARENTS = torch.tensor([-1, 0, 0, 1, 3], dtype=torch.int32)
LAUNCHES = [
    {"threads": 32, "order": "forward"},
    {"threads": 64, "order": "reverse"},
    {"threads": 128, "order": "random", "seed": 3},
    {"threads": 512, "order": "random", "seed": 4},
]


@pytest.fixture
def simulated():
    from cuda_sim import modulation_backend

    return modulation_backend


def reference(op, *args):
    return _load.implementation(op, "reference")(*args)


def requests(count: int, seed: int) -> rk.ModulationState:
    """A state in which every second slot has come some way."""
    state = make_state(count)
    r = random.Random(seed)
    for slot, (spec, prompt) in enumerate(random_requests(count, seed, windows=True)):
        text = [START, *r.choices([0, 1, 2, 7, 8], k=10)]
        state.add(slot, spec, prompt, text if slot % 2 else [])
    return state


def tree_rows(count: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits with holes, drafts with ends, temperatures with zeros."""
    g = torch.Generator().manual_seed(seed)
    nodes = len(PARENTS)
    logits = 3 * torch.randn(count * nodes, VOCAB, generator=g)
    logits[torch.rand(logits.shape, generator=g) < 0.2] = -INF
    logits[::7, 3] = NAN
    logits[::5, :8] = -INF  # what is not banned comes late
    likely = torch.tensor([-1, 0, 1, 2, 7, 8, START, END])
    drafts = likely[torch.randint(len(likely), (count, nodes), generator=g)]
    heat = torch.rand(count * nodes, generator=g) * (torch.arange(count * nodes) % 4 > 0)
    return logits.to(dtype), drafts, heat


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda x: f"{x['threads']}-{x['order']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_launch_changes_a_row(simulated, launch, dtype):
    state = requests(24, 1)
    logits, drafts, heat = tree_rows(24, 2, dtype)
    slot = torch.arange(24)
    slot[5] = -1
    args = (slot, None, drafts, PARENTS, heat, *state.tensors, True)
    expected, got = logits.clone(), logits.clone()
    reference("modulate_logits_", expected, *args)
    with simulated.using(**launch):
        simulated.modulate_logits_(got, *args)
    assert ((got != logits) & ~got.isnan()).any(-1).float().mean() > 0.5
    if dtype == torch.float64:  # the last bit of exp and log1p
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0, equal_nan=True)
    else:
        assert torch.equal(got.isnan(), expected.isnan())
        assert_same_bits(got.nan_to_num(7), expected.nan_to_num(7))


def test_a_ban_is_weighed_against_the_whole_row(simulated):
    """More logits than a warp asks for at a time; the one that is left comes last, or is banned."""
    vocab = 700
    sets = rk.TokenSets.from_ids({"some": [3, 5, 698], "every": list(range(0, vocab, 2))})
    state = rk.ModulationState(2, sets)
    for slot, name in enumerate(sets):
        state.add(slot, rk.Modulation(ban=rk.Ban(name)), [])
    logits = torch.full((8, vocab), -INF)
    logits[:, 3], logits[:, 698], logits[0:2, 699] = 1.0, 2.0, 0.5
    logits[2:4, 256], logits[4:6, 257], logits[6:, 0] = 0.0, NAN, INF
    args = (torch.arange(8) % 2, None, None, None, None, *state.tensors, False)
    expected, got = logits.clone(), logits.clone()
    reference("modulate_logits_", expected, *args)
    simulated.modulate_logits_(got, *args)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    banned = (got[:, 698] == -INF).tolist()
    assert banned == [True, True, True, True, False, True, False, True]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda x: f"{x['threads']}-{x['order']}")
def test_one_id_in_every_part(simulated, launch):
    """What one thread adds, another one moves to the wait and a third one measures."""
    state = rk.ModulationState(3, rk.TokenSets.from_ids({"wide": list(range(2, 42))}))
    least = {"min_think": rk.MinThink(8, 0, [35])}
    ramp = {"budget": rk.Budget(8, [40, 38], rk.SoftBudget(0.0))}
    for slot, parts in enumerate((least, ramp, least | ramp)):
        spec = rk.Modulation(constant=rk.Constant(3.0, "wide"), think_end=38, **parts)
        state.add(slot, spec, [], [0] * 6)
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    logits[3:, 41] = 9.0  # the largest after the addition
    logits[6:, [35, 38]] = 20.0  # the largest after the move
    logits[:, 49] = INF
    args = (torch.arange(9) % 3, None, None, None, None, *state.tensors, True)
    expected, got = logits.clone(), logits.clone()
    reference("modulate_logits_", expected, *args)
    with simulated.using(**launch):
        simulated.modulate_logits_(got, *args)
    assert_same_bits(got, expected)
    assert (got[::3, 38] == -INF).all() and (got[1::3, 40] > logits[1::3, 40] + 3.0).all()


def quiet_tokens(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Mostly ids that no request waits for, now and then one that it does, or an end."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, 14, shape, generator=g)
    likely = torch.tensor([-1, 0, 1, 2, 7, 8, START, END])
    waited = likely[torch.randint(len(likely), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.04, waited, tokens)


@pytest.mark.parametrize("launch", LAUNCHES[:2], ids=lambda x: x["order"])
def test_more_drafts_than_a_warp_holds(simulated, launch):
    """Trees and chains that pass 32 tokens; most of a warp's tokens are counted, not folded."""
    state, r = requests(6, 9), random.Random(0)
    nodes = [-1] + [max(0, i - r.choice([1] * 9 + [5])) for i in range(1, 72)]
    parents = torch.tensor(nodes, dtype=torch.int32)
    logits = torch.randn(6 * 72, VOCAB, generator=torch.Generator().manual_seed(1))
    drafts, heat = quiet_tokens((6, 72), 2), torch.full((6 * 72,), 0.5)
    tree = (torch.arange(6), None, drafts, parents, heat)
    chain = (
        torch.arange(6).repeat_interleave(72), torch.arange(72).repeat(6), drafts.flatten(), None,
        heat,
    )  # fmt: skip
    depth = [0] * 72
    for i in range(1, 72):
        depth[i] = depth[nodes[i]] + 1
    assert max(depth) > 32
    for rows in (tree, chain):
        expected, got = logits.clone(), logits.clone()
        reference("modulate_logits_", expected, *rows, *state.tensors, True)
        with simulated.using(**launch):
            simulated.modulate_logits_(got, *rows, *state.tensors, True)
        assert_same_bits(got, expected)
        assert (got != logits).any(-1).float().mean() > 0.2


@pytest.mark.parametrize("launch", LAUNCHES[:3], ids=lambda x: x["order"])
def test_no_launch_changes_a_commit(simulated, launch):
    states = [requests(20, 5) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        slot = torch.randperm(20, generator=g)[:17]
        slot[3] = -1
        tokens = torch.randint(-1, VOCAB, (17, 6), generator=g)
        length = torch.randint(0, 7, (17,), generator=g)
        entropy, confidence = torch.rand(2, 17, 6, generator=g).unbind(0)
        rows = (slot, tokens, length, entropy.contiguous(), confidence.contiguous())
        reference("commit_", *rows, *states[0].tensors)
        with simulated.using(order=launch["order"], seed=launch.get("seed", 0)):
            simulated.commit_(*rows, *states[1].tensors)
    for expected, got in zip(states[0].tensors, states[1].tensors, strict=True):
        assert_same_bits(got, expected)
    assert states[1].stopped.any()


def test_more_tokens_than_a_warp_holds(simulated):
    states = [requests(20, 5) for _ in range(2)]
    tokens, length = quiet_tokens((20, 70), 3), torch.arange(20) * 4 - 3
    length[0] = 0
    for statistics in (None, torch.rand(20, 70, generator=torch.Generator().manual_seed(0))):
        rows = (torch.arange(20), tokens, length, statistics, statistics)
        reference("commit_", *rows, *states[0].tensors)
        simulated.commit_(*rows, *states[1].tensors)
    for expected, got in zip(states[0].tensors, states[1].tensors, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("config", [(4, 64), (64, 2)], ids=str)
def test_no_program_changes_a_row(monkeypatch, config, dtype):
    """In Triton: rows of a program, entries at a time; float64, which other tests leave out.

    Not bfloat16: the interpreter truncates where a GPU rounds.
    """
    if reason := _load.reason("triton"):
        pytest.skip(reason)
    from reasonkern.modulation import triton_modulation

    monkeypatch.setattr(triton_modulation, "config", lambda dense: config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = requests(11, 1)
    logits, drafts, heat = tree_rows(11, 2, dtype)
    args = (torch.arange(11), None, drafts, PARENTS, heat, *state.tensors, True)
    expected, got = logits.clone(), logits.to(device, copy=True)
    reference("modulate_logits_", expected, *args)
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    triton_modulation.modulate_logits_(got, *moved)
    slack = 1e-14 if dtype == torch.float64 else 0
    torch.testing.assert_close(got.cpu(), expected, rtol=slack, atol=0, equal_nan=True)


def test_launch_decisions(simulated):
    threads = simulated.module().row_threads
    entries = (0, 32, 33, 100, 512, 100_000)
    assert [threads(k, False) for k in entries] == [32, 32, 64, 128, 512, 512]
    assert threads(8, True) == 512


SANITIZED = """
import sys; sys.path.insert(0, "tests")
import test_modulation_cuda_sim as t
import torch
from cuda_sim import modulation_backend as sim
for launch in t.LAUNCHES[:2]:
    t.test_no_launch_changes_a_row(sim, launch, torch.bfloat16)
    t.test_no_launch_changes_a_commit(sim, launch)
t.test_a_ban_is_weighed_against_the_whole_row(sim)
print("clean")
"""


@pytest.mark.slow
def test_sanitizers_find_nothing():
    from cuda_sim.build import run_sanitized

    done = run_sanitized(["-c", SANITIZED])
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]
