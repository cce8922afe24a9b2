"""The objective that a configuration of TRL's GRPO describes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, RowContext
from ..policy_loss.adaptive import Rows, Rule
from ..policy_loss.catalog import OBJECTIVES
from ..policy_loss.reference_objective import Hyper

# TRL's loss types and how each aggregates; "window": by the trained tokens of all micro-batches of
# an optimizer step on all ranks.
AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "constant",
    "luspo": "seq-mean-token-sum",
    "dapo": "window",
    "cispo": "window",
    "vespo": "window",
}


@dataclass(frozen=True, eq=False)
class TopEntropy(Rule):
    """``top_entropy_quantile`` by TRL's own function, which interpolates between entropies."""

    quantile: float
    choose: Callable[[Tensor, Tensor, float], Tensor]  # get_high_entropy_mask

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """A selection of the policy loss; the entropy bonus is the mean over the same tokens."""
        kept = self.choose(rows.entropy, rows.used, 1 - self.quantile)
        bonus = context.entropy_weight
        if bonus is not None:
            share = (bonus != 0).sum() / (kept & (bonus != 0)).sum().clamp_min(1)
            context = replace(context, entropy_weight=bonus * kept * share)
        return replace(o, rule=None, selection=kept.to(context.weight.dtype)), context


def _unsupported(name: str, expected: str, got: object) -> None:
    _checks.fail(f"args.{name}", f"{expected} with reasonkern's GRPOTrainer", repr(got))


def _with_bounds(objective: Any, **numbers: float | None) -> str:
    """The objective that was asked for with these numbers, or nothing where it takes none such."""
    name = objective if isinstance(objective, str) else getattr(objective, "name", "")
    build = getattr(Objective, name, None)
    if not inspect.ismethod(build) or "ratio_min" not in inspect.signature(build).parameters:
        return ""
    try:
        build(**numbers)
    except ValueError:  # no two-sided clipping for this one, or an epsilon that is none
        return ""
    given = ", ".join(f"{k}={v:.7g}" for k, v in numbers.items())
    return f", as in objective=rk.Objective.{name}({given})"


def _check_own_bounds(args: Any, objective: Any) -> None:
    """TRL's bounds would be ignored beside an objective of ours."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    ratios = {"ratio_min": 1 - args.epsilon, "ratio_max": 1 + high}
    for name, default, numbers in (
        ("epsilon", 0.2, ratios),
        ("epsilon_high", None, ratios),
        ("delta", None, {"ratio_cap": args.delta}),
    ):
        if (given := getattr(args, name)) != default:
            expected = f"its default, {default}: the objective has its own bounds"
            _checks.fail(f"args.{name}", expected + _with_bounds(objective, **numbers), repr(given))


def check_config(args: Any, loss_type: str, own: Any = None) -> None:
    """Refuses the options that would otherwise be ignored, or mean something else than in TRL.

    ``own`` is the objective, or its name, that is asked for in the place of the loss type's.
    """
    own_bounds = own is not None
    _checks.check_choice("args.loss_type", loss_type, AGGREGATION)
    if args.cast_lm_head_to_fp32 and (args.bf16 or args.fp16):
        _unsupported("cast_lm_head_to_fp32", "False in mixed precision", True)
    level = args.importance_sampling_level
    if level != "token" and (own_bounds or loss_type in ("cispo", "sapo", "vespo")):
        _unsupported("importance_sampling_level", "'token' for this objective", level)
    if level != "token" and args.beta and args.use_bias_correction_kl:
        # TRL weights each token's KL by the ratio of the sequence, which is not unbiased.
        _unsupported("use_bias_correction_kl", "False at the sequence level", True)
    by_sequence = level != "token" or loss_type == "vespo"
    if by_sequence and args.top_entropy_quantile < 1:
        _unsupported("top_entropy_quantile", "1.0 at the sequence level", args.top_entropy_quantile)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    clips = not own_bounds and loss_type not in ("cispo", "sapo", "vespo")
    if clips and not 0 <= args.epsilon <= 1:
        _unsupported("epsilon", "a number in [0, 1], 1 - the smallest ratio,", args.epsilon)
    if clips and not high >= 0:
        _unsupported("epsilon_high", "0 or more, the largest ratio - 1,", args.epsilon_high)
    if clips and args.delta is not None and args.delta <= 1 + high:
        _unsupported("delta", f"more than {1 + high:g}, the upper bound,", args.delta)
    if loss_type == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        _unsupported("vllm_importance_sampling_correction", "False for vespo", True)
    if loss_type == "cispo" and not own_bounds and (args.epsilon_high or args.epsilon) < 1:
        instead = "objective=rk.Objective.cispo() and loss_type='dapo',"
        expected = f"CISPO's largest ratio, 1 or more (ScaleRL: 5.0), or {instead}"
        _unsupported("epsilon_high", expected, args.epsilon_high)
    if own_bounds:
        if loss_type in ("cispo", "sapo", "vespo"):
            means = (
                "grpo, bnpo, dr_grpo, dapo or luspo, which says how token losses are aggregated,"
            )
            _unsupported("loss_type", means, loss_type)
        _check_own_bounds(args, own)


def warn_of_aggregation(objective: Objective, loss_type: str) -> None:
    """Where the objective's source takes the mean over sequences and TRL's default does not.

    The default averages over tokens, so each sequence would count by its length; another loss
    type is somebody's decision.
    """
    customary = {entry.name: entry.aggregation for entry in OBJECTIVES}.get(objective.name)
    if customary == "seq-mean-token-mean" and loss_type == "dapo":
        warnings.warn(
            f"args.loss_type: expected 'grpo', the mean over sequences, for {objective.name} as "
            f"its source has it, got {loss_type!r}",
            stacklevel=4,
        )


def check_off_policy(args: Any, name: str) -> None:
    """Refuses runs whose every update is on-policy: there all ratios are 1."""
    reuse = args.steps_per_generation * args.num_iterations
    corrects = args.use_vllm and args.vllm_importance_sampling_correction
    if args.gradient_accumulation_steps % reuse == 0 and not corrects:
        expected = "more updates than one from a generation"
        _unsupported("num_iterations", f"{expected} for {name}", args.num_iterations)


def terms(args: Any) -> dict[str, Any]:
    """KL, importance correction and sequence mask as TRL's configuration describes them."""
    terms: dict[str, Any] = {"opsm": args.off_policy_mask_threshold}
    if args.beta:
        terms["kl"] = ("k3", args.beta, args.use_bias_correction_kl)
    if args.use_vllm and args.vllm_importance_sampling_correction:
        level, _, mode = args.vllm_importance_sampling_mode.partition("_")
        lo, hi = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        terms["importance"] = (level, mode, lo, hi)
    return terms


def trl_objective(args: Any, loss_type: str) -> Objective:
    """TRL's loss type with TRL's numbers."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if loss_type == "cispo":
        return Objective.cispo(high)
    if loss_type == "sapo":
        return Objective.sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
    if loss_type == "vespo":
        shape = (args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
        return Objective.vespo(*shape)
    build = Objective.gspo if args.importance_sampling_level == "sequence" else Objective.ppo
    return build(1 - args.epsilon, 1 + high, ratio_cap=args.delta)


def named_objective(name: str) -> Objective:
    """The constructor of that name, with its published numbers."""
    build = getattr(Objective, name, None)
    if name == "custom" or name.startswith("_") or not inspect.ismethod(build):
        known = [n for n, x in vars(Objective).items() if isinstance(x, classmethod)]
        names = ", ".join(dict.fromkeys((*AGGREGATION, *known)))
        _checks.fail("objective", f"one of {names.removesuffix(', custom')}", repr(name))
    objective: Objective = build()
    return objective


def with_terms(objective: Objective, terms: dict[str, Any]) -> Objective:
    """The objective with the trainer's terms; it may not have the same ones of its own."""
    for name, option in (
        ("kl", "beta"),
        ("importance", "vllm_importance_sampling_*"),
        ("opsm", "off_policy_mask_threshold"),
        ("entropy_coef", "entropy_coef"),
    ):
        if given := getattr(objective, name):
            _checks.fail(f"objective.{name}", f"to come from the trainer's args.{option}", given)
    if "rule" in terms and (objective.rule is not None or objective.level != "token"):
        _unsupported("top_entropy_quantile", "1.0 with this objective", terms["rule"].quantile)
    return replace(objective, **terms)
