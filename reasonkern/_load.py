"""Loads the extension libraries, defines and registers ops, and says which backend serves what.

Importing this module never touches CUDA and never imports Triton; both wait for a CUDA tensor or
for `info()`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch.autograd import forward_ad

from reasonkern._evidence import EVIDENCE

Implementation = Callable[..., Any]

BACKENDS = ("reference", "cpu", "cuda", "triton")
_ON_CUDA = ("cuda", "triton")
# backend -> its library, and the namespace and dispatch key under which it implements an op
_LIBRARIES = {"cpu": ("_C", "reasonkern", "CPU"), "cuda": ("_C_cuda", "reasonkern_cuda", "CUDA")}

LIBRARY = torch.library.Library("reasonkern", "FRAGMENT")
CUDA_LIBRARY = torch.library.Library("reasonkern_cuda", "FRAGMENT")

CUDA_LIBRARY.define("compiled_for() -> int[]")

_ops: dict[str, dict[str, Implementation | None]] = {}


def _load_library(stem: str) -> str:
    """Loads a library; returns why it is not there, or "" when it is."""
    if os.environ.get("REASONKERN_NO_EXT") == "1":
        return "switched off by REASONKERN_NO_EXT=1"
    paths = sorted(Path(__file__).parent.glob(f"{stem}.*so"))
    if not paths:
        no_cuda = stem == "_C_cuda" and torch.version.cuda is None
        return f"library {stem} is not built" + (": this torch has no CUDA" if no_cuda else "")
    try:
        torch.ops.load_library(paths[0])
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error  # torch's own text names the file alone
        return f"library {stem} failed to load: {str(cause).strip().splitlines()[0]}"
    return ""


_library_reasons = {backend: _load_library(stem) for backend, (stem, _, _) in _LIBRARIES.items()}
if _library_reasons["cpu"] and os.environ.get("REASONKERN_NO_EXT") != "1":
    # Above all in a checkout, which hides the package that was installed from it.
    warnings.warn(
        f"reasonkern in {Path(__file__).parent}: {_library_reasons['cpu']}, so CPU tensors take "
        "the slow definitions in torch; an installed reasonkern is found outside the checkout",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _triton_reason() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not importable: {error}"
    return ""


def reason(backend: str) -> str:
    """Why a backend is missing on this machine; "" when it is there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected {' or '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        return _triton_reason()
    return _library_reasons.get(backend, "")


def available(backend: str) -> bool:
    """Whether a backend's code is present on this machine, for whatever device it needs."""
    return not reason(backend)


class Autograd(NamedTuple):
    """The derivative of an op, as `torch.library.register_autograd` takes it."""

    backward: Implementation
    setup_context: Implementation


def define_op(
    name: str,
    schema: str,
    *,
    reference: Implementation,
    fake: Implementation,
    cuda: bool,
    triton: Implementation | None,
    triton_serves: Callable[..., bool] | None = None,
    autograd: Autograd | None = None,
) -> None:
    """Defines an op for every device and enters it in the registry.

    C++ may implement it as ``reasonkern::<name>`` for the CPU and, with `cuda`, as
    ``reasonkern_cuda::<name>``. Arguments for which `triton_serves` is false go to the reference
    where Triton would serve others.
    """

    def on_cuda(*args: Any) -> Any:
        device = args[0].device
        backend = choose_cuda_backend(name, device)
        if backend == "triton" and triton_serves is not None and not triton_serves(*args):
            backend = choose_cuda_backend(name, device, triton_serves=False)
        return implementation(name, backend)(*args)

    reference = define_composite(
        name, schema, implementation=reference, fake=fake, autograd=autograd
    )
    LIBRARY.impl(name, on_cuda, "CUDA")
    backends = {"reference": reference, "cpu": getattr(torch.ops.reasonkern, name)}
    if cuda:
        CUDA_LIBRARY.define(name + schema)
        backends["cuda"] = getattr(torch.ops.reasonkern_cuda, name)
    register_op(name, backends | {"triton": triton})


def define_composite(
    name: str,
    schema: str,
    *,
    implementation: Implementation,
    fake: Implementation,
    autograd: Autograd | None = None,
) -> Implementation:
    """Defines an op with one implementation for every device; returns that.

    Without `autograd` its results are constants: neither it nor what it calls records a graph.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    if autograd is None:
        implementation = torch.no_grad()(implementation)
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"reasonkern::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, _differentiable(name, autograd), "Autograd", with_keyset=True)
    return implementation


def _differentiable(name: str, autograd: Autograd) -> Implementation:
    """What `torch.library.register_autograd` registers, for schemas without defaults.

    torch's own searches for arguments left out at their defaults: that costs more than a small op.
    """
    op = getattr(torch.ops.reasonkern, name).default

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *args, keyset = given  # last: needs_input_grad[k] is that of argument k
            output = below(keyset, *args)
            autograd.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            given = autograd.backward(ctx, *grads)
            return (*given, None) if isinstance(given, tuple) else (given, None)

    Node.__name__ = Node.__qualname__ = f"Backward_{name}"

    def dispatched(keyset: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if (recorded and torch._C._are_functorch_transforms_active()) or _any_dual(*args):
            refuse_transforms(name)
        if recorded:
            return Node.apply(*args, keyset)  # type: ignore[no-untyped-call]
        return below(keyset, *args)

    return dispatched


def is_transformed(*args: Any) -> bool:
    """Whether a derivative by torch.func or forward mode may be wanted, which no op has."""
    return torch._C._are_functorch_transforms_active() or _any_dual(*args)


def refuse_transforms(name: str) -> NoReturn:
    """NotImplementedError: what a user meets in the place of torch's words on its Functions."""
    raise NotImplementedError(
        f"reasonkern::{name}: no forward-mode derivatives and none by torch.func; use "
        "backward() or torch.autograd.grad"
    )


def _any_dual(*args: Any) -> bool:
    """Whether an argument has a tangent, which an op would drop."""
    return forward_ad._current_level >= 0 and any(
        isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def register_op(name: str, backends: Mapping[str, Implementation | None]) -> None:
    """Enters an op: its implementation per backend; None or absent = the op has no such backend."""
    unknown = set(backends) - set(BACKENDS)
    if unknown or backends.get("reference") is None:
        raise ValueError(f"{name}: expected a reference and any of {BACKENDS}, got {set(backends)}")
    _ops[name] = dict(backends)
    implementation.cache_clear()
    _choose.cache_clear()


@cache
def implementation(name: str, backend: str) -> Implementation:
    """The function that computes an op on a backend; RuntimeError says why there is none."""
    function = _ops[name].get(backend)
    if function is None or _missing(name, backend):
        raise RuntimeError(f"reasonkern.{name} on {backend}: {_missing(name, backend)}")
    return function


def lazy(module: str, name: str) -> Implementation:
    """A function of a module that is imported at its first call, as the Triton kernels are."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


def below_float64(x: torch.Tensor, *args: Any) -> bool:
    """`triton_serves` of kernels that compute in float32."""
    return x.dtype != torch.float64


def _missing(name: str, backend: str) -> str:
    """Why an op cannot run on a backend; "" when it can."""
    if _ops[name].get(backend) is None:
        return "the op has no such implementation"
    if problem := reason(backend):
        return problem
    if backend in _LIBRARIES:
        stem, namespace, key = _LIBRARIES[backend]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key):
            return f"library {stem} was built without this op"
    return ""


@cache
def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose_cuda_backend(
    name: str, device: torch.device | None = None, *, triton_serves: bool = True
) -> str:
    """The backend for CUDA tensors: one with evidence, else Triton, else the reference.

    REASONKERN_GPU_BACKEND=cuda or =triton, set before the first call, names one that comes first,
    with evidence or without. `triton_serves` is false for arguments that Triton does not take.
    Falling back to the reference warns once per op and architecture, or raises RuntimeError with
    REASONKERN_STRICT=1.
    """
    index = device.index if device is not None else None
    architecture = _architecture(torch.cuda.current_device() if index is None else index)
    return _choose(name, architecture, triton_serves)


@cache
def _choose(name: str, architecture: str, triton_serves: bool) -> str:
    choice = _preferred(name, architecture, _ON_CUDA if triton_serves else ("cuda",))
    if choice == "reference":
        notes = [_gpu_note(name, backend, architecture) for backend in _ON_CUDA]
        if not triton_serves:
            notes[_ON_CUDA.index("triton")] = "triton does not take these arguments"
        text = f"reasonkern.{name} runs its slow reference on {architecture}: {'; '.join(notes)}"
        if os.environ.get("REASONKERN_STRICT") == "1":
            raise RuntimeError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return choice


def _preferred(name: str, architecture: str, among: tuple[str, ...] = _ON_CUDA) -> str:
    present = [backend for backend in among if not _missing(name, backend)]
    usable = [backend for backend in present if not _other_code(backend, architecture)]
    named = [backend for backend in usable if backend == _named_backend()]
    evidenced = [backend for backend in usable if (name, architecture, backend) in EVIDENCE]
    return next(iter(named + evidenced), "triton" if "triton" in present else "reference")


def _named_backend() -> str:
    named = os.environ.get("REASONKERN_GPU_BACKEND", "")
    if named not in ("", *_ON_CUDA):
        raise ValueError(f"REASONKERN_GPU_BACKEND: expected cuda, triton or unset, got {named!r}")
    return named


@cache
def _compiled_for() -> tuple[int, ...]:
    """The architectures of the CUDA library's code; 90 is sm_90. Of older builds none is known."""
    op = "reasonkern_cuda::compiled_for"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd"):
        return ()
    return tuple(torch.ops.reasonkern_cuda.compiled_for())


def _other_code(backend: str, architecture: str) -> str:
    """Why a library's code is not what ran on an architecture; "" when it is.

    A library that was compiled for other generations of GPUs has PTX for this one, or nothing.
    """
    number = int(architecture.removeprefix("sm_"))
    if backend != "cuda" or any(
        code <= number and code // 10 == number // 10 for code in _compiled_for()
    ):
        return ""
    others = ", ".join(f"sm_{code}" for code in _compiled_for()) or "unknown GPUs (build it anew)"
    return f"library _C_cuda was compiled for {others}, not for {architecture}"


def _gpu_note(name: str, backend: str, architecture: str | None) -> str:
    """What speaks for or against a backend on a GPU architecture; None = there is no GPU."""
    if problem := _missing(name, backend):
        return problem
    if architecture is None:
        return "no GPU here"
    if problem := _other_code(backend, architecture):
        return problem
    run = EVIDENCE.get((name, architecture, backend))
    note = f"ran on {run}" if run else f"no result of this {backend} kernel on {architecture}"
    return note + ("; REASONKERN_GPU_BACKEND names it" if backend == _named_backend() else "")


def info() -> dict[str, Any]:
    """The environment and, for every op and backend, whether it exists, what it serves, and why.

    Returns:
        ``environment``: versions and devices by name, None for what is absent. ``ops``: for each op
        a list with a dict per backend: ``backend``, ``exists``, ``serves`` (devices), ``why``.

    Example:
        >>> import reasonkern as rk
        >>> [row["backend"] for row in rk.info()["ops"]["token_stats"]]
        ['reference', 'cpu', 'cuda', 'triton']
    """
    environment = _environment()
    has_gpu = environment["gpu"] is not None
    architecture = _architecture(torch.cuda.current_device()) if has_gpu else None
    ops = {name: [_row(name, backend, architecture) for backend in BACKENDS] for name in _ops}
    return {"environment": environment, "ops": ops}


def _row(name: str, backend: str, architecture: str | None) -> dict[str, Any]:
    chosen = {"cpu": "reference" if _missing(name, "cpu") else "cpu"}
    if architecture is not None:
        chosen[f"cuda ({architecture})"] = _preferred(name, architecture)
    serves = [device for device, choice in chosen.items() if choice == backend]
    why = _missing(name, backend)
    if backend in _ON_CUDA:
        why = _gpu_note(name, backend, architecture)
    elif backend == "reference":
        serves.append("other devices")
        why = "the definition; any device"
    exists = not _missing(name, backend)
    return {"backend": backend, "exists": exists, "serves": serves, "why": why}


def _environment() -> dict[str, str | None]:
    has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    gpu = None
    if has_gpu:
        device = torch.cuda.current_device()
        gpu = f"{torch.cuda.get_device_name(device)} ({_architecture(device)})"
    return {
        "reasonkern": sys.modules["reasonkern"].__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        "triton": _version("triton"),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_info() -> str:
    """`info()` as text: a head of versions, then one table row per op and backend."""
    data = info()
    head = [f"{key:10}  {value or 'none'}" for key, value in data["environment"].items()]
    rows = [("op", "backend", "exists", "serves", "why")]
    for name, entries in data["ops"].items():
        for entry in entries:
            exists = "yes" if entry["exists"] else "no"
            serves = ", ".join(entry["serves"]) or "-"
            rows.append((name, entry["backend"], exists, serves, entry["why"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*head, "", *(line.rstrip() for line in table)])
