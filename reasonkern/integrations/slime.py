"""slime's policy loss from `reasonkern.policy_loss`, on the logits of slime's Megatron backend.

slime's own losses, with the numbers of its options, in the place of slime's code for them::

    --custom-megatron-init-path reasonkern.integrations.slime.init

Any other objective is a custom loss of slime's, named in a module of yours, such as my_loss.py::

    gppo = make(rk.Objective.gppo(0.8, 1.28))

    --loss-type custom_loss --custom-loss-function-path my_loss.gppo

The loss takes the packed rows as they are, the vocabulary sharded over the tensor-parallel ranks
and the texts in zigzag over the context-parallel ones, and writes the gradient over the logits.
Advantages, old and reference log-probabilities, the average over tokens or samples and the names of
the metrics are slime's. As in slime, columns that pad the vocabulary count. A log-ratio beyond +-20
is clamped, where slime lets its exponential overflow. What changes slime's loss and has no
counterpart here is refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import KL, Importance, Objective, policy_loss
from ..policy_loss.adaptive import drawn_anew
from ..policy_loss.inputs import check_no_constructor
from ..policy_loss.outputs import PolicyLossOutput
from ..policy_loss.reference_objective import CISPO
from ..policy_loss.sequence import Segments
from ._slime_batch import Reducer, Rows, Tokens, groups, rows_of, tokens_of

TESTED = "commit 624b824 of 2026-08-21"
# Options that are not honoured, and the value that each must have.
NOT_HERE = {
    "use_opsm": False,
    "get_mismatch_metrics": False,
    "custom_pg_loss_reducer_function_path": None,
    "rollout_top_p": 1.0,
    "recompute_loss_function": False,  # the gradient lies where the logits were
}
# Terms of an `Objective` that slime's options set.
TERMS = {
    "kl": "--use-kl-loss, --kl-loss-coef",
    "importance": "--use-tis",
    "entropy_coef": "--entropy-coef",
}
# What slime's functions for --use-tis do with a weight outside --tis-clip-low and --tis-clip.
TIS: dict[str | None, Any] = {
    None: "truncate",
    "slime.backends.megatron_utils.loss.icepop_function": "mask",
}
Source = Objective | Callable[[Any], Objective]
Result = tuple[Tensor, dict[str, Tensor]]
_seeds = itertools.count(1)


def init(args: Any) -> None:
    """For slime's ``--custom-megatron-init-path``: from now on its policy loss is the one here.

    Raises:
        ValueError: an option that is not honoured.
        ImportError: a slime whose ``policy_loss_function`` has other arguments.
    """
    for name, needed in {"loss_type": "policy_loss", "save_debug_train_data": None}.items():
        _require(args, name, needed)
    _objective(_own, args)
    slimes = importlib.import_module("slime.backends.megatron_utils.loss")
    names = list(inspect.signature(policy_loss_function).parameters)
    theirs = getattr(slimes, "policy_loss_function", None)
    if theirs is None or list(inspect.signature(theirs).parameters) != names:
        raise ImportError(
            "reasonkern.integrations.slime does not fit this slime: expected a "
            f"policy_loss_function({', '.join(names)}); it is tested with {TESTED}"
        )
    setattr(slimes, "policy_loss_function", policy_loss_function)  # noqa: B010


def make(objective: Source) -> Callable[..., Result]:
    """A function for slime's ``--custom-loss-function-path``.

    Args:
        objective: an `Objective`, or a function from slime's arguments to one. KL, entropy bonus
            and importance weights come from slime's options.

    Returns:
        ``(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)``, the metrics those of
        slime's policy loss. ``pg_clipfrac`` counts tokens with a ratio, for GSPO that of the
        sequence, beyond the bound for the sign of the advantage (for CISPO beyond either; for BAPO,
        whose bounds are the batch's, 0).

    Raises:
        ValueError: no objective; in a call an option that is not honoured, a term that slime's
            options set, or advantages that differ in a sample for a sequence-level objective.
    """
    check_no_constructor(objective)
    if not isinstance(objective, Objective):
        try:
            inspect.signature(objective).bind(None)
        except TypeError:
            expected = "an Objective (such as Objective.custom(function)), or a function from"
            _checks.fail("objective", f"{expected} slime's arguments to one", repr(objective))
    return functools.partial(_loss, objective)


def policy_loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> Result:
    """The loss of slime's ``--advantage-estimator``, for its function of this name."""
    return _loss(_own, args, batch, logits, sum_of_sample_mean)


# ---- slime's options


def _own(args: Any) -> Objective:
    low, high = max(1 - args.eps_clip, 0.0), 1 + args.eps_clip_high
    if args.advantage_estimator == "cispo":
        return Objective.cispo(high, low)
    build = Objective.gspo if args.advantage_estimator == "gspo" else Objective.ppo
    return build(low, high, dual_clip=args.eps_clip_c)


def _require(args: Any, name: str, needed: object) -> None:
    if (given := getattr(args, name, needed)) != needed:
        _checks.fail(f"args.{name}", f"{needed!r} with reasonkern's loss", repr(given))


def _objective(source: Source, args: Any) -> Objective:
    """The objective with the terms of slime's options."""
    for name, needed in NOT_HERE.items():
        _require(args, name, needed)
    if getattr(args, "context_parallel_size", 1) > 1:
        _require(args, "allgather_cp", False)
    kl, importance = None, None
    if args.use_tis:
        if (path := args.custom_tis_function_path) not in TIS:
            expected = "None or slime's icepop_function with reasonkern's loss"
            _checks.fail("args.custom_tis_function_path", expected, repr(path))
        importance = Importance("token", TIS[path], args.tis_clip_low, args.tis_clip)
    if args.use_kl_loss and args.kl_loss_coef:
        if args.kl_loss_type == "low_var_kl":
            expected = "k3, which low_var_kl clamps at 10, or a kl_loss_coef of 0"
            _checks.fail("args.kl_loss_type", expected, args.kl_loss_type)
        kl = KL(args.kl_loss_type, args.kl_loss_coef, args.use_unbiased_kl)
    objective = source if isinstance(source, Objective) else source(args)
    for term, option in TERMS.items():
        if given := getattr(objective, term):
            _checks.fail(f"objective.{term}", f"not set (but {option})", given)
    return replace(objective, kl=kl, importance=importance, entropy_coef=args.entropy_coef)


# ---- the loss


def _loss(
    source: Source, args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> Result:
    o, (parallel, rank, ranks) = _objective(source, args), groups()
    rows = rows_of(batch, logits.shape[1], rank, ranks)
    x = tokens_of(args, batch, sum_of_sample_mean)
    by_sequence = o.level == "sequence"
    o = drawn_anew(o, next(_seeds))  # the same on ranks with parts of the same rows
    out = policy_loss(
        logits.squeeze(0),  # a view; the backward of logits[0] would allocate all of them again
        rows.targets,
        old_logprob=rows.spread(x.old),
        advantage=x.advantage_per_sample(batch) if by_sequence else rows.spread(x.advantage),
        weight=rows.spread(x.weight),
        objective=o,
        ref_logprob=rows.spread(x.ref),
        rollout_logprob=rows.spread(x.rollout),
        segments=rows.segments,
        temperature=args.rollout_temperature,
        inplace_grad=True,
        parallel=parallel,
    )
    of_rows = None
    if o.name == "gspo":
        of_rows = Segments.of(rows.targets[None], rows.segments, parallel)
    metrics = _metrics(o, args, x, rows, out, of_rows)
    if distilled := batch.get("opd_reverse_kl"):
        metrics["opd_reverse_kl"] = sum_of_sample_mean(torch.cat(distilled))
    return out.loss, metrics


def _metrics(
    o: Objective, args: Any, x: Tokens, rows: Rows, out: PolicyLossOutput, texts: Segments | None
) -> dict[str, Tensor]:
    """slime's; ``texts`` where the ratio is that of a whole one."""
    logp, entropy, token_loss = (y[rows.where] for y in (out.logprob, out.entropy, out.token_loss))
    trained = x.weight != 0

    def kept(y: Tensor) -> Tensor:  # rows that do not train were not read
        return torch.where(trained, y, 0.0)

    def mean(y: Tensor) -> Tensor:
        return (x.weight * kept(y)).sum()

    old = logp if x.old is None else x.old
    log_ratio = kept(logp - old)
    metrics = {"loss": out.loss.detach().clone(), "entropy_loss": mean(entropy)}
    if x.ref is not None:
        kl = _kl(args, kept(logp - x.ref), log_ratio.exp())
        metrics["kl_loss"] = mean(kl)
        token_loss = token_loss - args.kl_loss_coef * kl
    if texts is not None:
        total, length = (texts.sum(rows.spread(y)[None]) for y in (log_ratio, trained))
        log_ratio = (total / length.clamp_min(1))[0, rows.where].to(logp)
    ratio = log_ratio.exp()
    metrics["pg_loss"], metrics["ppo_kl"] = mean(token_loss), mean(-log_ratio)
    metrics["pg_clipfrac"] = mean(_clipped(o, ratio, x.advantage))
    if x.rollout is not None:
        gap = kept((logp if args.use_rollout_logprobs else old) - x.rollout)
        metrics["train_rollout_logprob_abs_diff"] = mean(gap.abs())
    if args.use_tis:
        tis = gap.exp()
        outside = (tis < args.tis_clip_low) | (tis > args.tis_clip)
        metrics |= {"ois": mean(ratio), "tis": mean(tis), "tis_clipfrac": mean(outside)}
        metrics["tis_abs"] = mean((tis - 1).abs())
    return metrics


def _kl(args: Any, d: Tensor, ratio: Tensor) -> Tensor:
    """As in slime's ``compute_approx_kl``, of d = logp - ref."""
    kl = {"k1": d, "k2": d.square() / 2}.get(args.kl_loss_type, torch.expm1(-d) + d)
    kl = ratio * kl if args.use_unbiased_kl else kl
    return kl.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else kl


def _clipped(o: Objective, ratio: Tensor, advantage: Tensor) -> Tensor:
    low, high = o.numbers()[:2]
    below, above = ratio < low, ratio > high
    if o.kind == CISPO:
        return (below | above) & (not o.leaves_out_ratio)
    return (below & (advantage < 0)) | (above & (advantage > 0))
