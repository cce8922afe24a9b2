"""torch.compile: no graph break, eager's results, and no recompilation over values and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from policy_loss_literal import Batch, batch, make_batch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, RowContext, policy_loss, token_stats, token_weights

F32 = torch.float32
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def custom(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
    mean = ctx.sequence_sum(ctx.weight * logp)
    return -ctx.advantage * (logp + 0.1 * mean)


OBJECTIVES: dict[str, tuple[Any, torch.dtype]] = {
    "dapo": (Objective.dapo(), F32),
    "every term": (
        Objective.ppo(
            dual_clip=2.0,
            kl=("k3", 0.1, True),
            entropy_coef=0.1,
            importance=("token", "truncate", 0.5, 1.5),
        ),
        F32,
    ),
    "half": (Objective.dapo(entropy_coef=0.1), torch.float16),
    "sequence importance": (Objective.ppo(importance=("sequence", "mask", 0.1, 9.0, True)), F32),
    "gspo": (Objective.gspo(0.9, 1.1, opsm=0.1), F32),
    "gmpo": (Objective.gmpo(kl=("k2", 0.1)), F32),
    "vespo": (Objective.vespo(), F32),
    "custom": (custom, F32),
}


def train_step(b: Batch, objective: Any, inplace: bool) -> Callable[[Tensor], Any]:
    given = b.given("ref_logprob", "rollout_logprob", "entropy_weight")

    def step(x: Tensor) -> Any:
        out = policy_loss(x * 1, b.targets, objective=objective, inplace_grad=inplace, **given)
        return out.loss, out.token_loss, out.logprob, out.entropy, out.metrics.compute()

    return step


def results(step: Callable[[Tensor], Any], b: Batch, dtype: torch.dtype) -> Any:
    x = b.logits.to(dtype).clone().requires_grad_()
    out = step(x)
    out[0].backward()
    return *(t.detach() if isinstance(t, Tensor) else t for t in out), x.grad


CASES = [
    pytest.param(name, form, inplace, marks=[] if n % 4 == i else slow)
    for n, name in enumerate(OBJECTIVES)
    for i, (form, inplace) in enumerate(
        (("padded", False), ("packed", True), ("padded", True), ("packed", False))
    )
]


@pytest.mark.parametrize(("name", "form", "inplace"), CASES)
def test_traced_without_a_graph_break_equals_eager(name: str, form: str, inplace: bool) -> None:
    objective, dtype = OBJECTIVES[name]
    b = batch(form).to(F32)
    step = train_step(b, objective, inplace)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, b, dtype), results(step, b, dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "inplace", "form"),
    [
        ("dapo", True, "packed"),
        pytest.param("every term", False, "padded", marks=slow),
        pytest.param("gspo", False, "packed", marks=slow),
    ],
)
def test_inductor_equals_eager(name: str, inplace: bool, form: str) -> None:
    objective, dtype = OBJECTIVES[name]
    b = batch(form).to(F32)
    every = train_step(b, objective, inplace)

    def step(x: Tensor) -> Any:  # compiling the metrics takes most of the time
        return every(x)[: 4 if name == "dapo" else 5]

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    # Scalar code: else programs are compiled to find out what this machine's vectors can do.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        found = results(compiled, b, dtype)
    assert_close(found, results(step, b, dtype), rtol=1e-5, atol=1e-6)


def test_token_stats_and_weights_compile() -> None:
    b = make_batch(F32)

    def statistics(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        s = token_stats(x, b.targets, mask=mask, temperature=0.8, softcap=10.0)
        w = token_weights(mask, "seq-mean-token-mean")
        return (w * (s.logprob + s.entropy + s.lse + s.collision)).sum(), s.varentropy

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    found = []
    for f in (statistics, compiled):
        x = b.leaf()
        loss, varentropy = f(x, b.mask)
        found.append((loss.detach(), varentropy, torch.autograd.grad(loss, x)[0]))
    assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_rollout_mismatch_compiles(form: str) -> None:
    b = batch(form)

    def values(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
        found = rk.rollout_mismatch(old, rollout, mask, segments=b.segments)
        return (found + found).compute()

    rows = b.old_logprob, b.rollout_logprob, b.mask
    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*rows), values(*rows), rtol=1e-12, atol=1e-14)


def test_a_model_step_compiles_as_a_whole() -> None:
    """lm_head, loss and metrics in one graph, the gradient over the logits."""
    b = batch("padded").to(F32)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*b.targets.shape, 5, generator=g)
    lm_head = torch.randn(b.logits.shape[-1], 5, generator=g)

    def step(weight: Tensor, hidden: Tensor) -> Tensor:
        logits = hidden @ weight.T
        given = b.given(inplace_grad=True)
        return policy_loss(logits, b.targets, objective=Objective.ppo(), **given).loss

    found = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight, x = lm_head.clone().requires_grad_(), hidden.clone().requires_grad_()
        loss = f(weight, x)
        found.append((loss.detach(), *torch.autograd.grad(loss, (weight, x))))
    assert_close(*found, rtol=1e-6, atol=1e-7)


BUILT: dict[str, Callable[[], Objective]] = {
    "dapo": lambda: Objective.dapo(entropy_coef=0.1, kl=("k3", 0.1)),
    "sapo": Objective.sapo,
    "vespo": Objective.vespo,
    "high_entropy": Objective.high_entropy,
}


@pytest.mark.parametrize("name", BUILT)
def test_an_objective_built_inside_a_dynamic_graph(name: str) -> None:
    """With dynamic=True the constructors' default numbers are symbols, too."""
    b = make_batch(F32)
    given = b.given("ref_logprob")

    def step(x: Tensor) -> Tensor:
        return policy_loss(x, b.targets, objective=BUILT[name](), **given).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    x, y = b.leaf(), b.leaf()
    loss, expected = compiled(x), step(y)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y))


@pytest.mark.parametrize("objective", [Objective.dapo(), Objective.gspo(0.9, 1.1)])
def test_tokens_of_any_batch_beside_advantages_of_one(objective: Objective) -> None:
    """The batch is a symbol in the shapes of the tokens and a number in that of the advantages."""
    tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5)), token_weights(torch.ones(3, 5))
    advantage = torch.randn(3)

    def step(x: Tensor, targets: Tensor, weight: Tensor, advantage: Tensor) -> Tensor:
        given = {"advantage": advantage, "weight": weight, "objective": objective}
        return policy_loss(x, targets, **given).loss

    for x in tokens:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tokens, advantage), step(*tokens, advantage))


SCHEDULES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "ratio_max": lambda v: {"objective": Objective.ppo(ratio_max=v)},
    "entropy_coef": lambda v: {"objective": Objective.cispo(2.0, entropy_coef=v)},
    "kl_coef": lambda v: {"objective": Objective.ppo(kl=("k3", v))},
    "tau": lambda v: {"objective": Objective.sapo(v, v)},
    "gspo": lambda v: {"objective": Objective.gspo(ratio_max=v)},
    "temperature": lambda v: {"objective": Objective.ppo(), "temperature": v},
    "loss_scale": lambda v: {"objective": Objective.ppo(), "loss_scale": v},
}


QUICK = ("ratio_max", "temperature", "gspo")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=slow) for n in SCHEDULES]
)
def test_one_graph_over_six_values_of_a_tensor(name: str) -> None:
    b = make_batch(F32)
    given = b.given("ref_logprob")

    def step(x: Tensor, v: Tensor) -> Tensor:
        return policy_loss(x, b.targets, **SCHEDULES[name](v), **given).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (1.05, 1.1, 1.2, 1.4, 1.8, 2.6):
        x, y, v = b.leaf(), b.leaf(), torch.tensor(value)
        loss, expected = compiled(x, v), step(y, v)
        assert_close(loss, expected)
        assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("form", "objective"),
    [
        ("padded", Objective.ppo(entropy_coef=0.1)),
        ("packed", Objective.gspo()),
        pytest.param("packed", Objective.ppo(entropy_coef=0.1), marks=slow),
        pytest.param("padded", Objective.gspo(), marks=slow),
    ],
    ids=["padded ppo", "packed gspo", "packed ppo", "padded gspo"],
)
def test_at_most_three_graphs_over_lengths(form: str, objective: Objective) -> None:
    g = torch.Generator().manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor, advantage: Tensor, offsets: Tensor | None) -> Tensor:
        w = token_weights(y >= 0, "seq-mean-token-sum", segments=offsets)
        given = {"advantage": advantage, "weight": w, "segments": offsets}
        return rk.policy_loss(x, y, objective=objective, **given).loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for sequences, tokens in ((2, 5), (3, 7), (4, 9), (6, 12), (3, 30), (9, 4)):
        shape = (sequences, tokens) if form == "padded" else (sequences * tokens,)
        x = torch.randn(*shape, 11, generator=g)
        y = torch.randint(11, shape, generator=g)
        advantage = torch.randn(sequences, generator=g)
        offsets = None if form == "padded" else tokens * torch.arange(sequences + 1)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, expected = compiled(one, y, advantage, offsets), step(two, y, advantage, offsets)
        assert_close(loss, expected)
        assert_close(torch.autograd.grad(loss, one), torch.autograd.grad(expected, two))
    assert counter.frame_count <= 3
