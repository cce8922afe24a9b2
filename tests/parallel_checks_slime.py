"""What each rank checks of slime's loss; `test_policy_loss_parallel.py` says on how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slime_cases as slime
import torch
import torch.distributed as dist
from parallel_cases import grid, rank, size, world
from torch.testing import assert_close

from reasonkern.integrations.slime import policy_loss_function
from reasonkern.policy_loss import parallel as ranks

NEAR = {"rtol": 1e-6, "atol": 1e-8}  # the weights are float32
ROUNDED = {"rtol": 1e-5, "atol": 3e-6}
CASES = [*((name, False) for name in slime.OPTIONS), *((name, True) for name in slime.ON_POLICY)]
_alone: list[Any] = []


def alone() -> Any:
    """A group of this rank; every rank creates all of them."""
    if not _alone:
        _alone.extend(dist.new_group([r]) for r in range(size()))
    return _alone[rank()]


class Case:
    """A rank's arguments of the loss, with columns and pieces of texts over two groups."""

    def __init__(self, vocab: Any, pieces: Any, name: str, on_policy: bool) -> None:
        found = dist.is_initialized()
        groups = [
            (g, g.rank(), g.size()) if g else (alone() if found else None, 0, 1)
            for g in (vocab, pieces)
        ]
        slime.install(*groups)
        self.columns, self.chunks = ((r, n) for _, r, n in groups)
        self.args = slime.make_args(**slime.OPTIONS[name], context_parallel_size=self.chunks[1])
        by_token = self.args.advantage_estimator != "gspo"
        self.batch = slime.make_batch(on_policy, by_token)
        self.part, self.index = slime.local(self.batch, self.columns, self.chunks)


def literally(vocab: Any, pieces: Any, name: str, on_policy: bool) -> None:
    """Losses and metrics of the pieces add up to those of whole texts; each row's gradient."""
    c = Case(vocab, pieces, name, on_policy)
    reduce = slime.reducer(c.args, c.part)
    loss, metrics, gradient = slime.run(policy_loss_function, c.args, c.part, reduce)
    whole, values, rows = slime.literal(c.args, c.batch)
    assert_close(ranks.total(loss, pieces), whole, **NEAR)
    assert set(metrics) == set(values)
    for key, value in values.items():
        total = ranks.total(metrics[key].double(), pieces)
        assert_close(total, value.double(), **NEAR, msg=lambda m, k=key: f"{k}: {m}")
    expected = torch.where((c.index >= 0)[:, None], rows[:, c.index], 0.0)
    assert_close(gradient, expected.chunk(c.columns[1], -1)[c.columns[0]], **NEAR)
    assert rows.abs().max() > 1e-2


def against_slime(vocab: Any, pieces: Any, name: str, on_policy: bool) -> None:
    """slime's own function in float32, for this rank's batch alone."""
    c = Case(vocab, pieces, name, on_policy)
    theirs = slime.slimes_own()
    assert theirs is not None
    part = {k: slime.as_float(v) if k in slime.ROWS else v for k, v in c.part.items()}
    part["rollout_mask_sums"] = part["rollout_mask_sums"].float()
    names = ("total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums")
    reduce = theirs.get_sum_of_sample_mean(
        *(part[k] for k in names), c.args.calculate_per_token_loss
    )
    want, got = (
        slime.run(function, c.args, part, reduce, dtype=torch.float32)
        for function in (theirs.policy_loss_function, policy_loss_function)
    )
    for i in (0, 2):
        assert_close(got[i], want[i], **ROUNDED)
    assert set(got[1]) == set(want[1])
    for key, value in want[1].items():
        assert_close(got[1][key], value, **ROUNDED, msg=lambda m, k=key: f"{k}: {m}")


def every_case(check: Callable[..., None], vocab: Any, pieces: Any) -> None:
    for case in CASES:
        try:
            check(vocab, pieces, *case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def slime_vocabulary() -> None:
    every_case(literally, world(), None)


def slime_pieces() -> None:
    every_case(literally, None, world())


def slime_grid() -> None:
    every_case(literally, *grid())


def slimes_own_vocabulary() -> None:
    every_case(against_slime, world(), None)


def slimes_own_pieces() -> None:
    every_case(against_slime, None, world())


def slimes_own_both() -> None:
    every_case(against_slime, *grid())
