"""TRL's `GRPOTrainer` with its log-probabilities, entropies and loss from reasonkern.

Two lines of a script change::

    from reasonkern.integrations.trl import GRPOTrainer  # was: from trl import GRPOTrainer

    trainer = GRPOTrainer(..., objective="gppo")  # without objective: that of args.loss_type

TRL keeps generation, rewards, advantages, metrics and the adaptive entropy coefficient; it calls
the model through a head that is replaced by the one in ``_trl_head``, and its own loss function
runs on the detached log-probabilities for its metrics alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, PolicyMetrics, conflict_token_weights, token_weights
from ..policy_loss.adaptive import BalancedBounds, drawn_anew
from ..policy_loss.inputs import check_no_constructor
from ._peer import import_peer, require_arguments
from ._trl_head import HeadCall, HeadOutput, HeadRows, add_head
from ._trl_objective import (
    AGGREGATION,
    TopEntropy,
    check_config,
    check_off_policy,
    named_objective,
    terms,
    trl_objective,
    warn_of_aggregation,
    with_terms,
)

TESTED = "1.16"
_trl = import_peer("trl.trainer.grpo_trainer", TESTED)
_Base: Any = _trl.GRPOTrainer
for _function, _names in (
    (_trl.add_fused_lm_head, ("model", "temperature", "cast_lm_head_to_fp32", "outputs")),
    (_Base._get_per_token_logps_and_entropies, ("model", "logits_to_keep", "compute_entropy")),
    (_Base._compute_loss, ("model", "inputs")),
):
    require_arguments("trl", TESTED, _function, *_names)


@contextmanager
def _our_head(logits: bool) -> Iterator[None]:
    """While TRL's trainer sets itself up, its function that patches a model is this one."""
    original: Callable[..., None] = _trl.add_fused_lm_head
    _trl.add_fused_lm_head = functools.partial(add_head, logits=logits)
    try:
        yield
    finally:
        _trl.add_fused_lm_head = original


def _trained(inputs: dict[str, Any]) -> Tensor:
    """Mask (B, K) of the tokens that the policy wrote."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


class GRPOTrainer(_Base):
    """``trl.GRPOTrainer`` whose loss is an `Objective`, computed by `policy_loss`.

    Args:
        *args: as for TRL's trainer.
        objective: None = the one of ``args.loss_type``, with the numbers of ``args``; a name: one
            of TRL's loss types (``grpo``, ``dapo``, …: again with the numbers of ``args``, ratios
            in [0.8, 1.2] by default, where ``Objective.dapo()`` has [0.8, 1.28]), or another
            constructor of `Objective` with its published numbers ("gppo", "bapo", "gtpo",
            "dppo_tv", "gmpo", …); or an `Objective`. KL, entropy bonus,
            importance correction, off-policy mask and entropy mask come from ``args`` (``beta``,
            ``entropy_coef``, ``vllm_importance_sampling_*``, ``off_policy_mask_threshold``,
            ``top_entropy_quantile``), and ``args.loss_type`` says how token losses are aggregated;
            a warning says where the objective's source wants another one. GTPO as published wants
            ``args.scale_rewards="none"``, and for a model with a mean entropy above ln 2
            ``Objective.gtpo(initial_entropy=…)``: else it drops everything, and
            ``reasonkern/dropped_frac`` is 1.
        logits: False = `linear_policy_loss`: the loss from the hidden states and the head, without
            logits, where the head is a plain linear layer; True = `policy_loss` on the model's own
            logits, which the gradient replaces.
        **kwargs: as for TRL's trainer.

    TRL's metrics keep their names; those of `PolicyMetrics.compute`, merged over micro-batches and
    ranks, are logged as ``reasonkern/*``. A token with a nonfinite log-probability is left out of
    the loss and counted in ``reasonkern/rows_nonfinite``.

    Raises:
        ImportError: when imported without TRL, or where TRL's interface changed.
        ValueError: unknown objective; an option that is not supported (a sequence level for CISPO,
            SAPO and VESPO, …) or would be ignored (``epsilon`` with an objective that has its own
            bounds, …), each by name.
    """

    def __init__(
        self,
        *args: Any,
        objective: str | Objective | None = None,
        logits: bool = False,
        **kwargs: Any,
    ) -> None:
        _checks.check_choice("logits", logits, (False, True))
        with _our_head(logits):
            super().__init__(*args, **kwargs)
        self._own_objective = not (
            objective is None or (isinstance(objective, str) and objective in AGGREGATION)
        )
        self.objective = self._own(objective) if self._own_objective else self._trls(objective)
        self._row_metrics: dict[str, PolicyMetrics] = {}

    def _trls(self, loss_type: Any) -> Objective:
        self.loss_type: str = loss_type or self.args.loss_type
        check_config(self.args, self.loss_type)
        return with_terms(trl_objective(self.args, self.loss_type), self._terms())

    def _own(self, objective: Any) -> Objective:
        check_config(self.args, self.loss_type, objective)
        if isinstance(objective, str):
            objective = named_objective(objective)
        check_no_constructor(objective)
        if not isinstance(objective, Objective):
            expected = "a name, an Objective (Objective.custom for a function) or None"
            _checks.fail("objective", expected, type(objective).__name__)
        if objective.rule is not None and objective.rule.needs_rollout:
            check_off_policy(self.args, objective.name)
        found = with_terms(objective, self._terms())
        warn_of_aggregation(found, self.loss_type)
        # TRL's clip metrics count against the objective's bounds.
        low, high = found.numbers()[:2]
        self.epsilon_low, self.epsilon_high = 1 - low, high - 1
        return found

    def _terms(self) -> dict[str, Any]:
        found = terms(self.args)
        if self.top_entropy_quantile < 1:
            found["rule"] = TopEntropy(self.top_entropy_quantile, self.get_high_entropy_mask)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.objective.name == "gtpo":
            output["conflict_weights"] = self._conflict_weights(output)
        return output

    def _conflict_weights(self, output: dict[str, Any]) -> Tensor:
        """GTPO's factors: here, because the completions of a prompt are shuffled apart later."""
        mask, accelerator = _trained(output), self.accelerator
        columns = (output["completion_ids"], mask)
        tokens, trained = (accelerator.pad_across_processes(x, dim=1) for x in columns)
        tokens, trained, advantage = accelerator.gather((tokens, trained, output["advantages"]))
        size = self.num_generations if self.model.training else self.num_generations_eval
        group = torch.arange(len(tokens), device=tokens.device) // size
        weights = conflict_token_weights(tokens, advantage, group, trained)
        first = accelerator.process_index * len(mask)
        return weights[first : first + len(mask), : mask.shape[1]]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        call = model if isinstance(model, HeadCall) else HeadCall(model)
        call.tokens = logits_to_keep
        return super()._get_per_token_logps_and_entropies(
            call, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = _trained(inputs)
        # Rows that are not trained are not read and have log-probability 0.
        known = {
            name: torch.where(mask != 0, inputs[name], 0.0)
            for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
            if inputs.get(name) is not None
        }
        rows = self._rows(inputs["advantages"], mask, known, inputs)
        call = HeadCall(model, rows)
        super()._compute_loss(call, inputs | known)  # for its metrics and its entropy controller
        output, mode = call.output, "train" if self.model.training else "eval"
        assert output is not None and output.loss is not None
        metrics, seen = output.statistics.metrics, self._row_metrics.get(mode)
        assert metrics is not None
        self._row_metrics[mode] = metrics if seen is None else seen + metrics
        if self._own_objective and self._entropy_bonus_enabled:
            self._metrics[mode]["policy_loss"][-1] = self._policy_loss(output, rows)
        loss = output.loss
        if self.aux_loss_enabled and output.aux_loss is not None:
            loss = loss + (self.router_aux_loss_coef / self._steps()) * output.aux_loss
        return loss

    def _policy_loss(self, output: HeadOutput, rows: HeadRows) -> float:
        """The loss without the entropy bonus, scaled and averaged over ranks as TRL logs it."""
        token_loss = output.statistics.token_loss
        assert token_loss is not None
        loss = (rows.weight * token_loss).sum()
        if AGGREGATION[self.loss_type] != "window":
            loss = loss * self._steps()
        mean: float = self.accelerator.gather(loss).nanmean().item()
        return mean

    def _rows(
        self, advantage: Tensor, mask: Tensor, known: dict[str, Tensor], inputs: dict[str, Any]
    ) -> HeadRows:
        objective, old = self.objective, known.get("old_per_token_logps")
        rollout = known.get("sampling_per_token_logps")
        if rollout is None:
            rollout = old
        elif old is not None:  # a token that the engine could not score is taken as it is
            rollout = torch.where(rollout.isnan(), old, rollout)
        if rollout is None and objective.opsm is not None:
            objective = replace(objective, opsm=None)  # on-policy: nothing has drifted
        objective = drawn_anew(objective, self._step)
        if "conflict_weights" in inputs:
            objective = replace(objective, selection=inputs["conflict_weights"])
        entropy_weight = None
        if self._entropy_bonus_enabled:
            objective = replace(objective, entropy_coef=self._entropy_coefficient())
            entropy_weight = token_weights(mask, "token-mean") / self._steps()
        return HeadRows(
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
            if isinstance(self.objective.rule, BalancedBounds):  # TRL knows no bounds that move
                for name in [n for n in self._metrics[mode] if n.startswith("clip_ratio/")]:
                    del self._metrics[mode][name]
            found = metrics.compute()
            values = torch.stack(list(found.values())).tolist()  # one synchronisation
            for name, value in zip(found, values, strict=True):
                self._metrics[mode][f"reasonkern/{name}"] = [value]
        super().log(logs, start_time)
