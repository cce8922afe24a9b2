"""Statistics over the ranks, as a backend: the numerics that every backend keeps."""

from __future__ import annotations

from typing import Any

import policy_loss_cases as cases
import test_policy_loss as single
import torch
from conftest import FLOATS, Backend
from parallel_cases import (
    bounds,
    own,
    rank,
    same_on_all_ranks,
    size,
    world,
)
from policy_loss_cases import LossArgs
from torch import Tensor

from reasonkern.policy_loss import parallel as ranks
from reasonkern.policy_loss import parallel_rows as rows_over_ranks
from reasonkern.policy_loss import reference_objective as formulas

# ---- the numerics that every backend keeps, with this group as the backend


def group_backend() -> Backend:
    def token_stats(x: Tensor, y: Tensor, mask: Tensor | None, *scaling: Any) -> Any:
        shard = ranks.VocabShard(world(), rank(), bounds(x.shape[-1]))
        out = rows_over_ranks.token_stats(own(x).contiguous(), y, mask, *scaling, shard)
        same_on_all_ranks(*out)
        return out

    def token_stats_backward(x: Tensor, y: Tensor, *args: Any) -> Tensor:
        shard = ranks.VocabShard(world(), rank(), bounds(x.shape[-1]))
        owner = shard.owner(y)
        grads = rows_over_ranks.local_grads(owner == rank(), *args[-4:])
        args = (shard.local(y, owner), *args[:-4], *grads)
        part = rows_over_ranks.sharded_gradient(own(x).contiguous(), args, shard.columns, False)
        whole = torch.zeros_like(x)
        own(whole).copy_(part)
        return ranks.total(whole.double(), world()).to(x.dtype)

    def policy_loss(*args: Any) -> tuple[Tensor, ...]:
        a, needs_grad = LossArgs(*args[:-1]), args[-1]
        active = formulas.active_rows(a.weight, a.entropy_weight)
        scaling = (a.row_temperature, a.temperature, a.softcap)
        out = token_stats(a.logits, a.targets, active, *scaling)
        h = formulas.unpack_hyper(list(a.values), a.hyper, a.targets.shape)
        loss = formulas.objective_rows(
            a.kind, a.kl_kind, a.kl_unbiased, out[0], out[1], a.old_logprob, a.advantage,
            a.weight, a.entropy_weight, a.importance, a.ref_logprob, h,
        )  # fmt: skip
        scale = 1.0 if a.loss_scale is None else a.loss_scale
        saved = (out[0], out[1], out[3], out[5], out[7])
        grads = (scale * loss.dlogp, scale * loss.dentropy, None, None)
        gradient = a.logits.new_empty(0)
        if needs_grad:
            gradient = token_stats_backward(a.logits, a.targets, *scaling, *saved, *grads)
        return loss.row_loss, loss.token_loss, out[0], out[1], gradient

    return Backend("group", "cpu", locals().__getitem__)


def numerics_hard_rows() -> None:
    for dtype in FLOATS:
        single.test_statistics_and_gradient_on_hard_rows(group_backend(), dtype)


def numerics_accumulation() -> None:
    single.test_fp32_accumulation_whatever_the_dtype(group_backend(), torch.bfloat16)


def numerics_vocabularies() -> None:
    for vocab in (1, 2, 3, 17, 127, 1000):
        single.test_vocabulary_a_multiple_of_nothing(group_backend(), vocab)


def numerics_shards_of_minus_inf() -> None:
    for masked in (1, 6900, 8200, 10_800, single.MANY_TILES - 1):
        single.test_first_tiles_all_minus_inf(group_backend(), masked)
    for vocab in (1, 40, single.MANY_TILES):
        single.test_row_of_minus_inf_only(group_backend(), vocab)
    for dtype in FLOATS:
        single.test_target_at_minus_inf(group_backend(), dtype)
        single.test_row_with_one_finite_logit(group_backend(), dtype)


def numerics_nonfinite_rows() -> None:
    for bad in (cases.NAN, cases.INF):
        for where in ("first", "target", "middle", "last", "all"):
            single.test_nonfinite_logit_in_an_active_row(group_backend(), bad, where)
    single.test_nan_after_inf_and_inf_after_minus_inf(group_backend())
    single.test_plus_inf_under_softcap_is_nonfinite(group_backend())
    for target in (-1, -100, 50, 2**31 + 1, 2**40, -(2**40)):
        single.test_invalid_target_in_an_active_row(group_backend(), target)


def numerics_targets_of_no_rank() -> None:
    """Also where the rank that they are nearest to has no columns."""
    x = torch.zeros(1, 1, 9)
    for at, target in (((0,) * size() + (9,), -1), ((0,) + (9,) * size(), 9)):
        shard = ranks.VocabShard(world(), rank(), at)
        y = torch.tensor([[target]])
        out = rows_over_ranks.token_stats(own(x, at), y, None, None, 1.0, 0.0, shard)
        assert all(torch.isnan(stat).all() for stat in (*out[:6], out[7])) and not out[6].any()


def numerics_inactive_rows() -> None:
    for dtype in FLOATS:
        single.test_skipped_rows_are_harmless(group_backend(), dtype)
        single.test_all_rows_masked(group_backend(), dtype)
    single.test_entropy_weight_alone_makes_a_row_active(group_backend())


def numerics_offset_temperature_softcap() -> None:
    single.test_offset_3000(group_backend())
    for per_row in (False, True):
        single.test_offset_3000_under_a_temperature(group_backend(), per_row)
    for temperature in (0.3, 1.7):
        single.test_scalar_temperature(group_backend(), temperature)
    for dtype in FLOATS:
        single.test_row_temperature(group_backend(), dtype)
        single.test_softcap(group_backend(), dtype)


def numerics_ties() -> None:
    single.test_top1_is_the_first_among_ties(group_backend())
