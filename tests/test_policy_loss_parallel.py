"""Vocabulary-, data- and context-parallel losses equal the single-process ones (gloo on CPU).

The checks are in `parallel_checks.py`; one spawn per number of processes runs them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_ranks
import pytest
import torch

import reasonkern as rk
from reasonkern import Parallel

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

NUMERICS = (
    "numerics_hard_rows",
    "numerics_accumulation",
    "numerics_vocabularies",
    "numerics_shards_of_minus_inf",
    "numerics_nonfinite_rows",
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
    "one_gather_forward_none_backward",
    "backward_twice",
    "dtensor_logits",
    "errors",
)
TWO = (
    *NUMERICS,
    *VOCABULARY,
    "window_over_two_ranks",
    "default_weights_over_data_ranks",
    "pieces_on_two_ranks",
    "weights_of_pieces",
)
FOUR = (
    *VOCABULARY,
    "grid_of_vocabulary_and_data",
    "grid_of_vocabulary_and_pieces",
    "grid_of_pieces_and_data",
)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[Any, dict[str, str]] = {}

    def run(world: int, names: tuple[str, ...]) -> dict[str, str]:
        if (world, names) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            known[world, names] = parallel_ranks.run(world, "parallel_checks", names, folder)
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
    outcome = parallel_ranks.run(2, "parallel_checks", ("missing", "errors"), tmp_path)
    assert "AttributeError" in outcome["missing"] and "did not run" in outcome["errors"]


# ---- without process groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_group": object()}, "vocab_group: expected torch.distributed.init_process_group"),
        ({"data_group": "world"}, "data_group: expected torch.distributed.init_process_group"),
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
