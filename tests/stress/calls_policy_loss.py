"""Valid calls of the policy_loss family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from draws import Arguments, Draw
from torch import Tensor

import reasonkern as rk

PLAIN = ("ppo", "grpo", "dapo", "dr_grpo", "gppo", "ce_gppo", "cispo", "sapo", "reinforce", "gpg")
TOKEN = (*PLAIN, "rloo", "dppo_tv", "dppo_kl", "dro", "tppo", "clip_cov", "kl_cov", "high_entropy")
SEQUENCE = ("gspo", "gmpo", "vespo")


def vocabulary(draw: Draw) -> int:
    """Around the widths of the vector loops, and one that takes several blocks."""
    return draw.choice(1, 2, 7, 8, 15, 16, 17, 33, 64, 129, 1030)


def rows(draw: Draw) -> tuple[int, ...]:
    return (draw.size(),) if draw.flag() else (draw.size(), draw.size())


def temperature(draw: Draw, shape: tuple[int, ...]) -> Any:
    return draw.choice(1.0, 0.7, draw.positive(*shape) + 0.1)


def token_stats(draw: Draw) -> Arguments:
    shape, vocab = rows(draw), vocabulary(draw)
    return {
        "logits": draw.logits(*shape, vocab),
        "targets": draw.ids(vocab, *shape, dtype=draw.choice(torch.int64, torch.int32)),
        "temperature": temperature(draw, shape),
        "softcap": draw.choice(None, 30.0),
        "mask": draw.maybe(lambda: draw.bools(*shape)),
    }


def linear_token_stats(draw: Draw) -> Arguments:
    arguments = token_stats(draw)
    logits = arguments.pop("logits")
    return arguments | projection(draw, logits) | compaction(draw)


def projection(draw: Draw, logits: Tensor) -> Arguments:
    """Hidden states and head in place of logits."""
    *shape, vocab = logits.shape
    width, dtype = draw.choice(1, 4, 8), logits.dtype
    return {
        "hidden": draw.normal(*shape, width, dtype=dtype).requires_grad_(draw.flag()),
        "weight": draw.normal(vocab, width, dtype=dtype).requires_grad_(draw.flag()),
        "bias": draw.maybe(lambda: draw.normal(vocab, dtype=dtype)),
    }


def compaction(draw: Draw) -> Arguments:
    return {"chunk_rows": draw.choice(None, 1, 4), "compact": draw.flag()}


def objective(draw: Draw) -> Arguments:
    """A named constructor and added terms."""
    terms: Arguments = {"entropy_coef": draw.choice(0.0, 0.01)}
    if draw.flag():
        terms["kl"] = (draw.choice("k1", "k2", "k3"), 0.1, draw.flag())
    if draw.flag():
        level, mode = draw.choice("token", "sequence"), draw.choice("truncate", "mask")
        terms["importance"] = (level, mode, 0.5, 2.0, draw.flag())
    if draw.flag():
        terms["opsm"] = 0.1
    return {"name": draw.choice(*TOKEN, *SEQUENCE, "bapo"), **terms}


def make_objective(name: Any, **terms: Any) -> Any:
    if not isinstance(name, str) or not hasattr(rk.Objective, name):
        raise ValueError(f"name: expected a constructor, got {name!r}")
    return getattr(rk.Objective, name)(**terms)


def policy_loss(draw: Draw) -> Arguments:
    arguments = token_stats(draw)
    del arguments["mask"]
    shape = arguments["targets"].shape
    segments = None
    if len(shape) == 1:
        cuts = sorted(draw.integer(0, shape[0]) for _ in range(draw.integer(0, 3)))
        segments = torch.tensor([0, *cuts, shape[0]])
    per_sequence = shape[0] if segments is None else len(segments) - 1
    made = make_objective(**objective(draw))
    advantage = (per_sequence,) if made.level == "sequence" or draw.flag() else shape
    logprob = [draw.normal(*shape) - 1 for _ in range(3)]
    return arguments | {
        "old_logprob": draw.choice(None, logprob[0]),
        "ref_logprob": logprob[1],
        "rollout_logprob": logprob[2],
        "advantage": draw.normal(*advantage),
        "weight": draw.bools(*shape) * 0.25,
        "objective": draw.choice(made, made, made, squared),
        "segments": segments,
        "entropy_weight": draw.maybe(lambda: draw.positive(*shape)),
        "inplace_grad": draw.flag(),
        "loss_scale": draw.choice(None, torch.tensor(64.0)),
    }


def squared(logprob: Tensor, entropy: Tensor, ctx: rk.RowContext) -> Tensor:
    return logprob.square() * ctx.advantage


def linear_policy_loss(draw: Draw) -> Arguments:
    arguments = policy_loss(draw)
    del arguments["inplace_grad"]
    head = projection(draw, arguments.pop("logits"))
    return arguments | {"lm_head_weight": head.pop("weight")} | head | compaction(draw)


def token_weights(draw: Draw) -> Arguments:
    shape = rows(draw)
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
    mode = draw.choice(*modes)
    by_token = mode == "token-mean"
    return {
        "mask": draw.mask(*shape),
        "mode": mode,
        "segments": torch.tensor([0, shape[0] // 2, shape[0]]) if len(shape) == 1 else None,
        "max_length": draw.choice(7, 16) if mode == "constant" else None,
        "num_tokens": draw.choice(None, 12, torch.tensor(12.0)) if by_token else None,
        "num_sequences": None if by_token else draw.choice(None, 3),
        "data_parallel_size": draw.choice(1, 4),
        "count_empty": draw.flag(),
    }


def rollout_mismatch(draw: Draw) -> Arguments:
    shape = rows(draw)
    offsets = torch.tensor([0, shape[0] // 2, shape[0]])
    return {
        "old_logprob": -draw.positive(*shape),
        "rollout_logprob": -draw.positive(*shape),
        "mask": draw.mask(*shape),
        "segments": draw.choice(None, offsets) if len(shape) == 1 else None,
    }


def selection(draw: Draw, name: str) -> Arguments:
    shape = rows(draw)
    return {name: draw.normal(*shape), "advantage": draw.normal(*shape), "mask": draw.mask(*shape)}


def bapo_bounds(draw: Draw) -> Arguments:
    arguments = selection(draw, "ratio")
    paper = draw.flag()
    return arguments | {
        "ratio": arguments["ratio"].exp(),
        "variant": "paper" if paper else "code",
        "rollout_logprob": -arguments["ratio"].abs() if paper else None,
        "low": draw.choice(None, (0.5, 0.9, 0.1)),
        "target": draw.choice(None, 0.3),
    }


def covariance_mask(draw: Draw) -> Arguments:
    arguments = selection(draw, "logprob")
    return arguments | {
        "mode": draw.choice("clip", "kl"),
        "fraction": draw.choice(2e-4, 0.5, 1.0),
        "low": 0.0,
        "candidates": draw.maybe(lambda: draw.bools(*arguments["logprob"].shape)),
        "seed": draw.choice(0, 1 << 40, torch.tensor(5)),
    }


def high_entropy_mask(draw: Draw) -> Arguments:
    shape = rows(draw)
    entropy = draw.positive(*shape, high=9.0).to(draw.choice(*(torch.float32, torch.bfloat16)))
    return {"entropy": entropy, "mask": draw.mask(*shape), "rho": draw.choice(0.2, 1.0)}


def conflict_token_weights(draw: Draw) -> Arguments:
    batch, width = draw.size(), draw.size()
    return {
        "tokens": draw.ids(3, batch, width),
        "advantage": draw.normal(batch),
        "group": draw.ids(2, batch),
        "mask": draw.mask(batch, width),
        "amplify": draw.choice(2.0, 0.0),
        "combine": draw.choice("product", "max"),
        "per_conflict_norm": draw.flag(),
    }


def entropy_filter(draw: Draw) -> Arguments:
    batch, width = draw.size(), draw.size()
    return {
        "advantage": draw.normal(batch),
        "entropy": draw.positive(batch, width),
        "mask": draw.mask(batch, width),
        "initial_entropy": draw.choice(None, 0.9, torch.tensor(0.1)),
    }


# ---- what is run


def run_token_stats(**arguments: Any) -> Any:
    return differentiated(rk.token_stats(**arguments), arguments, "logits")


def run_linear_token_stats(**arguments: Any) -> Any:
    return differentiated(rk.linear_token_stats(**arguments), arguments, "hidden", "weight")


def run_policy_loss(logits: Any, **arguments: Any) -> Any:
    # A model's output: no leaf, and may be overwritten.
    given = logits.clone() if isinstance(logits, Tensor) else logits
    return differentiated(rk.policy_loss(given, **arguments), {"logits": logits}, "logits")


def run_rollout_mismatch(**arguments: Any) -> Any:
    return rk.rollout_mismatch(**arguments).compute()


def run_linear_policy_loss(**arguments: Any) -> Any:
    return differentiated(rk.linear_policy_loss(**arguments), arguments, "hidden", "lm_head_weight")


def differentiated(out: Any, arguments: Arguments, *names: str) -> Any:
    """The outputs, and the gradients of their sum."""
    metrics = out.metrics.compute() if hasattr(out, "metrics") else None
    leaves = [x for n in names if isinstance(x := arguments[n], Tensor) and x.requires_grad]
    loss = out.loss if hasattr(out, "loss") else out.logprob.sum() + out.entropy.sum()
    grads = torch.autograd.grad(loss, leaves) if leaves and loss.requires_grad else ()
    return out, metrics, grads


CALLS = {
    "token_stats": (run_token_stats, token_stats),
    "policy_loss": (run_policy_loss, policy_loss),
    "linear_token_stats": (run_linear_token_stats, linear_token_stats),
    "linear_policy_loss": (run_linear_policy_loss, linear_policy_loss),
    "Objective": (make_objective, objective),
    "token_weights": (rk.token_weights, token_weights),
    "rollout_mismatch": (run_rollout_mismatch, rollout_mismatch),
    "bapo_bounds": (rk.bapo_bounds, bapo_bounds),
    "covariance_mask": (rk.covariance_mask, covariance_mask),
    "high_entropy_mask": (rk.high_entropy_mask, high_entropy_mask),
    "conflict_token_weights": (rk.conflict_token_weights, conflict_token_weights),
    "entropy_filter": (rk.entropy_filter, entropy_filter),
}
