"""slime's policy loss written out with autograd, a batch, and the part of it that a rank has.

The formulas are those of slime's commit 624b824 for whole texts and whole rows of logits. Where
slime itself can be imported (its checkout and httpx on PYTHONPATH, TORCHDYNAMO_DISABLE=1), the
checks compare with its own function as well, called on each rank as slime calls it.
"""

from __future__ import annotations

import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from tolerance import randn
from torch import Tensor

V = 22
LENGTHS = ((9, 5), (4, 2), (12, 11), (7, 3))  # of text and response of each sample
PADDING = 6  # rows after the last sample
DEFAULTS = {
    "loss_type": "policy_loss", "advantage_estimator": "grpo", "eps_clip": 0.2,
    "eps_clip_high": 0.28, "eps_clip_c": None, "entropy_coef": 0.0, "use_kl_loss": False,
    "kl_loss_type": "k3", "kl_loss_coef": 0.1, "use_unbiased_kl": False, "use_tis": False,
    "tis_clip": 1.2, "tis_clip_low": 0.8, "custom_tis_function_path": None,
    "use_rollout_logprobs": False, "rollout_temperature": 1.0, "rollout_top_p": 1.0,
    "calculate_per_token_loss": False, "use_opsm": False, "get_mismatch_metrics": False,
    "custom_pg_loss_reducer_function_path": None, "recompute_loss_function": False,
    "allgather_cp": False, "context_parallel_size": 1, "log_probs_chunk_size": -1,
    "save_debug_train_data": None,
}  # fmt: skip
ICEPOP = "slime.backends.megatron_utils.loss.icepop_function"
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dual clip, entropy, temperature": {
        "eps_clip_c": 1.3, "entropy_coef": 0.1, "rollout_temperature": 0.7,
    },
    "tokens": {"calculate_per_token_loss": True, "entropy_coef": -0.1},
    "k1": {"use_kl_loss": True, "kl_loss_type": "k1"},
    "k2": {"use_kl_loss": True, "kl_loss_type": "k2"},
    "k3": {"use_kl_loss": True, "entropy_coef": 0.1},
    "unbiased k3": {"use_kl_loss": True, "use_unbiased_kl": True},
    "low_var_kl, a metric": {
        "use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.0,
    },
    "tis": {"use_tis": True},
    "icepop": {"use_tis": True, "custom_tis_function_path": ICEPOP},
    "rollout": {"use_rollout_logprobs": True},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 0.1},
    "cispo, one-sided": {"advantage_estimator": "cispo", "eps_clip": 1.5, "use_tis": True},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.04},
    "gspo, all terms": {
        "advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.04, "eps_clip_c": 1.07,
        "entropy_coef": 0.1, "use_kl_loss": True, "use_unbiased_kl": True, "use_tis": True,
    },
}  # fmt: skip
# The same without log-probabilities of an old policy: a rollout of a single step.
ON_POLICY = ("grpo", "dual clip, entropy, temperature", "unbiased k3", "tis", "cispo")


def make_args(**options: Any) -> Namespace:
    return Namespace(**(DEFAULTS | options))


# ---- the batch


def make_batch(on_policy: bool = False, by_token: bool = True) -> dict[str, Any]:
    """As slime's, for one rank, with ``logits`` (1, T, V) beside it."""
    total, response = zip(*LENGTHS, strict=True)
    count = sum(total) + PADDING
    logits = 2 * randn(1, count, V, seed=1)
    text = torch.randint(V, (sum(total),), generator=torch.Generator().manual_seed(2)).split(total)
    logp, masks = [], []
    at = 0
    for (n, r), y in zip(LENGTHS, text, strict=True):
        rows = logits[0, at + n - r - 1 : at + n - 1].log_softmax(-1)
        logp.append(rows.gather(-1, y[n - r :, None])[:, 0])
        masks.append((torch.arange(r) % 4 != 1).int())
        at += n

    def near(seed: int) -> list[Tensor]:
        return [x + 0.3 * randn(len(x), seed=seed + i) for i, x in enumerate(logp)]

    sums = [m.sum() for m in masks]
    advantages = [
        randn(1, seed=30 + i).expand(r) + by_token * 0.3 * randn(r, seed=40 + i)
        for i, r in enumerate(response)
    ]
    return {
        "logits": logits, "unconcat_tokens": list(text), "total_lengths": list(total),
        "response_lengths": list(response), "loss_masks": masks, "advantages": advantages,
        "log_probs": None if on_policy else near(10),
        # The last sample's k3 is beyond the clamp of low_var_kl.
        "ref_log_probs": [x + d for x, d in zip(near(50), (0, 0, -1.5, 3), strict=True)],
        "rollout_log_probs": near(20),
        # The last two samples are of one rollout, whose tokens count alike.
        "rollout_mask_sums": torch.stack((*sums[:2], *(sums[2] + sums[3],) * 2)).double(),
    }  # fmt: skip


ROWS = ("advantages", "log_probs", "ref_log_probs", "rollout_log_probs")


def local(
    batch: dict[str, Any], vocab: tuple[int, int], pieces: tuple[int, int]
) -> tuple[dict[str, Any], Tensor]:
    """What (rank, ranks) of both groups has: batch, and the index of its rows among all, or -1."""
    rank, ranks = pieces
    part = {k: v for k, v in batch.items() if k != "logits"}
    rows, at = [], 0
    kept = []
    for n, r in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        own = torch.arange(n)
        if ranks > 1:
            padded = -(-n // (2 * ranks)) * 2 * ranks
            chunks = torch.arange(padded).chunk(2 * ranks)
            own = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))
        rows.append(torch.where(own < n, own + at, -1))
        answers = own[(own >= n - r - 1) & (own < n - 1)]
        kept.append(answers - (n - r - 1))
        at += n
    for key in ROWS:
        if batch[key] is not None:
            part[key] = [x[k] for x, k in zip(batch[key], kept, strict=True)]
    index = torch.cat((*rows, torch.full((PADDING,), -1)))
    if ranks == 1:
        index[-PADDING:] = torch.arange(PADDING) + at
    logits = batch["logits"][:, index].clone()
    logits[:, index < 0] = 5.0
    part["kept"] = kept
    part["logits"] = logits.chunk(vocab[1], -1)[vocab[0]].contiguous()
    return part, index


def reducer(args: Namespace, part: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """slime's ``sum_of_sample_mean`` of a rank."""
    masks = [m[k] for m, k in zip(part["loss_masks"], part["kept"], strict=True)]
    by = torch.ones(len(masks)) if args.calculate_per_token_loss else part["rollout_mask_sums"]

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        parts = x.split([len(m) for m in masks])
        return sum((p * m).sum() / d for p, m, d in zip(parts, masks, by, strict=True))

    return sum_of_sample_mean


# ---- the loss, plainly


def literal(args: Namespace, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and the gradient of 3 times the loss, of the whole batch."""
    x = batch["logits"].clone().requires_grad_()
    loss, metrics, at = 0.0, {}, 0
    gspo = args.advantage_estimator == "gspo"
    low, high = 1 - args.eps_clip, 1 + args.eps_clip_high
    for i, (n, r) in enumerate(LENGTHS):
        rows = (x[0, at + n - r - 1 : at + n - 1] / args.rollout_temperature).log_softmax(-1)
        logp = rows.gather(-1, batch["unconcat_tokens"][i][n - r :, None])[:, 0]
        entropy = -(rows.exp() * rows).sum(-1)
        ref, rollout = batch["ref_log_probs"][i], batch["rollout_log_probs"][i]
        old = logp.detach() if batch["log_probs"] is None else batch["log_probs"][i]
        if args.use_rollout_logprobs:
            old = rollout
        mask, a = batch["loss_masks"][i], batch["advantages"][i]
        over = logp - old
        if gspo:
            over = ((logp - old) * mask).sum() / mask.sum() + 0 * over
        ratio = over.exp()
        if args.advantage_estimator == "cispo":
            clipped = ratio.clamp(low, high)
            pg, clipfrac = -clipped.detach() * a * logp, clipped != ratio
        else:
            plain, clipped = -ratio * a, -ratio.clamp(low, high) * a
            pg, clipfrac = torch.maximum(plain, clipped), clipped > plain
            if args.eps_clip_c is not None:
                pg = torch.where(a < 0, torch.minimum(-args.eps_clip_c * a, pg), pg)
        found = {"pg_clipfrac": clipfrac, "ppo_kl": -over, "entropy_loss": entropy}
        compared = logp if args.use_rollout_logprobs else old
        found["train_rollout_logprob_abs_diff"] = (compared - rollout).abs()
        if args.use_tis:
            w = (old - rollout).exp()
            kept = w.clamp(args.tis_clip_low, args.tis_clip)
            if args.custom_tis_function_path:
                kept = torch.where(kept == w, w, 0.0)
            pg = pg * kept
            found |= {"ois": ratio, "tis": w, "tis_clipfrac": kept != w, "tis_abs": (w - 1).abs()}
        found["pg_loss"] = pg
        total = pg - args.entropy_coef * entropy
        if args.use_kl_loss:
            d = logp - ref
            kl = {"k1": d, "k2": d**2 / 2}.get(args.kl_loss_type, (-d).exp() - 1 + d)
            kl = kl * (logp - old).exp() if args.use_unbiased_kl else kl
            kl = kl.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else kl
            found["kl_loss"], total = kl, total + args.kl_loss_coef * kl
        by = 1 if args.calculate_per_token_loss else batch["rollout_mask_sums"][i]
        found["loss"], at = total, at + n
        loss = loss + (total * mask).sum() / by
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + (value * mask).sum().detach() / by
    (gradient,) = torch.autograd.grad(3 * loss, x)
    return loss.detach(), metrics, gradient


# ---- megatron's groups, and slime itself


def install(vocab: tuple[Any, int, int], pieces: tuple[Any, int, int]) -> None:
    """``megatron.core.mpu`` as slime and the integration read it; groups with rank and size."""
    mpu = types.ModuleType("megatron.core.mpu")
    for name, (group, rank, size) in (("tensor_model", vocab), ("context", pieces)):
        for what, value in (("group", group), ("rank", rank), ("world_size", size)):
            setattr(mpu, f"get_{name}_parallel_{what}", lambda value=value: value)
    core = types.ModuleType("megatron.core")
    core.mpu = mpu
    packages = {"megatron": types.ModuleType("megatron"), "megatron.core": core}
    sys.modules.update(packages | {"megatron.core.mpu": mpu})
    for name in ("loss", "cp_utils"):  # which have read it before
        if (module := sys.modules.get(f"slime.backends.megatron_utils.{name}")) is not None:
            module.mpu = mpu


def slimes_own() -> types.ModuleType | None:
    """slime's module of losses, if it can be imported."""
    try:
        return importlib.import_module("slime.backends.megatron_utils.loss")
    except ImportError:
        return None


def as_float(rows: list[Tensor] | None) -> list[Tensor] | None:
    return rows and [x.float() for x in rows]


def run(
    function: Callable[..., Any], args: Namespace, part: dict[str, Any], reduce: Any, **cast: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What a loss function gives for a rank's batch, and the gradient of 3 times the loss."""
    leaf = part["logits"].to(**cast).requires_grad_()
    loss, metrics = function(args, part, leaf * 1.0, reduce)
    (
        3 * loss
    ).backward()  # not autograd.grad, for which a rank may leave out one of slime's reductions
    assert leaf.grad is not None
    return loss.detach(), metrics, leaf.grad
