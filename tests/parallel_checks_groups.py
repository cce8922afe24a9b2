"""Data and segment groups, and two kinds of groups in a 2 x 2 grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from contract import NoHostData
from parallel_cases import (
    EXACT,
    OBJECTIVES,
    gathered,
    grid,
    own,
    rank,
    refused,
    run_loss,
    world,
)
from policy_loss_adaptive_cases import ADAPTIVE
from policy_loss_literal import Batch, V, make_batch
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Parallel
from reasonkern.policy_loss import parallel as ranks

# ---- data and segment groups


def sequences_of(b: Batch, rows: slice) -> Batch:
    return b.map(lambda x: x[rows])


def window_over_ranks(vocab: Any = None, data: Any = None) -> None:
    """Two data ranks x two micro-batches of one sequence each == one batch of four."""
    b = make_batch()
    data_rank = dist.get_rank(data)
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"):
        weight = rk.token_weights(b.mask, mode).double()
        whole = replace(b, weight=weight, entropy_weight=weight)
        expected, gradient = run_loss(whole, b.logits, OBJECTIVES["dapo_entropy"], None)
        parallel = Parallel(vocab_group=vocab, data_group=data)
        mine = b.mask[2 * data_rank : 2 * data_rank + 2]
        total: dict[str, Any] = {"num_sequences": 4}
        if mode == "token-mean":
            total = {"num_tokens": ranks.total(mine.sum(), data)}
        metrics, loss, grads = [], torch.zeros(()).double(), []
        for micro in range(2):
            row = slice(2 * data_rank + micro, 2 * data_rank + micro + 1)
            part = sequences_of(b, row)
            weight = rk.token_weights(part.mask, mode, data_parallel_size=2, **total)
            part = replace(part, weight=weight.double(), entropy_weight=weight.double())
            logits = part.logits if vocab is None else own(part.logits, (0, 9, V), vocab.rank())
            out, grad = run_loss(part, logits, OBJECTIVES["dapo_entropy"], parallel)
            loss, metrics, grads = loss + out.loss, [*metrics, out.metrics], [*grads, grad]
        assert_close(ranks.total(loss, data) / 2, expected.loss, rtol=1e-6, atol=1e-8)
        own_rows = gradient[2 * data_rank : 2 * data_rank + 2]
        if vocab is not None:
            own_rows = own(own_rows, (0, 9, V), vocab.rank())
        assert_close(torch.cat(grads) / 2, own_rows, rtol=1e-6, atol=1e-8)  # DDP's average
        merged = (metrics[0] + metrics[1]).all_reduce().compute()
        for name, value in expected.metrics.compute().items():
            if name != "rows_skipped":
                assert_close(merged[name], value, rtol=1e-9, atol=1e-12)


def window_over_two_ranks() -> None:
    window_over_ranks(data=world())


def default_weights_over_data_ranks() -> None:
    b = make_batch()
    mine = b.mask[2 * rank() : 2 * rank() + 2]
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"):
        for count_empty in (True, False):
            whole = rk.token_weights(b.mask, mode, count_empty=count_empty)
            with NoHostData():
                got = rk.token_weights(
                    mine, mode, count_empty=count_empty, parallel=Parallel(data_group=world())
                )
            assert_close(got, whole[2 * rank() : 2 * rank() + 2])
            columns = Parallel(vocab_group=world())  # whose ranks hold the same rows
            got = rk.token_weights(b.mask, mode, count_empty=count_empty, parallel=columns)
            assert torch.equal(got, whole)
    empty = rk.token_weights(torch.zeros(2, 3), parallel=Parallel(data_group=world()))
    assert torch.equal(empty, torch.zeros(2, 3))


SEQUENCE_LEVEL = ("gspo", "gmpo", "vespo", "opsm", "gtpo", "sequence_importance", "custom")
PIECES = ((0, 1, 6), (0, 6, 6))  # of rows of 6 tokens; in the second the last rank has none


def pieces(b: Batch, at: Sequence[int], r: int) -> Batch:
    """Tokens [at[r], at[r + 1]) of each sequence, with its advantage."""
    cut = b.map(lambda x: x[:, at[r] : at[r + 1]] if x.ndim > 1 else x)
    return replace(cut, advantage=b.advantage)


def pack_pieces(b: Batch, lengths: Tensor) -> Batch:
    kept = torch.arange(b.targets.shape[1]) < lengths[:, None]
    rows = b.map(lambda x: x[kept] if x.ndim > 1 else x)
    segments = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    return replace(rows, advantage=b.advantage, segments=segments)


def pieces_of_sequences(vocab: Any = None, segment: Any = None) -> None:
    b = make_batch()
    r = dist.get_rank(segment)
    parallel = Parallel(vocab_group=vocab, segment_group=segment)
    for at in PIECES:
        for packed in (False, True):
            mine = pieces(b, at, r)
            lengths = b.mask.sum(-1).add(b.mask.any(-1)).clamp(at[r], at[r + 1]) - at[r]
            if packed:
                mine = pack_pieces(mine, lengths)
            for name in SEQUENCE_LEVEL:
                expected, gradient = run_loss(b, b.logits, OBJECTIVES[name], None)
                logits, part_of = mine.logits, gradient[:, at[r] : at[r + 1]]
                if packed:
                    kept = torch.arange(at[r + 1] - at[r]) < lengths[:, None]
                    part_of = part_of[kept]
                if vocab is not None:
                    logits = own(logits, (0, 9, V), vocab.rank())
                    part_of = own(part_of, (0, 9, V), vocab.rank())
                got, part = run_loss(mine, logits, OBJECTIVES[name], parallel)
                assert_close(ranks.total(got.loss.detach(), segment), expected.loss, **EXACT)
                assert_close(part, part_of, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
                values = got.metrics.all_reduce().compute()
                for key, value in expected.metrics.compute().items():
                    if key != "rows_skipped" or not packed:
                        assert_close(values[key], value, **EXACT, msg=lambda m, k=key: f"{k}: {m}")


def pieces_on_two_ranks() -> None:
    pieces_of_sequences(segment=world())


def sums_over_pieces_are_differentiable_once() -> None:
    x = torch.arange(3.0).add(rank()).requires_grad_()
    with gathered() as found:
        total = ranks.group_total(x.square(), world())
        (gradient,) = torch.autograd.grad(total.sum(), x, create_graph=True)
    assert len(found) == 2
    assert torch.equal(gradient, 2 * x * dist.get_world_size())
    (factor,) = torch.autograd.grad(total.square().sum(), x, create_graph=True)
    refused(RuntimeError, "once_differentiable", factor.sum().backward)


def weights_of_pieces() -> None:
    b = make_batch()
    parallel = Parallel(segment_group=world())
    for at in PIECES:
        mine = b.mask[:, at[rank()] : at[rank() + 1]]
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"):
            for count_empty in (True, False):
                options: dict[str, Any] = {"count_empty": count_empty}
                if mode == "constant":
                    options["max_length"] = 6
                whole = rk.token_weights(b.mask, mode, **options)
                got = rk.token_weights(mine, mode, parallel=parallel, **options)
                assert_close(got, whole[:, at[rank()] : at[rank() + 1]])
    refused(
        ValueError, "max_length: expected L_max for pieces of sequences in mode constant, got None",
        lambda: rk.token_weights(mine, "constant", parallel=parallel),
    )  # fmt: skip


def mismatch_of(b: Batch, parallel: Parallel | None = None) -> dict[str, Tensor]:
    found = rk.rollout_mismatch(b.old_logprob, b.rollout_logprob, b.mask, parallel=parallel)
    return found.compute() if parallel is None else found.all_reduce().compute()


def mismatch_of_pieces() -> None:
    """A sequence counts once, whatever its pieces, and so do its tokens."""
    b, parallel = make_batch(), Parallel(segment_group=world())
    for at in PIECES:
        got = mismatch_of(pieces(b, at, rank()), parallel)
        assert_close(got, mismatch_of(b), rtol=1e-12, atol=1e-14)


# ---- 2 x 2


def grid_of_vocabulary_and_data() -> None:
    row, column = grid()
    window_over_ranks(vocab=row, data=column)


def grid_of_vocabulary_and_pieces() -> None:
    row, column = grid()
    pieces_of_sequences(vocab=row, segment=column)


def grid_of_a_batch() -> None:
    """A rule sees the tokens of all ranks in the order of data, then pieces."""
    rules = ("bapo paper", "bapo code", "clip_cov", "kl_cov", "high_entropy")
    for (segment, data), seed in product((grid(), grid()[::-1]), range(3)):
        b = make_batch(seed=seed)
        advantage = b.advantage.unsqueeze(-1) if seed else torch.ones(1).double()  # 1: all tied
        b = replace(b, advantage=advantage.expand_as(b.targets))
        halves = [b.map(lambda x, d=d: x[2 * d : 2 * d + 2]) for d in range(2)]
        parts = [
            half.map(lambda x, s=s: x[:, 3 * s : 3 * s + 3].flatten(0, 1))
            for half in halves
            for s in range(2)
        ]
        names = [name for name, x in vars(b).items() if x is not None]
        whole = replace(b, **{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
        at = 2 * data.rank() + segment.rank()
        parallel = Parallel(data_group=data, segment_group=segment)
        for name in rules:
            objective = ADAPTIVE[name][0]()
            expected, gradient = run_loss(whole, whole.logits, objective, None)
            got, part = run_loss(parts[at], parts[at].logits, objective, parallel)
            assert_close(got.token_loss, expected.token_loss.chunk(4)[at], **EXACT)
            assert_close(part, gradient.chunk(4)[at], **EXACT)


def grid_of_pieces_and_data() -> None:
    """`token_weights` and `metrics.all_reduce` over both: tokens once, sequences once."""
    segment, data = grid()
    b, parallel = make_batch(), Parallel(data_group=data, segment_group=segment)
    rows, at = slice(2 * data.rank(), 2 * data.rank() + 2), PIECES[0]
    tokens = slice(at[segment.rank()], at[segment.rank() + 1])
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        for count_empty in (True, False):
            whole = rk.token_weights(b.mask, mode, count_empty=count_empty)
            got = rk.token_weights(
                b.mask[rows, tokens], mode, count_empty=count_empty, parallel=parallel
            )
            assert_close(got, whole[rows, tokens])
    expected, _ = run_loss(b, b.logits, OBJECTIVES["gspo"], None)
    mine = pieces(sequences_of(b, rows), at, segment.rank())
    got, _ = run_loss(mine, mine.logits, OBJECTIVES["gspo"], parallel)
    values = got.metrics.all_reduce().compute()
    for name, value in expected.metrics.compute().items():
        assert_close(values[name], value, **EXACT)
    assert_close(mismatch_of(mine, parallel), mismatch_of(b), rtol=1e-12, atol=1e-14)
