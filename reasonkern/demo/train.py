"""The two training stages: fine-tuning on the traces, then RL on their logged outcomes.

Stage 1 takes the logits of the model, stage 2 its hidden states: no logits of a whole batch exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reasonkern as rk

from .._progress import progress
from ..policy_loss.catalog import OBJECTIVES
from . import eager
from .context import Context
from .model import Transformer
from .windows import Batch, logged_batches, random_batch

KL_COEF = 0.02
ENTROPY_COEF = 0.001
LEARNING_RATES = {"sft": 3e-3, "policy": 5e-4}
WARM_UP = 10  # steps
EPOCHS = 4  # over the same logged groups
EPOCHS_PER_SNAPSHOT = 2
CHECKS = 4  # steps of a stage at which the gradient is compared
# A sum over each answer is a multiple of the mean over tokens, on whose scale losses are compared.
AGGREGATION = {
    entry.name: entry.aggregation.replace("seq-mean-token-sum", "token-mean")
    for entry in OBJECTIVES
}
# GTPO drops no sequence while the model it started from has more entropy than ln 2 per token.
ARGUMENTS: dict[str, dict[str, Any]] = {"gtpo": {"initial_entropy": 1.0}}


def build_objective(name: str) -> rk.Objective:
    """The named objective with its published defaults, KL to the reference and entropy bonus."""
    make: Callable[..., rk.Objective] = getattr(rk.Objective, name)
    terms = {"kl": ("k3", KL_COEF), "entropy_coef": ENTROPY_COEF}
    return make(**ARGUMENTS.get(name, {}), **terms)


def fine_tune(context: Context) -> None:
    """Stage 1: −logprob of the traces, right and wrong ones: the policy that logged the groups."""
    config = context.config
    series: dict[str, list[float]] = {"loss": [], "entropy": [], "top1": []}
    context.results["sft"] = series
    descent = Descent(context.model, LEARNING_RATES["sft"], config.steps)
    checked = _checked_steps(config.steps)
    with progress("stage 1, fine-tuning", config.steps) as update:
        for step in range(config.steps):
            if step and context.out_of_time("sft"):
                break
            batch = random_batch(context.sequences, config.batch, config.window, context.rng)
            values = _imitation_step(context, descent, batch.to(context.device), step, checked)
            for name, value in values.items():
                series[name].append(value)
            update(f"loss {values['loss']:.3f}")


def _imitation_step(
    context: Context,
    descent: Descent,
    batch: Batch,
    step: int,
    checked: set[int],
) -> dict[str, float]:
    logits = context.model(batch.ids)
    weight = rk.token_weights(batch.mask, mode="token-mean")

    def plain(leaf: Tensor) -> Tensor:
        return eager.imitation_loss(leaf, batch.targets, weight)

    check = Deviation(context, "sft", step, logits, plain) if step in checked else None
    stats = rk.token_stats(logits, batch.targets, mask=batch.mask)
    loss = -(weight * stats.logprob).sum()
    descent.step(loss)
    if check:
        check.record(loss)
    tokens = batch.mask.sum()
    return {
        "loss": loss.item(),
        "entropy": (stats.entropy.sum() / tokens).item(),
        "top1": (stats.is_top1.sum() / tokens).item(),
    }


def learn_policy(context: Context) -> None:
    """Stage 2: off-policy RL; the same groups for several epochs against frozen log-probs."""
    config, model = context.config, context.model
    objective = build_objective(config.objective)
    batches = _logged_batches(context)
    results: dict[str, Any] = {"batches": len(batches), "objective": config.objective}
    results |= {"steps": [], "margin": []}
    context.results["policy"] = results
    reference = [snapshot_logprob(model, batch) for batch in batches]
    old = reference
    steps = len(batches) * EPOCHS
    descent = Descent(model, LEARNING_RATES["policy"], steps)
    checked = _checked_steps(steps)
    with progress(f"stage 2, {config.objective}", steps) as update:
        for step in range(steps):
            if step and context.out_of_time("policy"):
                break
            epoch, at = divmod(step, len(batches))
            if at == 0 and epoch % EPOCHS_PER_SNAPSHOT == 0:
                old = [snapshot_logprob(model, batch) for batch in batches]
                results["margin"].append({"step": step, "nats": margin(batches, old)})
            rows = policy_rows(context, batches[at], old[at], reference[at])
            metrics = _policy_step(context, objective, descent, batches[at], rows, step, checked)
            results["steps"].append(metrics)
            update(f"loss {metrics['loss']:+.4f}")
        final = [snapshot_logprob(model, batch) for batch in batches]
        results["margin"].append({"step": len(results["steps"]), "nats": margin(batches, final)})


def _logged_batches(context: Context) -> list[Batch]:
    """As many as all epochs over them take the steps asked for, or the time left allows."""
    config = context.config
    steps = context.affordable_steps("policy", len(context.results["sft"]["loss"]))
    count = max(1, steps // EPOCHS)
    batches = logged_batches(context.sequences, count, config.batch, config.window, context.rng)
    return [batch.to(context.device) for batch in batches]


def policy_rows(context: Context, batch: Batch, old: Tensor, reference: Tensor) -> eager.Rows:
    """What the loss of a logged batch needs beside the logits."""
    mode = AGGREGATION[context.config.objective]
    weight = rk.token_weights(batch.mask, mode=mode)
    return eager.Rows(batch.targets, batch.advantage, weight, old, reference)


def loss_inputs(rows: eager.Rows, objective: rk.Objective) -> dict[str, Any]:
    """Keyword arguments that `policy_loss` and `linear_policy_loss` share."""
    return {
        "old_logprob": rows.old_logprob,
        "rollout_logprob": rows.old_logprob,
        "ref_logprob": rows.ref_logprob,
        "advantage": rows.advantage,
        "weight": rows.weight,
        "objective": objective,
    }


def fused_policy_loss(
    logits: Tensor, rows: eager.Rows, objective: rk.Objective
) -> rk.PolicyLossOutput:
    """The loss of stage 2 on logits; its gradient is written over them."""
    return rk.policy_loss(logits, rows.targets, inplace_grad=True, **loss_inputs(rows, objective))


def _policy_step(
    context: Context,
    objective: rk.Objective,
    descent: Descent,
    batch: Batch,
    rows: eager.Rows,
    step: int,
    checked: set[int],
) -> dict[str, float]:
    model, name = context.model, context.config.objective
    hidden = model.hidden(batch.ids)

    def plain(leaf: Tensor) -> Tensor:
        logits = F.linear(leaf, model.head.detach())
        return eager.policy_loss(logits, rows, name, objective, KL_COEF)

    check = Deviation(context, "policy", step, hidden, plain) if step in checked else None
    out = rk.linear_policy_loss(hidden, model.head, rows.targets, **loss_inputs(rows, objective))
    descent.step(out.loss)
    if check:
        check.record(out.loss)
    values = {key: value.item() for key, value in out.metrics.compute().items()}
    return {"loss": out.loss.item(), **values}


class Deviation:
    """Compares one training step with the eager formulation on the same logits or hidden states.

    The gradient compared is the one that trains: a hook sees it on its way into the model.
    """

    def __init__(
        self,
        context: Context,
        stage: str,
        step: int,
        output: Tensor,
        plain: Callable[[Tensor], Tensor],
    ) -> None:
        leaf = output.detach().clone().requires_grad_()
        loss = plain(leaf)
        (self.expected,) = torch.autograd.grad(loss, leaf)
        self.expected_loss = loss.detach()
        self.entry: dict[str, Any] = {"stage": stage, "step": step}
        self.log: list[dict[str, Any]] = context.results.setdefault("deviations", [])
        output.register_hook(self._compare)

    def _compare(self, gradient: Tensor) -> None:
        largest = self.expected.abs().max()
        self.entry["gradient"] = ((gradient - self.expected).abs().max() / largest).item()

    def record(self, loss: Tensor) -> None:
        """Call after the backward pass."""
        self.entry["loss"] = (loss.detach() - self.expected_loss).abs().item()
        self.log.append(self.entry)


@torch.no_grad()
def snapshot_logprob(model: Transformer, batch: Batch) -> Tensor:
    """Log-probs of the batch under the weights of this moment."""
    hidden = model.hidden(batch.ids)
    return rk.linear_token_stats(hidden, model.head, batch.targets, mask=batch.mask).logprob


def margin(batches: list[Batch], logprobs: list[Tensor]) -> float:
    """Mean log-prob of the tokens of correct traces minus that of incorrect ones."""
    means = []
    for sign in (1, -1):
        chosen = [batch.mask & (sign * batch.advantage > 0).unsqueeze(1) for batch in batches]
        total = sum(lp[mask].sum().item() for lp, mask in zip(logprobs, chosen, strict=True))
        means.append(total / sum(mask.sum().item() for mask in chosen))
    return means[0] - means[1]


def _checked_steps(steps: int) -> set[int]:
    return {round(index * (steps - 1) / (CHECKS - 1)) for index in range(CHECKS)}


class Descent:
    """AdamW with warm-up, linear decay and a clipped gradient norm."""

    def __init__(self, model: Transformer, rate: float, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)
        )

    def step(self, loss: Tensor) -> None:
        """One backward pass and one update."""
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()
