"""The operators of policy_loss on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments and results are those of the operators (reasonkern/policy_loss/op.py). How the kernels are
launched is in `Settings`; no choice may change a result except `slices` and `group`, which on a GPU
depend on the vocabulary and the dtype only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cuda_sim import launch
from torch import Tensor

STATS = ("logprob", "entropy", "lse", "collision", "varentropy", "max_prob", "is_top1", "row_max")
SAVED = ("logprob", "entropy", "collision", "max_prob", "row_max")
LOSSES = ("row_loss", "token_loss", "logprob", "entropy")


@dataclass(frozen=True)
class Settings(launch.Settings):
    """slices: pieces of a row and blocks of a cluster; group: threads per slice; groups: slices a
    whole-row block takes at a time; blocks: rows under way; resident: fused loss in clusters."""

    slices: int = 2
    group: int = 32
    groups: int = 1
    blocks: int = 3
    resident: bool = True


KERNELS = launch.Kernels("policy_loss_sim", Settings())
using, module = KERNELS.using, KERNELS.module


def _run(op: str, logits: Tensor, grad: Tensor | None, args: dict[str, Any]) -> None:
    # As on a GPU: float64 has no cluster kernel.
    changes = {"resident": False} if logits.dtype == torch.float64 else {}
    target = logits if grad is None else grad
    fields = {
        "logits": logits,
        "grad": grad,
        "rows": logits.shape[0] * logits.shape[1],
        "seq": logits.shape[1],
        "vocab": logits.shape[2],
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "grad_stride_b": target.stride(0),
        "grad_stride_t": target.stride(1),
        **args,
    }
    if fields["rows"]:
        _start(op, logits.dtype, fields, **changes)


def _start(op: str, dtype: torch.dtype, fields: dict[str, Any], **changes: Any) -> None:
    given = launch.pointers(fields, strided=("logits", "grad"))
    module().run(op, str(dtype).removeprefix("torch."), KERNELS.launch(**changes), given)


def _rows(logits: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dtypes = {name: torch.bool if name == "is_top1" else acc for name in names}
    return {name: logits.new_empty(logits.shape[:2], dtype=dtype) for name, dtype in dtypes.items()}


def token_stats(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    out = _rows(logits, STATS)
    args = {"targets": targets, "mask": mask, "row_temperature": row_temperature}
    args |= {"temperature": temperature, "softcap": softcap, **out}
    _run("token_stats", logits, None, args)
    return tuple(out.values())


def _backward(grad: Tensor, logits: Tensor, *values: Any) -> None:
    names = ("targets", "row_temperature", "temperature", "softcap", *SAVED)
    names += ("grad_logprob", "grad_entropy", "grad_lse", "grad_collision")
    _run("token_stats_backward", logits, grad, dict(zip(names, values, strict=True)))


def token_stats_backward(logits: Tensor, *values: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _backward(grad, logits, *values)
    return grad


def token_stats_backward_(logits: Tensor, *values: Any) -> None:
    _backward(logits, logits, *values)


def _loss(grad: Tensor | None, logits: Tensor, *values: Any) -> tuple[Tensor, ...]:
    names = ("targets", "old_logprob", "advantage", "weight", "entropy_weight", "importance")
    names += ("ref_logprob", "row_temperature", "loss_scale", "hyper", "values", "temperature")
    names += ("softcap", "kind", "kl_kind", "kl_unbiased")
    args = dict(zip(names, values, strict=True))
    args["hyper_rows"] = 0 if args["hyper"] is None else args["hyper"].shape[1]
    out = _rows(logits, LOSSES)
    _run("policy_loss", logits, grad, args | out)
    return tuple(out.values())


def policy_loss(logits: Tensor, *values: Any) -> tuple[Tensor, ...]:
    *rest, needs_grad = values
    grad = logits.new_empty(logits.shape) if needs_grad else None
    out = _loss(grad, logits, *rest)
    return (*out, logits.new_empty(0) if grad is None else grad)


def policy_loss_(logits: Tensor, *values: Any) -> tuple[Tensor, ...]:
    return _loss(logits, logits, *values)


def scale_rows_(x: Tensor, scale: Tensor) -> None:
    args = {"factors": scale}
    _run("scale_rows", x, x, args)


def policy_metrics(logprob: Tensor, *values: Any) -> Tensor:
    """One block of `group` threads; the result depends on their number."""
    names = ("entropy", "old_logprob", "advantage", "weight", "entropy_weight", "importance")
    names += ("ref_logprob", "log_ratio", "finite", "hyper", "values", "kind", "clips", "needs_ref")
    args = {"logprob": logprob, **dict(zip(names, values, strict=True))}
    args["hyper_rows"] = 0 if args["hyper"] is None else args["hyper"].shape[1]
    args["out"] = logprob.new_empty(36, dtype=torch.float64)
    _start("policy_metrics", logprob.dtype, args | {"rows": logprob.numel()}, blocks=1)
    return args["out"]


def objective_map(logprob: Tensor, *values: Any) -> tuple[Tensor, ...]:
    names = ("entropy", "old_logprob", "advantage", "weight", "entropy_weight", "importance")
    names += ("ref_logprob", "hyper", "values", "kind", "kl_kind", "kl_unbiased")
    args = {"logprob": logprob, **dict(zip(names, values, strict=True))}
    args["hyper_rows"] = 0 if args["hyper"] is None else args["hyper"].shape[1]
    out = {name: torch.empty_like(logprob) for name in ("row_loss", "token_loss", "dlogp")}
    out["dentropy"] = torch.empty_like(logprob)
    out["finite"] = torch.empty_like(logprob, dtype=torch.bool)
    _start("objective_map", logprob.dtype, args | out | {"rows": logprob.numel()})
    return tuple(out.values())


def sequence_map(logprob: Tensor, *values: Any) -> tuple[Tensor, ...]:
    names = ("entropy", "old_logprob", "advantage", "weight", "entropy_weight", "importance")
    names += ("ref_logprob", "cu_seqlens", "hyper", "values", "kind", "kl_kind", "kl_unbiased")
    args = {"logprob": logprob, **dict(zip(names, values, strict=True))}
    args["hyper_rows"] = 0 if args["hyper"] is None else args["hyper"].shape[1]
    offsets = args["cu_seqlens"]
    args["sequences"] = logprob.shape[0] if offsets is None else offsets.numel() - 1
    out = {name: torch.empty_like(logprob) for name in ("row_loss", "token_loss", "dlogp")}
    out["dentropy"] = torch.empty_like(logprob)
    out["finite"] = torch.empty_like(logprob, dtype=torch.bool)
    out["log_ratio"] = torch.empty_like(logprob)
    if logprob.numel():
        _start("sequence_map", logprob.dtype, args | out | {"rows": logprob.numel()})
    return tuple(out.values())


from cuda_sim.table_backend import table_draft, table_update_  # noqa: E402, F401
