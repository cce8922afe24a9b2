"""What reasonkern is compared with. Every module turns a case and its inputs into a `Runner`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Runner


class Terms(NamedTuple):
    """What a policy loss gives back, as far as the formulation offers it."""

    loss: Tensor
    logprob: Tensor | None
    entropy: Tensor | None

    def detached(self) -> Terms:
        """Without their graph."""
        return Terms(self.loss.detach(), *(t if t is None else t.detach() for t in self[1:]))

    def outputs(self) -> dict[str, Tensor]:
        """By the names of the truth."""
        rows = {"logprob": self.logprob, "entropy": self.entropy}
        named = {name: t.flatten() for name, t in rows.items() if t is not None}
        return {"loss": self.loss, **named}


class Result(NamedTuple):
    """The terms and the gradient of the logits."""

    terms: Terms
    grad: Tensor


def loss_and_gradient(
    logits: Tensor,
    compute: Callable[[Tensor], Terms],
    reset: Callable[[], None] | None = None,
    valid: Callable[[Tensor], Tensor] = lambda t: t,
) -> Runner:
    """Times forward and backward down to the gradient of `logits` (B, T, V), a leaf.

    `autograd.grad` hands the gradient over as it is, as the backward of the layer that made the
    logits would receive it; `.backward()` on a leaf could add a copy. `valid` cuts off positions
    that a peer wants and that have no target.
    """

    def call() -> Result:
        terms = compute(logits)
        (grad,) = torch.autograd.grad(terms.loss, logits)
        return Result(terms.detached(), grad)

    def outputs(result: Result) -> dict[str, Tensor]:
        return result.terms.outputs() | {"grad": valid(result.grad).flatten(0, 1)}

    return Runner(call, outputs, reset or (lambda: None))


class HeadResult(NamedTuple):
    """The terms and the gradients of the hidden states and of the head."""

    terms: Terms
    grad_hidden: Tensor
    grad_head: Tensor


def loss_and_head_gradients(
    hidden: Tensor, head: Tensor, compute: Callable[[Tensor, Tensor], Terms]
) -> Runner:
    """Times forward and backward down to the gradients of `hidden` (B, T, D) and `head` (V, D)."""
    hidden, head = (x.detach().requires_grad_() for x in (hidden, head))

    def call() -> HeadResult:
        terms = compute(hidden, head)
        return HeadResult(terms.detached(), *torch.autograd.grad(terms.loss, (hidden, head)))

    def outputs(result: HeadResult) -> dict[str, Tensor]:
        gradients = {"grad_hidden": result.grad_hidden.flatten(0, 1), "grad_head": result.grad_head}
        return result.terms.outputs() | gradients

    return Runner(call, outputs)


def statistics(logits: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]) -> Runner:
    """Times row statistics without gradient."""

    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            return compute(logits)

    return Runner(call, lambda result: {k: v.flatten() for k, v in result.items()})
