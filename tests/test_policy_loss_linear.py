"""linear_token_stats and linear_policy_loss: what they equal, what chunks may not change."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import assert_same_bits
from policy_loss_linear_cases import (
    BF16,
    DTYPES,
    EACH_PATH,
    F16,
    F32,
    F64,
    NAN,
    OBJECTIVES,
    SHAPES,
    B,
    custom,
    gradients,
    linear,
    move,
    off_by,
    operands,
    problem,
    whole,
)
from policy_loss_literal import LENGTHS, T, batch, make_batch
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, _load, linear_policy_loss, linear_token_stats
from reasonkern.policy_loss.chunks import Plan, chunk_size

front = importlib.import_module("reasonkern.policy_loss.linear")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["cpu", "cuda", "triton"])
def device(request: pytest.FixtureRequest, force_backend: Callable[[str], None]) -> str:
    """Where the operands are: on a GPU with the row operators of one backend or the other."""
    backend = request.param
    if backend == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if problem := _load.reason(backend):
        pytest.skip(problem)
    force_backend(backend)
    return "cuda"


# ---- equal to the materialised logits


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_equals_the_loss_of_the_logits(name: str, form: str) -> None:
    """Loss, rows, metrics and the gradients of hidden states, weight and bias, in float64."""
    b = batch(form, spread=0.3)
    objective = OBJECTIVES[name]
    if name == "per row" and form == "packed":
        objective = Objective.ppo(ratio_max=1 + torch.rand(sum(LENGTHS)))
    x = operands(b)
    expected = whole(x, b, objective)
    expected_gradients = gradients(expected, x, -1.5)
    assert all(g.any() for g in expected_gradients)
    for options in ({"chunk_rows": 4}, {"compact": True, "chunk_rows": 4}):
        out = linear(x, b, objective, **options)
        assert_close(out[:4], expected[:4], rtol=1e-10, atol=1e-12)
        assert_close(out.metrics.compute(), expected.metrics.compute(), rtol=1e-9, atol=1e-12)
        assert_close(gradients(out, x, -1.5), expected_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [Objective.dapo(entropy_coef=0.1), custom], ids=["3", "4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_as_accurate_as_on_the_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, objective: Any, device: str
) -> None:
    """Against float64: error at most twice that of F.linear and policy_loss, plus 2 ulp.

    A float64 result has no better truth than one rounded like itself: there the bound of what a
    product rounds, D eps |h| |W|^T, comes on top; products of other sizes add in other orders.
    """
    x, y, given = problem(*shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in x]

    def results(out: rk.PolicyLossOutput, leaves: list[Tensor]) -> list[Tensor]:
        return [*(t.detach() for t in out[:4]), *torch.autograd.grad(out.loss, leaves)]

    truth = results(rk.policy_loss(F.linear(*exact), y, objective=objective, **given), exact)
    x, y, given = move(x, y, given, device)
    given["objective"] = objective
    base = off_by(results(rk.policy_loss(F.linear(*x), y, **given), x), truth)
    products = (exact[0].detach().abs() @ exact[1].detach().abs().mT).max().item()
    reordered = 2 * shape[1] * products if dtype == F64 else 0.0
    for chunk_rows in (None, 16, 5):
        found = results(linear_policy_loss(*x[:2], y, bias=x[2], chunk_rows=chunk_rows, **given), x)
        for got, error, b, t in zip(found, off_by(found, truth), base, truth, strict=True):
            size = max(t.abs().max().item(), 1e-3 if dtype == BF16 else 1e-6)
            assert error <= 2 * b + (4 + reordered) * torch.finfo(got.dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_equal_those_of_the_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    x, y, _ = problem(*shape, dtype, device)
    mask = torch.arange(shape[0], device=device) % 5 != 2
    y[~mask] = -100
    options: dict[str, Any] = {"mask": mask, "temperature": 0.7, "softcap": 15.0}
    expected = rk.token_stats(F.linear(*x), y, **options)
    size = {F64: 1e-12, F32: 2e-6, BF16: 2e-2}[dtype]
    sums = [
        sum((i + 1) * t.sum() for i, t in enumerate(s[:4]))
        for s in (expected, linear_token_stats(*x[:2], y, bias=x[2], **options))
    ]
    gradient = torch.autograd.grad(sums[0], x)
    assert_close(torch.autograd.grad(sums[1], x), gradient, rtol=size, atol=8 * size)
    for more in ({"chunk_rows": 8}, {"chunk_rows": 3, "compact": True}):
        out = linear_token_stats(*x[:2], y, bias=x[2], **options, **more)
        assert_close(out[:6], expected[:6], rtol=size, atol=size)
        assert not any(t[~mask].any() for t in out)
        if dtype == F64:
            assert torch.equal(out.is_top1, expected.is_top1)


def test_gradcheck_of_every_statistic() -> None:
    x, y, _ = problem(5, 3, 11, F64)
    x[0].detach()[2] *= 0.1

    def statistics(*x: Tensor) -> tuple[Tensor, ...]:
        return linear_token_stats(*x[:2], y, bias=x[2], chunk_rows=2, softcap=5.0)[:4]

    assert torch.autograd.gradcheck(statistics, x)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 1.5, 2.0])], ids=["1", "B"])
def test_padded_rows_temperature_and_strided_hidden(temperature: Any) -> None:
    b = make_batch()
    hidden, weight, bias = operands(b)
    longer = torch.cat((hidden, hidden[:, :1] + NAN), 1).detach().requires_grad_()
    options = {"temperature": temperature, "softcap": 9.0}
    out = linear([longer[:, :-1], weight, bias], b, OBJECTIVES["every term"], **options)
    expected = whole([hidden, weight, bias], b, OBJECTIVES["every term"], **options)
    assert_close(out[:4], expected[:4], rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(out.loss, longer)
    assert not gradient[:, -1].any()
    assert_close(gradient[:, :-1], gradients(expected, [hidden])[0], rtol=1e-9, atol=1e-12)


# ---- bits


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 7, 32])
def test_ratio_is_one_on_the_first_update(
    chunk_rows: int | None, dtype: torch.dtype, device: str
) -> None:
    """Old log-probabilities from the no-grad pass: nothing is clipped even between 1 and 1."""
    x, y, given = problem(45, 24, 1003, dtype, device)
    with torch.no_grad():
        stats = linear_token_stats(*x[:2], y, bias=x[2], chunk_rows=chunk_rows)
    for objective in (Objective.ppo(1.0, 1.0), Objective.gspo(1.0, 1.0)):
        given |= {"old_logprob": stats.logprob, "objective": objective}
        if objective.level == "sequence":
            given |= {
                "segments": torch.tensor([0, 20, 45], device=device),
                "advantage": torch.ones(2, device=device),
            }
        out = linear_policy_loss(*x[:2], y, bias=x[2], chunk_rows=chunk_rows, **given)
        values = out.metrics.compute()
        assert values["ratio_min"] == values["ratio_max"] == 1 and values["clip_frac"] == 0
        live = given["weight"] != 0
        assert_same_bits(out.logprob[live], stats.logprob[live])
        assert_same_bits(out.entropy[live], stats.entropy[live])


def test_rows_do_not_depend_on_the_batch_at_equal_chunk_rows(device: str) -> None:
    """The last chunk is filled up, so every product has the same shape."""
    x, y, _ = problem(50, 24, 1003, F32, device)
    with torch.no_grad():
        many = linear_token_stats(*x[:2], y, bias=x[2], chunk_rows=16)
        few = linear_token_stats(x[0][:19], x[1], y[:19], bias=x[2], chunk_rows=16)
    assert_same_bits(few, [t[:19] for t in many])


def test_deterministic(device: str) -> None:
    x, y, given = problem(50, 24, 1003, BF16, device)
    given["objective"] = Objective.dapo()
    results = []
    for _ in range(2):
        out = linear_policy_loss(*x[:2], y, bias=x[2], chunk_rows=16, **given)
        results.append([*(t.detach() for t in out[:4]), *torch.autograd.grad(out.loss, x)])
    assert_same_bits(*results)


@pytest.mark.parametrize("objective", [Objective.dapo(), custom], ids=["3", "4"])
def test_gradient_of_the_head_is_summed_in_float32(objective: Any) -> None:
    """40 chunks or one: the bfloat16 gradient is the same up to one rounding of the sum."""
    x, y, given = problem(320, 16, 64, BF16)
    given |= {"objective": objective, "weight": torch.full((320,), 1 / 320)}
    one, many = (
        gradients(linear_policy_loss(*x[:2], y, bias=x[2], chunk_rows=rows, **given), x)
        for rows in (320, 8)
    )
    by_hand = [torch.zeros_like(t) for t in x[1:]]
    for i in range(0, 320, 8):  # what summing in the weight's dtype would give
        part = {k: v[i : i + 8] if isinstance(v, Tensor) else v for k, v in given.items()}
        rows = slice(i, i + 8)
        out = linear_policy_loss(x[0][rows], x[1], y[rows], bias=x[2], **part)
        for total, g in zip(by_hand, gradients(out, x[1:]), strict=True):
            total += g
    for a, b, rounded in zip(one[1:], many[1:], by_hand, strict=True):
        assert a.dtype == BF16
        ulp = torch.finfo(BF16).eps * a.float().abs()
        assert ((a.float() - b.float()).abs() <= ulp).all()
        assert ((rounded.float() - a.float()).abs() > 2 * ulp).any()  # hard enough to notice


# ---- rows that are left out


@EACH_PATH
@pytest.mark.parametrize("compact", [False, True])
def test_inactive_rows_may_hold_anything(name: str, compact: bool) -> None:
    b = make_batch()
    x = operands(b)
    expected = linear(x, b, OBJECTIVES[name], chunk_rows=5)
    dirty = [torch.where(b.mask[..., None], x[0], NAN).detach().requires_grad_(), *x[1:]]
    out = linear(dirty, b, OBJECTIVES[name], chunk_rows=5, compact=compact)
    assert_close(out[:4], expected[:4], rtol=1e-12, atol=1e-14)
    found = gradients(out, dirty)
    assert not found[0][~b.mask].any()
    assert_close(found, gradients(expected, x), rtol=1e-10, atol=1e-13)


@EACH_PATH
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_nonfinite_row_is_left_out_and_counted(name: str, value: float) -> None:
    b = make_batch()
    x, without = operands(b), {k: getattr(b, k).clone() for k in ("weight", "entropy_weight")}
    for w in without.values():
        w[0, 0] = 0
    expected = gradients(linear(x, b, OBJECTIVES[name], **without), x)
    x[0].detach()[0, 0, 3] = value
    out = linear(x, b, OBJECTIVES[name])
    assert torch.isfinite(out.loss) and out.metrics.compute()["rows_nonfinite"] == 1
    assert_close(gradients(out, x), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("width", [12, 13])
def test_a_nonfinite_row_reaches_no_neighbour(width: int, dtype: torch.dtype, device: str) -> None:
    """bfloat16 products read past rows of odd length."""
    x, y, given = problem(37, width, 101, dtype, device)
    given |= {"objective": custom if dtype == F16 else Objective.dapo()}
    expected = linear_policy_loss(*x[:2], y, bias=x[2], **given)
    x[0].detach()[1::2] = NAN
    out = linear_policy_loss(*x[:2], y, bias=x[2], **given)
    assert_same_bits(out.logprob[::2], expected.logprob[::2])
    assert all(torch.isfinite(g).all() for g in gradients(out, x))


@EACH_PATH
def test_number_of_active_rows_given(name: str) -> None:
    b = make_batch()
    x, count = operands(b), int(b.mask.sum())
    expected = linear(x, b, OBJECTIVES[name], compact=True)
    for num_active in (count, count + 3, b.mask.numel(), 1000):
        out = linear(x, b, OBJECTIVES[name], compact=True, num_active=num_active)
        assert_close(out[:4], expected[:4], rtol=1e-12, atol=1e-14)
        assert_close(gradients(out, x), gradients(expected, x), rtol=1e-10, atol=1e-13)
        expected = linear(x, b, OBJECTIVES[name], compact=True)


@EACH_PATH
def test_rows_beyond_num_active_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody counts: rows that do not fit are nonfinite, not silently dropped."""
    monkeypatch.setattr(front, "count_on_cpu", lambda *_: None)
    b = make_batch()
    x, kept = operands(b), b.mask.clone()
    kept.view(-1)[b.mask.view(-1).nonzero()[4:]] = False
    out = linear(x, b, OBJECTIVES[name], compact=True, num_active=4)
    assert out.metrics.compute()["rows_nonfinite"] == int(b.mask.sum()) - 4
    assert out.logprob[b.mask & ~kept].isnan().all()
    fewer = {k: torch.where(kept, getattr(b, k), 0.0) for k in ("weight", "entropy_weight")}
    expected = linear(x, b, OBJECTIVES[name], **fewer)
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
    assert_close(gradients(out, x), gradients(expected, x), rtol=1e-10, atol=1e-13)


@EACH_PATH
@pytest.mark.parametrize("compact", [False, True])
def test_all_masked_and_empty_batches(name: str, compact: bool) -> None:
    b = make_batch()
    x = operands(b)
    nothing = {k: torch.zeros(B, T) for k in ("weight", "entropy_weight")}
    out = linear(x, b, OBJECTIVES[name], compact=compact, **nothing)
    assert out.loss == 0 and not any(g.any() for g in gradients(out, x))
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(7, 5, requires_grad=True)
    empty = {n: torch.zeros(0) for n in ("advantage", "weight", "ref_logprob", "rollout_logprob")}
    if name == "gspo":
        empty |= {"segments": torch.tensor([0, 0]), "advantage": torch.zeros(1)}
    y = torch.zeros(0, dtype=torch.int64)
    out = linear_policy_loss(
        hidden, weight, y, objective=OBJECTIVES[name], compact=compact, **empty
    )
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == (0, 5) and not weight.grad.any()
    assert linear_token_stats(hidden, weight, y).entropy.shape == (0,)


# ---- chunks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab", [32_000, 151_936])
def test_default_chunks(vocab: int, device: str) -> None:
    """Equal chunks of whole tiles, within the budget, with hardly any row to fill up."""
    tile, budget = (16, 96 << 20) if device == "cpu" else (128, 5 << 28)
    for rows in (1, 15, 1000, 4096, 8192, 65_537):
        size = chunk_size(rows, vocab, Plan(BF16, -1, False, -1), torch.device(device))
        assert size % tile == 0 and (size - tile) * vocab * 2 <= budget
        chunks = -(-rows // size)
        assert chunks * size - rows < chunks * tile
    assert chunk_size(1000, vocab, Plan(BF16, 77, False, -1), torch.device(device)) == 77
