"""Vocabulary-, data- and context-parallel losses equal the single-process ones (gloo on CPU).

The checks are in `parallel_checks*.py`; one spawn per number of processes runs them all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import parallel_ranks
import pytest
import torch
from tolerance import randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Parallel, _load
from reasonkern.policy_loss.parallel import VocabShard
from reasonkern.policy_loss.parallel_rows import merge_statistics

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

CHECKS = (
    "parallel_checks",
    "parallel_checks_numerics",
    "parallel_checks_groups",
    "parallel_checks_slime",
)
NUMERICS = (
    "numerics_hard_rows",
    "numerics_accumulation",
    "numerics_vocabularies",
    "numerics_shards_of_minus_inf",
    "numerics_nonfinite_rows",
    "numerics_targets_of_no_rank",
    "numerics_inactive_rows",
    "numerics_offset_temperature_softcap",
    "numerics_ties",
)
VOCABULARY = (
    "loss_of_every_objective",
    "loss_in_place",
    "loss_scaling_and_on_policy",
    "loss_fp16_keeps_the_incoming_scale",
    "padding_columns",
    "statistics_and_their_gradients",
    "empty_batches",
    "one_gather_forward_none_backward",
    "backward_twice",
    "in_place_over_logits_that_another_op_saved",
    "group_of_one_rank",
    "linear_loss_of_every_objective",
    "linear_padding_and_own_reduction",
    "linear_statistics_and_frozen_head",
    "linear_frozen_hidden",
    "linear_hidden_of_any_strides",
    "linear_group_of_one_rank",
    "second_derivatives",
    "dtensor_logits",
    "errors",
)
TWO = (
    *NUMERICS,
    *VOCABULARY,
    "window_over_two_ranks",
    "default_weights_over_data_ranks",
    "pieces_on_two_ranks",
    "sums_over_pieces_are_differentiable_once",
    "weights_of_pieces",
    "mismatch_of_pieces",
    "compiled_breaks_the_graph_and_agrees",
    "slime_vocabulary",
    "slime_pieces",
)
FOUR = (
    *VOCABULARY,
    "grid_of_vocabulary_and_data",
    "grid_of_vocabulary_and_pieces",
    "grid_of_pieces_and_data",
    "grid_of_a_batch",
    "worked_example",
    "slime_grid",
)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[Any, dict[str, str]] = {}

    def run(world: int, names: tuple[str, ...]) -> dict[str, str]:
        if (world, names) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            known[world, names] = parallel_ranks.run(world, CHECKS, names, folder)
        return known[world, names]

    return run


@pytest.mark.parametrize("name", TWO)
def test_two_processes(on_ranks: Any, name: str) -> None:
    outcome = on_ranks(2, TWO)[name]
    assert outcome == parallel_ranks.PASSED, outcome


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(on_ranks: Any, name: str) -> None:
    outcome = on_ranks(4, FOUR)[name]
    assert outcome == parallel_ranks.PASSED, outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMERICS)
def test_numerics_in_four_processes(on_ranks: Any, name: str) -> None:
    outcome = on_ranks(4, NUMERICS)[name]
    assert outcome == parallel_ranks.PASSED, outcome


@pytest.mark.slow
def test_a_failed_check_is_reported(tmp_path: Path) -> None:
    outcome = parallel_ranks.run(2, CHECKS, ("missing", "errors"), tmp_path)
    assert "KeyError" in outcome["missing"] and "did not run" in outcome["errors"]


# ---- the merge, without process groups


def merged(x: Tensor, y: Tensor, cuts: list[int], temperature: float) -> rk.TokenStats:
    """Statistics of (1, N, V) logits from those of the columns between cuts."""
    bounds = (0, *sorted(cuts), x.shape[-1])
    shard = VocabShard(None, 0, bounds)
    owner = shard.owner(y)
    parts = []
    for rank, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        local = VocabShard(None, rank, bounds).local(y, owner)
        if begin == end:
            parts.append(torch.full((8, *y.shape), -torch.inf, dtype=torch.float64))
            continue
        part = x[..., begin:end].contiguous()
        out = torch.ops.reasonkern.token_stats(part, local, None, None, temperature, 0.0)
        parts.append(torch.stack([t.double() for t in out]))
    t = torch.tensor(temperature, dtype=torch.float64)
    stats = torch.stack(parts).unbind(1)
    return rk.TokenStats(*merge_statistics(stats, owner, None, y >= 0, t)[:7])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_merge_of_any_cut_is_the_whole_row(data: Any) -> None:
    vocab = data.draw(st.integers(1, 40))
    cuts = data.draw(st.lists(st.integers(0, vocab), max_size=5))
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from((0.0, 1.0, 40.0, 900.0)))
    x = scale * randn(1, 4, vocab, seed=seed) + 3000
    x[0, 1, : vocab // 2] = -torch.inf
    y = torch.tensor([[0, vocab - 1, vocab // 2, int(x[0, 3].argmax())]])
    t = data.draw(st.sampled_from((1.0, 0.3)))
    whole = rk.token_stats(x, y, temperature=t)
    got = merged(x, y, cuts, t)
    for name, value, expected in zip(rk.TokenStats._fields, got, whole, strict=True):
        assert_close(value.to(expected), expected, rtol=1e-9, atol=1e-11, msg=name)


def accumulators() -> int:
    """Among how many a CPU row's terms are shared out; the reference adds pairwise."""
    if _load.reason("cpu"):
        return 128
    (path,) = Path(rk.__file__).parent.glob("_C.*so")
    level = ctypes.CDLL(str(path)).reasonkern_cpu_capability
    level.restype = ctypes.c_char_p
    return {b"baseline": 32, b"v3": 64, b"v4": 128}[level()]


def test_target_in_a_part_of_minus_inf() -> None:
    x, y = torch.zeros(1, 1, 9).double(), torch.tensor([[4]])
    x[..., :6] = -torch.inf
    whole = rk.token_stats(x, y)
    for cuts in ([3], [3, 6]):
        for got, expected in zip(merged(x, y, cuts, 1.0), whole, strict=True):
            assert_close(got.to(expected), expected)


def test_a_part_of_one_column_keeps_its_digits() -> None:
    """ln of its share is -ln(1 + the others'), where 1 + the others' is rounded to 1."""
    x = torch.zeros(1, 1, 1000).double()
    x[..., 417] = 40.0
    got = merged(x, torch.tensor([[417]]), [417, 418], 1.0).logprob.item()
    assert got == pytest.approx(-math.log1p(999 * math.exp(-40)), rel=1e-9, abs=0.0)


def test_confident_rows_keep_their_digits() -> None:
    """H and logp of 1e-8 from rounded float32 parts; from sums recovered from them they are 0."""
    x = torch.zeros(1, 2, 1000)
    x[0, :, 417] = 26.0
    x[0, 1] += 3000
    y = torch.tensor([[417, 417]])
    exact = rk.token_stats(x.double(), y)
    got = merged(x, y, [300, 600], 1.0)
    assert (exact.entropy < 2e-7).all() and (exact.logprob > -1e-8).all()
    rtol = 1 / accumulators() + 1e-2  # one of them adds to the 1, and what it adds is lost
    for name in ("logprob", "entropy", "varentropy"):
        assert_close(getattr(got, name), getattr(exact, name), rtol=rtol, atol=0.0)
    part = rk.token_stats(x[..., 300:600], y - 300)
    recovered = -torch.log(part.max_prob)  # ln s of the part, one rounding too late
    assert not torch.allclose(recovered.double(), -part.logprob.double(), rtol=1e-2, atol=0.0)


# ---- without process groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_group": object()}, "vocab_group: expected torch.distributed.init_process_group"),
        ({"data_group": "world"}, "data_group: expected torch.distributed.init_process_group"),
        ({"segment_group": 0}, "segment_group: expected torch.distributed.init_process_group"),
        ({"vocab_size": 0}, r"vocab_size: expected an integer >= 1 or None, got 0"),
        ({"vocab_size": 1.5}, r"vocab_size: expected an integer >= 1 or None, got 1.5"),
        ({"vocab_size": True}, r"vocab_size: expected an integer >= 1 or None, got True"),
        ({"reduce_dhidden": 1}, "reduce_dhidden: expected True or False, got 1"),
    ],
)
def test_errors_of_parallel(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parallel(**options)


def test_vocab_size_needs_a_group() -> None:
    with pytest.raises(ValueError, match="vocab_size: expected None without a vocab_group, got 3"):
        rk.token_stats(torch.zeros(1, 4), torch.tensor([0]), parallel=Parallel(vocab_size=3))


def test_a_parallel_without_groups_changes_nothing() -> None:
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 4])
    expected = rk.token_stats(x, y)
    for got, e in zip(rk.token_stats(x, y, parallel=Parallel()), expected, strict=True):
        assert torch.equal(got, e)


# ---- a group of one rank whose last column is padding


@pytest.fixture
def padded() -> Iterator[Parallel]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Parallel(vocab_group=dist.group.WORLD, vocab_size=4)
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["logits", "in place", "hidden"])
def test_forward_mode_and_torch_func_are_refused(padded: Parallel, how: str) -> None:
    """In our words, not in those torch has for the author of an autograd.Function."""
    rows = torch.ones(3)
    given: dict[str, Any] = {"advantage": rows, "weight": rows, "objective": rk.Objective.dapo()}

    def loss(x: Tensor) -> Tensor:
        y = torch.tensor([0, 1, 3])
        if how == "hidden":
            head = torch.ones(5, 5)
            return rk.linear_policy_loss(x, head, y, parallel=padded, **given).loss
        return rk.policy_loss(x, y, parallel=padded, inplace_grad=how == "in place", **given).loss

    x = torch.randn(3, 5)
    with pytest.raises(NotImplementedError, match="and none by torch.func; use"):
        torch.func.grad(loss)(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="none by torch.func"):
        loss(forward_ad.make_dual(x, torch.ones_like(x)))
