"""What each rank checks; `test_policy_loss_parallel.py` says in how many processes.

Every rank holds the whole inputs, so it compares its part with the single-process result itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import policy_loss_cases as cases
import test_policy_loss as single
import torch
import torch.distributed as dist
from conftest import FLOATS, Backend
from policy_loss_cases import LossArgs
from policy_loss_literal import Batch, V, batch, make_batch
from tolerance import randn
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, Parallel
from reasonkern.policy_loss import parallel as ranks
from reasonkern.policy_loss import parallel_rows as rows_over_ranks
from reasonkern.policy_loss import reference as ref

OBJECTIVES: dict[str, Any] = {
    "dapo_entropy": Objective.dapo(0.8, 1.28, entropy_coef=0.1),
    "grpo_kl": Objective.grpo(kl=("k3", 0.1)),
    "cispo": Objective.cispo(1.2),
    "sapo": Objective.sapo(),
    "gspo": Objective.gspo(0.9, 1.1, entropy_coef=0.1),
    "gmpo": Objective.gmpo(),
    "vespo": Objective.vespo(),
    "opsm": Objective.ppo(opsm=0.05),
    "sequence_importance": Objective.ppo(importance=("sequence", "truncate", 0.5, 2.0)),
    "custom": lambda logprob, entropy, ctx: (
        -(
            ctx.sequence_sum(torch.where(ctx.active, logprob, 0.0)).to(logprob) * ctx.advantage
            + 0.1 * entropy
        )
    ),
}
ROWS = ("ref_logprob", "rollout_logprob", "entropy_weight")


# ---- the group and its shards


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def bounds(vocab: int) -> tuple[int, ...]:
    """Uneven shards; with four ranks one of them has no columns."""
    shares = (0.6,) if size() == 2 else (0.5, 0.5, 0.8)
    return (0, *(round(share * vocab) for share in shares), vocab)


def own(x: Tensor, at: Sequence[int] | None = None, r: int | None = None) -> Tensor:
    """This rank's columns of x."""
    at, r = bounds(x.shape[-1]) if at is None else at, rank() if r is None else r
    return x[..., at[r] : at[r + 1]]


@cache
def world() -> Any:
    return dist.new_group(list(range(size())))


@cache
def grid() -> tuple[Any, Any]:
    """The (row, column) groups of this rank in a 2 x 2 grid; every rank creates all of them."""
    rows = [dist.new_group(list(pair)) for pair in ((0, 1), (2, 3))]
    columns = [dist.new_group(list(pair)) for pair in ((0, 2), (1, 3))]
    return rows[rank() // 2], columns[rank() % 2]


def same_on_all_ranks(*tensors: Tensor) -> None:
    for x in tensors:
        flat = x.detach().double().nan_to_num(-77.0).reshape(-1)
        for other in ranks.gather(flat, world()):
            assert torch.equal(other, flat)


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
        active = ref.active_rows(a.weight, a.entropy_weight)
        scaling = (a.row_temperature, a.temperature, a.softcap)
        out = token_stats(a.logits, a.targets, active, *scaling)
        h = ref.unpack_hyper(list(a.values), a.hyper, a.targets.shape)
        loss = ref.objective_rows(
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
    for masked in (1, 2600, 3100, 4100, single.MANY_TILES - 1):
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


# ---- the public functions


def run_loss(
    b: Batch, logits: Tensor, objective: Any, parallel: Parallel | None, **options: Any
) -> tuple[rk.PolicyLossOutput, Tensor]:
    """The output and the gradient of 3 times the loss."""
    leaf = logits.clone().requires_grad_()
    out = rk.policy_loss(
        leaf * 1.0, b.targets, objective=objective, parallel=parallel, **b.given(*ROWS), **options
    )
    (gradient,) = torch.autograd.grad(3 * out.loss, leaf)
    return out, gradient


def compare(got: rk.PolicyLossOutput, expected: rk.PolicyLossOutput, **tolerance: float) -> None:
    for name in ("loss", "token_loss", "logprob", "entropy"):
        assert_close(getattr(got, name), getattr(expected, name), **tolerance)
    values, whole = got.metrics.compute(), expected.metrics.compute()
    for name, value in whole.items():
        assert_close(values[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROUNDED = {"rtol": 1e-5, "atol": 3e-6}


def every_objective(form: str, dtype: torch.dtype, **options: Any) -> None:
    tolerance = EXACT if dtype == torch.float64 else ROUNDED
    b = batch(form).to(dtype)
    parallel = Parallel(vocab_group=world())
    for name, objective in OBJECTIVES.items():
        expected, gradient = run_loss(b, b.logits, objective, None, **options)
        got, part = run_loss(b, own(b.logits), objective, parallel, **options)
        compare(got, expected, **tolerance)
        assert_close(part, own(gradient), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 1e-3
        same_on_all_ranks(*got[:4], got.metrics.sums)


def loss_of_every_objective() -> None:
    every_objective("padded", torch.float64)
    every_objective("packed", torch.float32)


def loss_in_place() -> None:
    every_objective("padded", torch.float64, inplace_grad=True)


def loss_scaling_and_on_policy() -> None:
    temperature = torch.tensor([0.7, 1.3, 0.9, 2.0])
    every_objective("padded", torch.float64, temperature=temperature, softcap=5.0)
    b = replace(make_batch(), old_logprob=None)
    for objective in (Objective.dapo(entropy_coef=0.1), Objective.gspo()):
        expected, gradient = run_loss(b, b.logits, objective, None)
        got, part = run_loss(b, own(b.logits), objective, Parallel(world()))
        compare(got, expected, **EXACT)
        assert_close(part, own(gradient), **EXACT)


def loss_fp16_keeps_the_incoming_scale() -> None:
    """The gradient is formed in the backward, with GradScaler's factor in it."""
    x, y = randn(1, 2, 40_000, seed=1).half(), torch.tensor([[3, 39_999]])
    one = torch.ones(1, 2)
    grads = []
    for logits, parallel in ((x, None), (own(x), Parallel(world()))):
        leaf = logits.clone().requires_grad_()
        out = rk.policy_loss(
            leaf, y, advantage=one, weight=one / 512, objective=Objective.ppo(), parallel=parallel
        )
        (65536 * out.loss).backward()
        grads.append(leaf.grad)
    assert_close(grads[1], own(grads[0]), rtol=2e-3, atol=1e-6)
    assert (grads[1] != 0).sum() >= 0.99 * grads[1].numel()


def padding_columns() -> None:
    """The last rank's padding is not read, and its gradient is 0; so is that of a padding rank."""
    b = make_batch()
    at = (0, 7, V, V + 4)[: size() + 1] if size() > 2 else (0, 7, V + 4)
    at = at if size() == 2 else (*at, V + 9)
    padded = torch.cat((b.logits, torch.full((*b.targets.shape, at[-1] - V), cases.NAN)), -1)
    parallel = Parallel(world(), vocab_size=V)
    for objective in (OBJECTIVES["dapo_entropy"], OBJECTIVES["gspo"]):
        expected, gradient = run_loss(b, b.logits, objective, None)
        whole = torch.cat((gradient, torch.zeros_like(padded[..., V:])), -1)
        for inplace in (False, True):
            got, part = run_loss(b, own(padded, at), objective, parallel, inplace_grad=inplace)
            compare(got, expected, **EXACT)
            assert_close(part, own(whole, at), **EXACT)


def statistics_and_their_gradients() -> None:
    x, y = cases.hard_logits(V, torch.float64)
    mask = torch.ones(y.shape, dtype=torch.bool)
    mask[1, 2] = False
    for chosen in (["logprob"], ["entropy"], ["lse", "collision"], list(rk.TokenStats._fields[:4])):
        grads, all_stats = [], []
        for logits, parallel in ((x, None), (own(x), Parallel(world()))):
            leaf = logits.clone().requires_grad_()
            stats = rk.token_stats(leaf, y, mask=mask, temperature=0.8, parallel=parallel)
            weights = [randn(*y.shape, seed=i) for i in range(len(chosen))]
            terms = zip(weights, chosen, strict=True)
            sum((w * getattr(stats, name)).sum() for w, name in terms).backward()
            grads.append(leaf.grad)
            all_stats.append(stats)
        for got, expected in zip(all_stats[1], all_stats[0], strict=True):
            assert_close(got, expected, **EXACT)
        assert_close(grads[1], own(grads[0]), **EXACT)


def empty_batches() -> None:
    for shape in ((0,), (2, 0)):
        x = torch.zeros(*shape, own(torch.zeros(V)).numel()).requires_grad_()
        y = torch.zeros(shape, dtype=torch.int64)
        rows = torch.zeros(shape)
        out = rk.policy_loss(
            x, y, advantage=rows, weight=rows, objective=Objective.ppo(), parallel=Parallel(world())
        )
        out.loss.backward()
        assert out.loss == 0 and x.grad is not None and x.grad.shape == x.shape


def one_gather_forward_none_backward() -> None:
    b, calls = make_batch(), []
    parallel = Parallel(world())
    rk.token_stats(own(b.logits), b.targets.clamp_min(0), parallel=parallel)
    gather = dist.all_gather

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].shape)
        return gather(*args, **kwargs)

    dist.all_gather = counting
    try:
        run_loss(b, own(b.logits), OBJECTIVES["gspo"], parallel)
    finally:
        dist.all_gather = gather
    assert calls == [(8, *b.targets.shape)]


def backward_twice() -> None:
    b = make_batch()
    out = rk.policy_loss(
        (own(b.logits).clone().requires_grad_() * 1.0), b.targets, objective=Objective.ppo(),
        parallel=Parallel(world()), inplace_grad=True, **b.given(),
    )  # fmt: skip
    out.loss.backward(retain_graph=True)
    refused(RuntimeError, "differentiated before", out.loss.backward)


def group_of_one_rank() -> None:
    """The single-process path, to the bit; with padding columns too."""
    groups = [dist.new_group([r]) for r in range(size())]
    b = make_batch()
    expected, gradient = run_loss(b, b.logits, OBJECTIVES["dapo_entropy"], None)
    alone = Parallel(vocab_group=groups[rank()])
    got, part = run_loss(b, b.logits, OBJECTIVES["dapo_entropy"], alone)
    assert torch.equal(part, gradient) and torch.equal(got.token_loss, expected.token_loss)
    padded = torch.cat((b.logits, b.logits), -1)
    parallel = Parallel(vocab_group=groups[rank()], vocab_size=V)
    got, part = run_loss(b, padded, OBJECTIVES["dapo_entropy"], parallel)
    compare(got, expected, **EXACT)
    assert_close(part, torch.cat((gradient, torch.zeros_like(gradient)), -1), **EXACT)


def compiled_breaks_the_graph_and_agrees() -> None:
    b = make_batch()
    parallel = Parallel(vocab_group=world(), segment_group=world())
    objective = OBJECTIVES["gspo"]

    def step(logits: Tensor) -> Tensor:
        return rk.policy_loss(
            logits, b.targets, objective=objective, parallel=parallel, **b.given()
        ).loss

    results = []
    for function in (step, torch.compile(step, backend="eager")):
        leaf = own(b.logits).clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert_close(results[1], results[0], **EXACT)


def worked_example() -> None:
    """The trainer of the family's README, on 2 x 2 ranks, trains like a single process."""
    text = (Path(rk.__file__).parent / "policy_loss" / "README.md").read_text()
    code = text.split("```python\n# A Megatron-style step")[1].split("```")[0]
    tp, dp = grid()
    cp = [dist.new_group([r]) for r in range(size())][rank()]
    scope: dict[str, Any] = {"tp": tp, "dp": dp, "cp": cp, "padded_from": V}
    exec("# A Megatron-style step" + code, scope)
    b = make_batch()
    hidden, head = randn(*b.targets.shape, 5, seed=1), randn(V + 3, 5, seed=2)
    weight = rk.token_weights(b.mask, "token-mean").double()
    whole = replace(b, weight=weight, entropy_weight=weight)
    leaf = head[:V].clone().requires_grad_()
    expected = rk.policy_loss(
        hidden @ leaf.t(), b.targets, objective=scope["objective"], **whole.given()
    )
    expected.loss.backward()
    mine = head[8 * tp.rank() : 8 * tp.rank() + 8].clone().requires_grad_()
    rows = [slice(2 * dp.rank() + i, 2 * dp.rank() + i + 1) for i in range(2)]
    names = ("targets", "mask", "old_logprob", "advantage")
    micro_batches = [{n: getattr(b, n)[r] for n in names} | {"tokens": hidden[r]} for r in rows]
    metrics = scope["step"](lambda tokens: tokens @ mine.t(), micro_batches)
    average = ranks.total(mine.grad, dp) / 2  # what DDP does
    at = slice(8 * tp.rank(), min(8 * tp.rank() + 8, V))
    assert_close(average[: at.stop - at.start], leaf.grad[at], rtol=1e-6, atol=1e-8)
    assert (average[at.stop - at.start :] == 0).all()
    assert_close(metrics["ratio_mean"], expected.metrics.compute()["ratio_mean"], **EXACT)


# ---- from hidden states and the rows of the head


def run_linear(
    b: Batch, x: Sequence[Tensor], objective: Any, parallel: Parallel | None, **options: Any
) -> tuple[rk.PolicyLossOutput, list[Tensor]]:
    """The output and the gradients of 3 times the loss by hidden, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in x]
    out = rk.linear_policy_loss(
        *leaves[:2], b.targets, bias=leaves[2], objective=objective, parallel=parallel,
        **b.given(*ROWS), **options,
    )  # fmt: skip
    return out, list(torch.autograd.grad(3 * out.loss, leaves))


def linear_problem(form: str, dtype: torch.dtype) -> tuple[Batch, list[Tensor]]:
    """Hidden states, head and bias whose logits are those of the batch."""
    b = batch(form).to(dtype)
    weight, bias = torch.linalg.qr(randn(V, V, seed=7))[0].to(dtype), randn(V, seed=8).to(dtype)
    return b, [(b.logits - bias) @ weight, weight, bias]


def own_rows(x: Sequence[Tensor], at: Sequence[int] | None = None) -> list[Tensor]:
    return [x[0], *(own(t.t() if t.ndim > 1 else t, at).t() for t in x[1:])]


def linear_loss_of_every_objective() -> None:
    for form, dtype, tolerance in (
        ("padded", torch.float64, EXACT),
        ("packed", torch.float32, ROUNDED),
    ):
        b, x = linear_problem(form, dtype)
        for name, objective in OBJECTIVES.items():
            expected, whole = run_linear(b, x, objective, None)
            for options in ({}, {"chunk_rows": 3, "compact": True}):
                got, parts = run_linear(b, own_rows(x), objective, Parallel(world()), **options)
                compare(got, expected, **tolerance)
                for part, gradient in zip(parts, own_rows(whole), strict=True):
                    assert_close(part, gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
                same_on_all_ranks(*got[:4], parts[0])


def linear_padding_and_own_reduction() -> None:
    b, x = linear_problem("padded", torch.float64)
    at = (0, 7, V + 4) if size() == 2 else (0, 7, V, V + 4, V + 9)
    pad = torch.full((at[-1] - V, V), cases.NAN).double()
    padded = [x[0], torch.cat((x[1], pad)), torch.cat((x[2], pad[:, 0]))]
    expected, whole = run_linear(b, x, OBJECTIVES["gspo"], None)
    whole = [whole[0], torch.cat((whole[1], 0 * pad.nan_to_num())), whole[2]]
    whole[2] = torch.cat((whole[2], torch.zeros(at[-1] - V).double()))
    for reduced in (True, False):
        parallel = Parallel(world(), vocab_size=V, reduce_dhidden=reduced)
        got, parts = run_linear(b, own_rows(padded, at), OBJECTIVES["gspo"], parallel)
        compare(got, expected, **EXACT)
        if not reduced:
            assert (parts[0] - whole[0]).abs().max() > 1e-3
            parts[0] = ranks.total(parts[0], world())
        for part, gradient in zip(parts, own_rows(whole, at), strict=True):
            assert_close(part, gradient, **EXACT)


def linear_statistics_and_frozen_head() -> None:
    _, x = linear_problem("padded", torch.float64)
    y, mask = make_batch().targets.clamp_min(0), make_batch().mask
    results = []
    for operands, parallel in ((x, None), (own_rows(x), Parallel(world()))):
        hidden = operands[0].clone().requires_grad_()
        stats = rk.linear_token_stats(
            hidden, operands[1], y, bias=operands[2], mask=mask, temperature=0.7, softcap=4.0,
            parallel=parallel,
        )  # fmt: skip
        sum(getattr(stats, name).sum() for name in ("logprob", "lse", "collision")).backward()
        results.append((*stats, hidden.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected, **EXACT)


# ---- DTensor


def dtensor_logits() -> None:
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (size(),))
    b = make_batch()
    for objective in (OBJECTIVES["dapo_entropy"], OBJECTIVES["vespo"]):
        expected, gradient = run_loss(b, b.logits, objective, None)
        for parallel in (None, Parallel(vocab_group=mesh.get_group()), Parallel(vocab_size=V)):
            spread = distribute_tensor(b.logits, mesh, [Shard(-1)])  # 13 columns: uneven
            leaf = spread.detach().requires_grad_()
            out = rk.policy_loss(
                leaf, b.targets, objective=objective, parallel=parallel, **b.given(*ROWS)
            )
            (3 * out.loss).backward()
            compare(out, expected, **EXACT)
            assert isinstance(leaf.grad, DTensor)
            assert_close(leaf.grad.full_tensor(), gradient, **EXACT)
    refused(
        ValueError, r"logits: expected a DTensor with one Shard\(2\), otherwise Replicate",
        lambda: rk.token_stats(distribute_tensor(b.logits, mesh, [Replicate()]), b.targets),
    )  # fmt: skip
    refused(
        ValueError, "vocab_group: expected None or the group of the DTensor's mesh",
        lambda: rk.token_stats(
            distribute_tensor(b.logits, mesh, [Shard(2)]), b.targets, parallel=Parallel(world())
        ),
    )  # fmt: skip


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
        tokens = ranks.total(mine.sum(), data)
        metrics, loss, grads = [], torch.zeros(()).double(), []
        for micro in range(2):
            row = slice(2 * data_rank + micro, 2 * data_rank + micro + 1)
            part = sequences_of(b, row)
            weight = rk.token_weights(
                part.mask, mode, num_tokens=tokens, num_sequences=4, data_parallel_size=2
            )
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
            got = rk.token_weights(
                mine, mode, count_empty=count_empty, parallel=Parallel(data_group=world())
            )
            assert_close(got, whole[2 * rank() : 2 * rank() + 2])
    empty = rk.token_weights(torch.zeros(2, 3), parallel=Parallel(data_group=world()))
    assert torch.equal(empty, torch.zeros(2, 3))


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
            for name in ("gspo", "gmpo", "vespo", "opsm", "sequence_importance", "custom"):
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


def weights_of_pieces() -> None:
    b = make_batch()
    parallel = Parallel(segment_group=world())
    for at in PIECES:
        mine = b.mask[:, at[rank()] : at[rank() + 1]]
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"):
            for count_empty in (True, False):
                options: dict[str, Any] = {"count_empty": count_empty, "max_length": 6}
                whole = rk.token_weights(b.mask, mode, **options)
                got = rk.token_weights(mine, mode, parallel=parallel, **options)
                assert_close(got, whole[:, at[rank()] : at[rank() + 1]])
    refused(
        ValueError, "max_length: expected L_max for pieces of sequences in mode constant, got None",
        lambda: rk.token_weights(mine, "constant", parallel=parallel),
    )  # fmt: skip


# ---- 2 x 2


def grid_of_vocabulary_and_data() -> None:
    row, column = grid()
    window_over_ranks(vocab=row, data=column)


def grid_of_vocabulary_and_pieces() -> None:
    row, column = grid()
    pieces_of_sequences(vocab=row, segment=column)


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


# ---- errors


def refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    import pytest

    with pytest.raises(error, match=message):
        call()


def errors() -> None:
    b = make_batch()
    y = b.targets.clamp_min(0)
    mine = own(b.logits)
    columns = bounds(V)[rank() + 1] - bounds(V)[rank()]

    def stats(parallel: Any, logits: Tensor = mine, targets: Tensor = y) -> Any:
        return rk.token_stats(logits, targets, parallel=parallel)

    refused(
        ValueError, f"vocab_size: expected at most the {V} columns of all ranks, got 14",
        lambda: stats(Parallel(world(), vocab_size=14)),
    )  # fmt: skip
    parallel = Parallel(world())
    stats(parallel)
    refused(
        ValueError, f"logits: expected {columns} columns as in the first use of this Parallel",
        lambda: stats(parallel, torch.zeros(*y.shape, columns + 1)),
    )  # fmt: skip
    refused(
        ValueError, r"targets: expected values in \[0, 13\), got 13",
        lambda: stats(parallel, mine, torch.full_like(y, 13)),
    )  # fmt: skip
    refused(
        ValueError, "parallel: expected a Parallel or None, got ProcessGroup",
        lambda: stats(world()),
    )  # fmt: skip
    not_mine = dist.new_group([0])
    if rank() != 0:
        refused(
            ValueError, r"vocab_group: expected a ProcessGroup that this rank is in",
            lambda: Parallel(vocab_group=not_mine),
        )  # fmt: skip
