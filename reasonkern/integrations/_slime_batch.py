"""slime's micro-batch, lists of response tokens by sample, as packed rows of this rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import Parallel

Reducer = Callable[[Tensor], Tensor]


class Groups(NamedTuple):
    """Megatron's, as they matter here."""

    parallel: Parallel
    rank: int  # among those with the other chunks of each text
    ranks: int


def groups() -> Groups:
    """Megatron's tensor-parallel and context-parallel groups of this rank."""
    try:
        from megatron.core import mpu
    except ImportError as error:
        raise ImportError(
            f"reasonkern.integrations.slime needs megatron.core, which slime trains with ({error})"
        ) from error
    sharded = mpu.get_tensor_model_parallel_world_size() > 1
    ranks = mpu.get_context_parallel_world_size()
    parallel = _parallel(
        mpu.get_tensor_model_parallel_group() if sharded else None,
        mpu.get_context_parallel_group() if ranks > 1 else None,
    )
    return Groups(parallel, mpu.get_context_parallel_rank(), ranks)


@functools.cache
def _parallel(vocab_group: Any, segment_group: Any) -> Parallel:
    """One object per sharding, which keeps the sizes of the shards."""
    return Parallel(vocab_group=vocab_group, segment_group=segment_group)


class Rows(NamedTuple):
    """Where the response tokens are among the T rows of logits."""

    targets: Tensor  # (T,)
    where: Tensor  # (n,) the row that predicts each response token, in the order of slime's lists
    segments: Tensor  # cu_seqlens of the samples and of the padding after them

    def spread(self, x: Tensor | None) -> Any:
        """(T,) from (n,)."""
        return None if x is None else x.new_zeros(self.targets.shape).index_copy(0, self.where, x)


def rows_of(batch: dict[str, Any], count: int, rank: int, ranks: int) -> Rows:
    """A rank has a sample's whole text, or two of 2 * ranks chunks of it (zigzag)."""
    samples = batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"]
    index, tokens, ends = [], [], [0]
    for text, total, response in zip(*samples, strict=True):
        chunk, at = total if ranks == 1 else -(-total // (2 * ranks)), ends[-1]
        for piece in (0,) if ranks == 1 else (rank, 2 * ranks - 1 - rank):
            first = max(piece * chunk, total - response - 1)
            last = max(min((piece + 1) * chunk, total - 1), first)
            tokens.append(text[first + 1 : last + 1])
            index.append(torch.arange(first, last) + (at - piece * chunk))
            at += chunk
        ends.append(at)
    y = torch.cat(tokens)
    where, offsets = torch.cat(index).to(y.device), torch.tensor([*ends, count], device=y.device)
    return Rows(y.new_zeros(count).index_copy(0, where, y), where, offsets)


class Tokens(NamedTuple):
    """What slime has of the response tokens, (n,) each."""

    weight: Tensor
    advantage: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None

    def advantage_per_sample(self, batch: dict[str, Any]) -> Tensor:
        """Of each sample and of the padding; ValueError where trained tokens of one differ."""
        zero = self.advantage.new_zeros(1)
        first = [torch.cat((x, zero))[:1] for x in batch["advantages"]]
        lengths = [len(x) for x in batch["advantages"]]
        spread = torch.cat([x.expand(n) for x, n in zip(first, lengths, strict=True)])
        apart = (self.advantage - spread).abs() > 1e-5 * spread.abs()
        if (apart & (self.weight != 0)).any():
            expected = "one value per sample for a sequence-level objective"
            _checks.fail("batch['advantages']", expected, "more")
        return torch.cat((*first, zero))


def tokens_of(args: Any, batch: dict[str, Any], sum_of_sample_mean: Reducer) -> Tokens:
    """With the weights of the reducer: it is linear, so they are its gradient."""
    names = ("log_probs", "rollout_log_probs")
    old, rollout = (torch.cat(x) if (x := batch.get(name)) else None for name in names)
    ref = torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None
    advantage = torch.cat(batch["advantages"])
    token = torch.zeros_like(advantage, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        (weight,) = torch.autograd.grad(sum_of_sample_mean(token), token)
    return Tokens(weight, advantage, rollout if args.use_rollout_logprobs else old, ref, rollout)
