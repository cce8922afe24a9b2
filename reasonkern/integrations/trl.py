"""TRL's `GRPOTrainer` with its log-probabilities, entropies and loss from reasonkern.

Two lines of a script change::

    from reasonkern.integrations.trl import GRPOTrainer  # was: from trl import GRPOTrainer

    trainer = GRPOTrainer(..., objective="gppo")  # without objective: that of args.loss_type

TRL keeps generation, rewards, advantages, metrics and the adaptive entropy coefficient; it calls
the model through a head that is replaced here, and its own loss function runs on the detached
log-probabilities for its metrics alone.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, PolicyMetrics, policy_loss, token_stats, token_weights
from ._peer import import_peer, require_arguments

TESTED = "1.16"
_trl = import_peer("trl.trainer.grpo_trainer", TESTED)
_Base: Any = _trl.GRPOTrainer
for _function, _names in (
    (_trl.add_fused_lm_head, ("model", "temperature", "cast_lm_head_to_fp32", "outputs")),
    (_Base._get_per_token_logps_and_entropies, ("model", "logits_to_keep", "compute_entropy")),
    (_Base._compute_loss, ("model", "inputs")),
):
    require_arguments("trl", TESTED, _function, *_names)

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
class _Rows:
    """What `policy_loss` takes besides the logits, each (B, K) for the K completion tokens.

    Not a tuple or a dict: FSDP casts the floating tensors of those to its parameter dtype.
    """

    objective: Objective
    advantage: Tensor  # or (B,)
    weight: Tensor
    entropy_weight: Tensor | None
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None

    def padded(self, left: int, right: int) -> dict[str, Any]:
        """The arguments, with rows of weight 0 before and after the completion."""
        return {
            name: F.pad(x, (left, right)) if isinstance(x, Tensor) and x.ndim > 1 else x
            for name, x in vars(self).items()
        }


class _HeadOutput(NamedTuple):
    """What TRL reads from a model's output, and the loss."""

    log_probs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None
    loss: Tensor | None = None
    metrics: PolicyMetrics | None = None


class _Call:
    """Stands for the model in TRL's functions, which only call it; keeps the last output."""

    def __init__(self, model: Any, rows: _Rows | None = None) -> None:
        self.model, self.rows = model, rows
        self.tokens: int | None = None
        self.output: _HeadOutput | None = None

    def __call__(self, **inputs: Any) -> _HeadOutput:
        self.output = self.model(**inputs, tokens=self.tokens, rows=self.rows)
        return self.output


def _add_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Has the arguments and the effect of TRL's ``add_fused_lm_head``, with full logits.

    ``model(..., labels=, fused_lm_head=True, tokens=K)`` returns statistics of the last K tokens;
    with ``rows`` also the loss, whose gradient replaces the logits. It happens inside the model's
    forward, so autocast and parallel wrappers do not copy the logits.
    """
    plain = model.forward
    narrows = "logits_to_keep" in inspect.signature(plain).parameters

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        tokens: int | None = None,
        rows: _Rows | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return (
                plain(*args, **kwargs) if labels is None else plain(*args, labels=labels, **kwargs)
            )
        assert labels is not None and tokens is not None
        # The last position predicts nothing: it stays, with weight 0, because the backward of a
        # slice would allocate the logits once more.
        kept = {"logits_to_keep": tokens + 1} if narrows else {}
        output = plain(*args, use_cache=False, **kept, **kwargs)
        return _score(output, labels[:, -tokens:], rows, temperature)

    model.forward = types.MethodType(forward, model)


def _score(output: Any, targets: Tensor, rows: _Rows | None, temperature: float) -> _HeadOutput:
    logits = output.logits
    left = logits.shape[1] - targets.shape[1] - 1
    inside = slice(left, -1)
    aux_loss = getattr(output, "aux_loss", None)
    y = F.pad(targets, (left, 1), value=-100)
    if rows is None:
        stats = token_stats(logits, y, temperature=temperature, mask=y >= 0)
        return _HeadOutput(stats.logprob[:, inside], stats.entropy[:, inside], aux_loss)
    out = policy_loss(logits, y, temperature=temperature, inplace_grad=True, **rows.padded(left, 1))
    return _HeadOutput(
        out.logprob[:, inside], out.entropy[:, inside], aux_loss, out.loss, out.metrics
    )


@contextmanager
def _our_head() -> Iterator[None]:
    """While TRL's trainer sets itself up, its function that patches a model is this one."""
    original: Callable[..., None] = _trl.add_fused_lm_head
    _trl.add_fused_lm_head = _add_head
    try:
        yield
    finally:
        _trl.add_fused_lm_head = original


# ---- the objective of a configuration


def _unsupported(name: str, expected: str, got: object) -> None:
    _checks.fail(f"args.{name}", f"{expected} with reasonkern's GRPOTrainer", repr(got))


def _check_config(args: Any, loss_type: str, own_bounds: bool) -> None:
    if args.top_entropy_quantile < 1:
        _unsupported("top_entropy_quantile", "1.0", args.top_entropy_quantile)
    if args.cast_lm_head_to_fp32 and (args.bf16 or args.fp16):
        _unsupported("cast_lm_head_to_fp32", "False in mixed precision", True)
    level = args.importance_sampling_level
    if level != "token" and (own_bounds or loss_type in ("cispo", "sapo", "vespo")):
        _unsupported("importance_sampling_level", "'token' for this objective", level)
    if level != "token" and args.beta and args.use_bias_correction_kl:
        # TRL weights each token's KL by the ratio of the sequence, which is not unbiased.
        _unsupported("use_bias_correction_kl", "False at the sequence level", True)
    if loss_type == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        _unsupported("vllm_importance_sampling_correction", "False for vespo", True)
    if own_bounds:
        if loss_type in ("cispo", "sapo", "vespo"):
            means = (
                "grpo, bnpo, dr_grpo, dapo or luspo, which says how token losses are aggregated,"
            )
            _unsupported("loss_type", means, loss_type)
        for name, default in (("epsilon", 0.2), ("epsilon_high", None), ("delta", None)):
            if getattr(args, name) != default:
                _unsupported(
                    name, f"{default}: the objective has its own bounds", getattr(args, name)
                )


def _terms(args: Any) -> dict[str, Any]:
    """KL, importance correction and sequence mask as TRL's configuration describes them."""
    terms: dict[str, Any] = {"opsm": args.off_policy_mask_threshold}
    if args.beta:
        terms["kl"] = ("k3", args.beta, args.use_bias_correction_kl)
    if args.use_vllm and args.vllm_importance_sampling_correction:
        level, _, mode = args.vllm_importance_sampling_mode.partition("_")
        lo, hi = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        terms["importance"] = (level, mode, lo, hi)
    return terms


def _trl_objective(args: Any, loss_type: str, terms: dict[str, Any]) -> Objective:
    """TRL's loss type with TRL's numbers."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if loss_type == "cispo":
        return Objective.cispo(high, **terms)
    if loss_type == "sapo":
        return Objective.sapo(args.sapo_temperature_pos, args.sapo_temperature_neg, **terms)
    if loss_type == "vespo":
        shape = (args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
        return Objective.vespo(*shape, **terms)
    build = Objective.gspo if args.importance_sampling_level == "sequence" else Objective.ppo
    return build(1 - args.epsilon, 1 + high, ratio_cap=args.delta, **terms)


def _named_objective(name: str) -> Objective:
    build = getattr(Objective, name, None)
    if name == "custom" or name.startswith("_") or not inspect.ismethod(build):
        _checks.fail(
            "objective", "the name of a constructor of Objective, or of a TRL loss type", repr(name)
        )
    objective: Objective = build()
    return objective


def _with_terms(objective: Objective, terms: dict[str, Any]) -> Objective:
    for name, default in (
        ("kl", None),
        ("importance", None),
        ("opsm", None),
        ("entropy_coef", 0.0),
    ):
        if getattr(objective, name) is not default and getattr(objective, name) != default:
            _checks.fail(
                f"objective.{name}", "to come from the trainer's args", getattr(objective, name)
            )
    return replace(objective, **terms)


# ---- the trainer


class GRPOTrainer(_Base):
    """`trl.GRPOTrainer` whose loss is an `Objective`, computed by `policy_loss`.

    Args:
        *args: as for TRL's trainer.
        objective: None = the one of ``args.loss_type``, with the numbers of ``args``; a name: one
            of TRL's loss types, or a constructor of `Objective` with its published numbers
            ("gppo", "ce_gppo", "reinforce", "dppo_tv", "gmpo", …); or an `Objective`. KL, entropy
            bonus, importance correction and the off-policy mask come from ``args`` (``beta``,
            ``entropy_coef``, ``vllm_importance_sampling_*``, ``off_policy_mask_threshold``), and
            ``args.loss_type`` says how token losses are aggregated.
        **kwargs: as for TRL's trainer.

    TRL's metrics keep their names; those of `PolicyMetrics.compute`, merged over micro-batches and
    ranks, are logged as ``reasonkern/*``. A token with a nonfinite log-probability is left out of
    the loss and counted in ``reasonkern/rows_nonfinite``.

    Raises:
        ImportError: when imported without TRL, or where TRL's interface changed.
        ValueError: unknown objective; an option that is not supported (``top_entropy_quantile``
            below 1, a sequence level for CISPO, SAPO and VESPO, …), each by name.
    """

    def __init__(self, *args: Any, objective: str | Objective | None = None, **kwargs: Any) -> None:
        with _our_head():
            super().__init__(*args, **kwargs)
        self._own_objective = False
        if objective is None or (isinstance(objective, str) and objective in AGGREGATION):
            self.loss_type: str = objective or self.args.loss_type
            _check_config(self.args, self.loss_type, own_bounds=False)
            self.objective = _trl_objective(self.args, self.loss_type, _terms(self.args))
        else:
            _check_config(self.args, self.loss_type, own_bounds=True)
            found = _named_objective(objective) if isinstance(objective, str) else objective
            if not isinstance(found, Objective):
                _checks.fail("objective", "a name, an Objective or None", type(found).__name__)
            self.objective = _with_terms(found, _terms(self.args))
            self._own_objective = True
            # TRL's clip metrics count against the objective's bounds.
            low, high = self.objective.numbers()[:2]
            self.epsilon_low, self.epsilon_high = 1 - low, high - 1
        self._row_metrics: dict[str, PolicyMetrics] = {}

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        call = model if isinstance(model, _Call) else _Call(model)
        call.tokens = logits_to_keep
        return super()._get_per_token_logps_and_entropies(
            call, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        # Rows that are not trained are not read and have log-probability 0.
        known = {
            name: torch.where(mask != 0, inputs[name], 0.0)
            for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
            if inputs.get(name) is not None
        }
        rows = self._rows(inputs["advantages"], mask, known, inputs)
        call = _Call(model, rows)
        super()._compute_loss(call, inputs | known)  # for its metrics and its entropy controller
        output, mode = call.output, "train" if self.model.training else "eval"
        assert output is not None and output.loss is not None and output.metrics is not None
        seen = self._row_metrics.get(mode)
        self._row_metrics[mode] = output.metrics if seen is None else seen + output.metrics
        if self._own_objective and self._entropy_bonus_enabled:
            self._metrics[mode]["policy_loss"][-1] = self._policy_loss(output, rows)
        loss = output.loss
        if self.aux_loss_enabled and output.aux_loss is not None:
            loss = loss + (self.router_aux_loss_coef / self._steps()) * output.aux_loss
        return loss

    def _policy_loss(self, output: _HeadOutput, rows: _Rows) -> float:
        """The loss without the entropy bonus, scaled and averaged over ranks as TRL logs it."""
        assert output.loss is not None and rows.entropy_weight is not None
        bonus = rows.objective.entropy_coef * (rows.entropy_weight * output.entropy).sum()
        loss = output.loss.detach() + bonus
        if AGGREGATION[self.loss_type] != "window":
            loss = loss * self._steps()
        mean: float = self.accelerator.gather(loss).nanmean().item()
        return mean

    def _rows(
        self, advantage: Tensor, mask: Tensor, known: dict[str, Tensor], inputs: dict[str, Any]
    ) -> _Rows:
        objective, old = self.objective, known.get("old_per_token_logps")
        rollout = known.get("sampling_per_token_logps")
        if rollout is None:
            rollout = old
        elif old is not None:  # a token that the engine could not score is taken as it is
            rollout = torch.where(rollout.isnan(), old, rollout)
        if rollout is None and objective.opsm is not None:
            objective = replace(objective, opsm=None)  # on-policy: nothing has drifted
        entropy_weight = None
        if self._entropy_bonus_enabled:
            objective = replace(objective, entropy_coef=self._entropy_coefficient())
            entropy_weight = token_weights(mask, "token-mean") / self._steps()
        return _Rows(
            objective, advantage, self._weights(mask, inputs), entropy_weight, old,
            known.get("ref_per_token_logps"), rollout,
        )  # fmt: skip

    def _steps(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _entropy_coefficient(self) -> float:
        """The coefficient of this step: TRL's controller turns it off above its target."""
        off = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        return 0.0 if off else self.entropy_coef

    def _weights(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        mode = AGGREGATION[self.loss_type]
        if mode == "window":
            # num_items_in_batch spans the generation batch.
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * self._steps() / self.args.steps_per_generation
            return token_weights(mask, "token-mean", num_tokens=tokens)
        longest = self.max_completion_length if mode == "constant" else None
        return token_weights(mask, mode, max_length=longest) / self._steps()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the merged metrics of the rows since the last call."""
        mode = "train" if self.model.training else "eval"
        metrics = self._row_metrics.pop(mode, None)
        if metrics is not None:
            if self.accelerator.num_processes > 1:
                metrics = metrics.all_reduce()
            found = metrics.compute()
            values = torch.stack(list(found.values())).tolist()  # one synchronisation
            for name, value in zip(found, values, strict=True):
                self._metrics[mode][f"reasonkern/{name}"] = [value]
        super().log(logs, start_time)
