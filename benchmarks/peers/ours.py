"""reasonkern itself: the backend that the package picks on CPU, each GPU backend by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Case, Provider, Runner, Skip
from benchmarks.peers import Terms, loss_and_gradient, loss_and_head_gradients, statistics

if TYPE_CHECKING:
    from benchmarks.linear_policy_loss import HeadBatch
    from benchmarks.policy_loss import Batch, Spec

Build = Callable[[Case, Any], Runner]


def library() -> Any:
    try:
        import reasonkern
    except ImportError as missing:
        raise Skip(f"reasonkern cannot be imported ({missing})") from None
    return reasonkern


def objective_of(spec: Spec) -> Any:
    rk = library()
    make = rk.Objective.gspo if spec.sequence_level else rk.Objective.dapo
    return make(spec.ratio_min, spec.ratio_max, entropy_coef=spec.entropy_coef)


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    rk = library()

    def compute(logits: Tensor) -> dict[str, Tensor]:
        stats = rk.token_stats(logits, batch.targets)
        return {"logprob": stats.logprob, "entropy": stats.entropy, "lse": stats.lse}

    return on_cpu(case, statistics(batch.logits, compute))


def policy_loss_runner(case: Case, batch: Batch) -> Runner:
    rk, spec = library(), case.spec
    objective = objective_of(spec)
    leaf = (batch.logits.clone() if spec.inplace else batch.logits.detach()).requires_grad_()

    def compute(logits: Tensor) -> Terms:
        out = rk.policy_loss(
            logits,
            batch.targets,
            old_logprob=batch.old_logprob,
            advantage=batch.advantage,
            weight=batch.weight,
            objective=objective,
            inplace_grad=spec.inplace,
        )
        return Terms(out.loss, out.logprob, out.entropy)

    def refill() -> None:
        leaf.detach().copy_(batch.logits)

    return on_cpu(case, loss_and_gradient(leaf, compute, refill if spec.inplace else None))


def linear_policy_loss_runner(case: Case, batch: HeadBatch) -> Runner:
    compute = linear_loss(case, batch)
    return on_cpu(case, loss_and_head_gradients(batch.hidden, batch.head, compute), "policy_loss")


def linear_in_calls_of_1k_runner(case: Case, batch: HeadBatch) -> Runner:
    """The same rows, one sequence a call: what the cost per token of a long call is held against.

    The gradient of the head is dropped from call to call, as an optimiser step would.
    """
    calls = [
        loss_and_head_gradients(one.hidden, one.head, linear_loss(case, one))
        for one in map(batch.sequence, range(batch.hidden.shape[0]))
    ]

    def call() -> list[Any]:
        return [part.call() for part in calls]

    def outputs(results: list[Any]) -> dict[str, Tensor]:
        parts = [part.outputs(result) for part, result in zip(calls, results, strict=True)]
        return {
            name: torch.cat([part[name] for part in parts])
            for name in ("logprob", "entropy", "grad_hidden")
        }

    return Runner(call, outputs)


def linear_loss(case: Case, batch: HeadBatch) -> Callable[[Tensor, Tensor], Terms]:
    rk, spec = library(), case.spec
    objective = objective_of(spec)

    def compute(hidden: Tensor, head: Tensor) -> Terms:
        out = rk.linear_policy_loss(
            hidden,
            head,
            batch.targets,
            old_logprob=batch.old_logprob,
            advantage=batch.advantage,
            weight=batch.weight,
            objective=objective,
        )
        return Terms(out.loss, out.logprob, out.entropy)

    return compute


def on_cpu(case: Case, runner: Runner, op: str = "") -> Runner:
    """Notes which backend serves CPU tensors: without the built extension it is the reference."""
    if case.device == "cpu":
        rows = library().info()["ops"][op or case.op]
        serving = next(row["backend"] for row in rows if "cpu" in row["serves"])
        runner.about["backend"] = serving
    return runner


def on_gpu(backend: str, build: Build) -> Build:
    """The same work, with every op of a CUDA tensor sent to one backend, and the ops noted."""

    def build_forced(case: Case, inputs: Any) -> Runner:
        library()
        inner = build(case, inputs)
        ops: set[str] = set()
        inner_call = inner.call

        def call() -> Any:
            with forced(backend, ops):
                result = inner_call()
            inner.about.update(backend=backend, ops=sorted(ops))
            return result

        inner.call = call
        return inner

    return build_forced


def gpu_providers(build: Mapping[str, Build]) -> dict[str, Provider]:
    """By name: the ops on each GPU backend."""
    return {
        f"ours-{backend}": Provider(
            f"ours-{backend}", {op: on_gpu(backend, one) for op, one in build.items()}
        )
        for backend in ("cuda", "triton")
    }


@contextlib.contextmanager
def forced(backend: str, ops: set[str]) -> Iterator[None]:
    """Overrides the package's choice, which goes by evidence that a benchmark is yet to give."""
    from reasonkern import _load

    def choose(name: str, device: object = None, *, triton_serves: bool = True) -> str:
        if not triton_serves:
            raise Skip(f"Triton's {name} does not take these arguments")
        ops.add(name)
        return backend

    with mock.patch.object(_load, "choose_cuda_backend", choose):
        yield
