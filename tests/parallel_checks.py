"""What each rank checks; `test_policy_loss_parallel.py` says in how many processes.

Vocabulary groups here, the rest in `parallel_checks_*.py`. Every rank holds the whole inputs, so it
compares its part with the single-process result itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_loss_cases as cases
import torch
import torch.distributed as dist
from contract import NoHostData
from parallel_cases import (
    EXACT,
    OBJECTIVES,
    ROUNDED,
    ROWS,
    bounds,
    compare,
    gathered,
    grid,
    own,
    rank,
    refused,
    run_loss,
    same_on_all_ranks,
    size,
    world,
)
from policy_loss_literal import Batch, V, batch, make_batch
from tolerance import randn
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, Parallel
from reasonkern.policy_loss import parallel as ranks

# ---- the public functions


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
    certain = rk.token_stats(
        own(b.logits), torch.zeros_like(b.targets), parallel=Parallel(world(), vocab_size=1)
    )
    assert (certain.logprob == 0).all() and (certain.max_prob == 1).all()


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
    b = make_batch()
    parallel = Parallel(world())
    rk.token_stats(own(b.logits), b.targets.clamp_min(0), parallel=parallel)
    with gathered() as found, NoHostData():
        run_loss(b, own(b.logits), OBJECTIVES["gspo"], parallel)
    assert [x.shape for x in found] == [(8, *b.targets.shape)]


def backward_twice() -> None:
    b = make_batch()
    leaf = own(b.logits).clone().requires_grad_()
    logits = leaf * 1.0
    out = rk.policy_loss(
        logits, b.targets, objective=Objective.ppo(), parallel=Parallel(world()),
        inplace_grad=True, **b.given(),
    )  # fmt: skip
    out.loss.backward(retain_graph=True)
    assert torch.equal(logits.detach(), leaf.grad)
    refused(RuntimeError, "differentiated before", out.loss.backward)
    out = rk.policy_loss(
        leaf, b.targets, objective=Objective.ppo(), parallel=Parallel(world()), **b.given()
    )
    first, second = (torch.autograd.grad(out.loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def in_place_over_logits_that_another_op_saved() -> None:
    b = make_batch()
    logits = own(b.logits).clone().requires_grad_() * 1.0
    squares = logits.square().sum()
    out = rk.policy_loss(
        logits, b.targets, objective=Objective.ppo(), parallel=Parallel(world()),
        inplace_grad=True, **b.given(),
    )  # fmt: skip
    refused(RuntimeError, "modified by an inplace operation", (out.loss + squares).backward)


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
    for temperature in (0.7, torch.tensor([0.7, 1.3, 0.9, 2.0])):
        results = []
        for operands, parallel in ((x, None), (own_rows(x), Parallel(world()))):
            hidden = operands[0].clone().requires_grad_()
            stats = rk.linear_token_stats(
                hidden, operands[1], y, bias=operands[2], mask=mask, temperature=temperature,
                softcap=4.0, parallel=parallel,
            )  # fmt: skip
            sum(getattr(stats, name).sum() for name in ("logprob", "lse", "collision")).backward()
            results.append((*stats, hidden.grad))
        for got, expected in zip(results[1], results[0], strict=True):
            assert_close(got, expected, **EXACT)


def linear_frozen_hidden() -> None:
    _, x = linear_problem("packed", torch.float64)
    y = torch.arange(len(x[0])) % V
    gradients = []
    for operands, parallel in ((x, None), (own_rows(x), Parallel(world()))):
        head = operands[1].clone().requires_grad_()
        stats = rk.linear_token_stats(x[0], head, y, bias=operands[2], parallel=parallel)
        gradients += torch.autograd.grad(stats.logprob.sum(), head)
    assert_close(gradients[1], own(gradients[0].t()).t(), **EXACT)


def linear_hidden_of_any_strides() -> None:
    """All ranks add up one layout, the one without columns (of four) included."""
    _, x = linear_problem("packed", torch.float64)
    y = torch.arange(len(x[0])) % V
    gradients = []
    for operands, parallel in ((x, None), (own_rows(x), Parallel(world()))):
        hidden = operands[0].t().contiguous().t().requires_grad_()
        stats = rk.linear_token_stats(hidden, operands[1], y, bias=operands[2], parallel=parallel)
        gradients += torch.autograd.grad(stats.logprob.sum(), hidden)
    assert_close(*gradients, **EXACT)


# ---- DTensor


def linear_group_of_one_rank() -> None:
    """The single-process path, to the bit."""
    groups = [dist.new_group([r]) for r in range(size())]
    b, x = linear_problem("packed", torch.float32)
    expected, whole = run_linear(b, x, OBJECTIVES["dapo_entropy"], None)
    got, parts = run_linear(b, x, OBJECTIVES["dapo_entropy"], Parallel(groups[rank()]))
    for a, e in zip((*got[:4], *parts), (*expected[:4], *whole), strict=True):
        assert torch.equal(a, e)


def second_derivatives() -> None:
    """Refused on every rank, one without columns included: nothing is silently left out."""
    b, x = linear_problem("padded", torch.float64)
    given = b.given(objective=OBJECTIVES["dapo_entropy"], parallel=Parallel(world()))
    logits, hidden = (t.clone().requires_grad_() for t in (own(b.logits), x[0]))
    head, bias = own_rows(x)[1:]
    for leaf, out in (
        (logits, rk.policy_loss(logits, b.targets, **given)),
        (hidden, rk.linear_policy_loss(hidden, head, b.targets, bias=bias, **given)),
    ):
        loss = out.loss + leaf.pow(3).sum()  # which has them
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        refused(RuntimeError, "no second derivatives", gradient.square().sum().backward)


def dtensor_logits() -> None:
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (size(),))
    groups = (None, Parallel(vocab_group=mesh.get_group()), Parallel(vocab_size=V))
    spread: list[Any] = [(mesh, [Shard(-1)], parallel) for parallel in groups]
    if size() == 4:
        square = init_device_mesh("cpu", (2, 2))
        spread += [(square, p, None) for p in ([Replicate(), Shard(2)], [Shard(2), Replicate()])]
    b = make_batch()
    for objective in (OBJECTIVES["dapo_entropy"], OBJECTIVES["vespo"]):
        expected, gradient = run_loss(b, b.logits, objective, None)
        for where, placements, parallel in spread:
            padding = 5 if parallel == groups[2] else 0  # without it 13 columns: uneven
            logits = pad(b.logits, (0, padding), value=cases.NAN)
            leaf = distribute_tensor(logits, where, placements).detach().requires_grad_()
            out = rk.policy_loss(
                leaf, b.targets, objective=objective, parallel=parallel, **b.given(*ROWS)
            )
            (3 * out.loss).backward()
            compare(out, expected, **EXACT)
            assert isinstance(leaf.grad, DTensor)
            assert_close(leaf.grad.full_tensor(), pad(gradient, (0, padding)), **EXACT)
    refused(
        ValueError, r"logits: expected a DTensor with one Shard\(2\), otherwise Replicate",
        lambda: rk.token_stats(distribute_tensor(b.logits, mesh, [Replicate()]), b.targets),
    )  # fmt: skip
    refused(
        ValueError, r"targets: expected values in \[0, 13\) in rows .*, got 13",
        lambda: rk.token_stats(
            distribute_tensor(b.logits, mesh, [Shard(2)]), torch.full_like(b.targets, V)
        ),
    )  # fmt: skip
    refused(
        ValueError, "vocab_group: expected None or the group of the DTensor's mesh",
        lambda: rk.token_stats(
            distribute_tensor(b.logits, mesh, [Shard(2)]), b.targets, parallel=Parallel(world())
        ),
    )  # fmt: skip


# ---- errors


def errors() -> None:
    b = make_batch()
    y = b.targets.clamp_min(0)
    mine = own(b.logits)
    columns = bounds(V)[rank() + 1] - bounds(V)[rank()]

    def stats(parallel: Any, logits: Tensor = mine, targets: Tensor = y) -> Any:
        return rk.token_stats(logits, targets, parallel=parallel)

    for given, logits, limit in ((14, mine, V), (None, mine[..., :0], 0)):
        refused(
            ValueError, rf"vocab_size: expected an integer in \[1, {limit}\], the columns of all",
            lambda given=given, x=logits: stats(Parallel(world(), vocab_size=given), x),
        )  # fmt: skip
    parallel = Parallel(world())
    stats(parallel)
    for other in (columns + 1, abs(columns - 1)):
        refused(
            ValueError, f"logits: expected {columns} columns as in the first use of this Parallel",
            lambda other=other: stats(parallel, torch.zeros(*y.shape, other)),
        )  # fmt: skip
    for logits, message in (
        ([0.0], "logits: expected a tensor, got list"),
        (torch.tensor(0.0), r"logits: expected shape \(N, V\) or \(B, T, V\), got \(\)"),
    ):
        refused(ValueError, message, lambda logits=logits: stats(parallel, logits))
    refused(
        ValueError, r"targets: expected values in \[0, 13\) in rows .*, got 13",
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
