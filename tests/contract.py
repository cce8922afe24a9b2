"""The contract every operator must keep, as functions over sample inputs.

A sample is the operator's argument tuple. A family's tests call `run_contract` once per operator;
what opcheck does not see (strided incoming gradients, writes outside a view, nondeterminism,
inputs changed) is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.testing._internal.optests import aot_autograd_check

SENTINEL = 7.25


def bits(x: Tensor) -> Tensor:
    """The representation, so that NaN equals NaN and 0 differs from -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])


def assert_same_bits(got: Any, expected: Any) -> None:
    got, expected = _tensors(got), _tensors(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


def _tensors(out: Any) -> tuple[Tensor, ...]:
    if out is None:
        return ()
    return (out,) if isinstance(out, Tensor) else tuple(out)


class NoHostData(TorchFunctionMode):
    """Refuses tensors of numbers of the host: their copy to a device synchronises."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), args
        return func(*args, **(kwargs or {}))


def clone_args(args: Sequence[Any]) -> list[Any]:
    """Copies that keep strides and requires_grad."""
    out = []
    for a in args:
        if isinstance(a, Tensor):
            copy = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
            copy.copy_(a.detach())
            a = copy.requires_grad_(a.requires_grad)
        out.append(a)
    return out


def embed(x: Tensor, offset: int = 3) -> tuple[Tensor, Tensor]:
    """(buffer of sentinels, view of it holding x at an odd offset with padded rows)."""
    *lead, last = x.shape
    rows = x.numel() // max(last, 1)
    pitch = last + 5
    fill = int(SENTINEL) if not x.is_floating_point() else SENTINEL
    buffer = torch.full((offset + rows * pitch,), fill, dtype=x.dtype, device=x.device)
    strides = [pitch]
    for size in reversed(lead[1:]):
        strides.insert(0, strides[0] * size)
    view = buffer.as_strided(x.shape, (*strides[: len(lead)], 1), offset)
    view.copy_(x)
    return buffer, view


def is_traced(sample: Sequence[Any]) -> bool:
    """Whether to trace a call: to the Python of operators float16 is what bfloat16 is."""
    return sample[0].dtype != torch.float16


def check_opcheck(op: Callable[..., Any], sample: Sequence[Any], visible: int | None) -> None:
    """opcheck; with `visible`, AOT dispatch is checked over the first `visible` outputs only.

    An output that the backward consumes in place cannot also be an output of a traced graph.
    """
    if visible is None and is_traced(sample):
        opcheck(op, tuple(clone_args(sample)))
        return
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op, tuple(clone_args(sample)), test_utils=tests)
    if is_traced(sample):
        aot_autograd_check(
            lambda *args: op(*args)[:visible], tuple(clone_args(sample)), {}, dynamic=True
        )


def check_deterministic(op: Callable[..., Any], sample: Sequence[Any]) -> None:
    first, second = clone_args(sample), clone_args(sample)
    assert_same_bits(op(*first), op(*second))
    assert_same_bits(
        [a for a in first if isinstance(a, Tensor)], [a for a in second if isinstance(a, Tensor)]
    )


def check_inputs_untouched(
    op: Callable[..., Any], sample: Sequence[Any], mutable: Sequence[int] = ()
) -> None:
    args = clone_args(sample)
    op(*args)
    for i, (before, after) in enumerate(zip(sample, args, strict=True)):
        if isinstance(before, Tensor) and i not in mutable:
            assert_same_bits(after.detach(), before.detach())


def check_sentinels(
    op: Callable[..., Any], sample: Sequence[Any], index: int = 0, mutable: bool = False
) -> None:
    """Argument `index` cut from a larger buffer: same results, nothing written beside the view."""
    plain, guarded = clone_args(sample), clone_args(sample)
    buffer, guarded[index] = embed(guarded[index].detach())
    plain[index] = plain[index].detach()
    outside = torch.ones_like(buffer, dtype=torch.bool)
    x = guarded[index]
    outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    before = buffer[outside].clone()
    assert_same_bits(op(*guarded), op(*plain))
    assert torch.equal(buffer[outside], before)
    if mutable:
        assert_same_bits(guarded[index], plain[index])


def check_gradient_strides(op: Callable[..., Any], sample: Sequence[Any], outputs: int = 1) -> None:
    """Expanded (stride 0) and sliced incoming gradients give what a contiguous one gives."""

    def gradient(make: Callable[[Tensor], Tensor]) -> Tensor:
        args = clone_args(sample)
        args[0] = args[0].detach().requires_grad_()
        outs = _tensors(op(*args))[:outputs]
        grads = [make(torch.full_like(o, 0.5 + 0.25 * i)) for i, o in enumerate(outs)]
        return torch.autograd.grad(outs, args[0], grads)[0]

    expected = gradient(lambda g: g)
    expanded = gradient(lambda g: g.reshape(-1)[:1].reshape((1,) * g.ndim).expand(g.shape))
    sliced = gradient(lambda g: torch.stack((g, g), -1)[..., 0])
    assert_same_bits(expanded, expected)
    assert_same_bits(sliced, expected)


def check_compile(op: Callable[..., Any], sample: Sequence[Any]) -> None:
    """torch.compile without a graph break gives the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    eager, traced = clone_args(sample), clone_args(sample)
    assert_same_bits(op(*eager), compiled(*traced))
    tensors = [i for i, a in enumerate(sample) if isinstance(a, Tensor)]
    assert_same_bits([traced[i].detach() for i in tensors], [eager[i].detach() for i in tensors])


def run_contract(
    op: Callable[..., Any],
    samples: Sequence[Sequence[Any]],
    *,
    mutable: Sequence[int] = (),
    differentiable_outputs: int = 0,
    visible: int | None = None,
    views: bool = True,
) -> None:
    """Every check on every sample; `mutable` are the indices of arguments the schema marks (a!).

    `views`: the first argument may be a view with padded rows.
    """
    for sample in samples:
        check_opcheck(op, sample, visible)
        check_deterministic(op, sample)
        check_inputs_untouched(op, sample, mutable)
        detached = [a.detach() if isinstance(a, Tensor) else a for a in sample]
        if is_traced(sample):
            check_compile(op, detached)
        if sample[0].numel():
            if views:
                check_sentinels(op, detached, mutable=bool(mutable))
            if differentiable_outputs and isinstance(sample[0], Tensor):
                check_gradient_strides(op, sample, differentiable_outputs)
