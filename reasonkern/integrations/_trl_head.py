"""The head through which TRL's trainer calls a model: statistics of tokens, or their loss."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy_loss import (
    Objective,
    PolicyLossOutput,
    PolicyMetrics,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    token_stats,
)


class HeadRows:
    """What `policy_loss` takes besides the logits, each (B, K) for the K completion tokens.

    A plain object, for FSDP casts the floating tensors of tuples, dicts and dataclasses that enter
    or leave a module, and bfloat16 log-probabilities are off by up to 0.03 nat.
    """

    def __init__(
        self,
        objective: Objective,
        advantage: Tensor,  # or (B,)
        weight: Tensor,
        entropy_weight: Tensor | None,
        old_logprob: Tensor | None,
        ref_logprob: Tensor | None,
        rollout_logprob: Tensor | None,
    ) -> None:
        self.objective, self.advantage, self.weight = objective, advantage, weight
        self.entropy_weight, self.old_logprob = entropy_weight, old_logprob
        self.ref_logprob, self.rollout_logprob = ref_logprob, rollout_logprob

    def padded(self, left: int, right: int) -> dict[str, Any]:
        """The arguments, with rows of weight 0 before and after the completion."""

        def pad(x: Any) -> Any:
            return F.pad(x, (left, right)) if isinstance(x, Tensor) and x.ndim > 1 else x

        arguments = {name: pad(x) for name, x in vars(self).items()}
        o = self.objective
        return arguments | {"objective": replace(o, selection=pad(o.selection))}


class HeadStatistics:
    """(B, K) statistics of the tokens, and the loss's metrics: a plain object as `HeadRows`."""

    def __init__(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        token_loss: Tensor | None = None,
        metrics: PolicyMetrics | None = None,
    ) -> None:
        self.log_probs, self.entropy = log_probs, entropy
        self.token_loss, self.metrics = token_loss, metrics


class HeadOutput(NamedTuple):
    """What TRL reads from a model's output, and the loss, where wrappers look for gradients."""

    statistics: HeadStatistics
    aux_loss: Tensor | None
    loss: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        return self.statistics.log_probs

    @property
    def entropy(self) -> Tensor:
        return self.statistics.entropy


class HeadCall:
    """Stands for the model in TRL's functions, which only call it; keeps the last output."""

    def __init__(self, model: Any, rows: HeadRows | None = None) -> None:
        self.model, self.rows = model, rows
        self.tokens: int | None = None
        self.output: HeadOutput | None = None

    def __call__(self, **inputs: Any) -> HeadOutput:
        self.output = self.model(**inputs, tokens=self.tokens, rows=self.rows)
        return self.output


def add_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    logits: bool = False,
) -> None:
    """Has the arguments and the effect of TRL's ``add_fused_lm_head``.

    ``model(..., labels=, fused_lm_head=True, tokens=K)`` returns statistics of the last K tokens;
    with ``rows`` also the loss, whose gradient is formed there. It happens inside the model's
    forward, where autocast and parallel wrappers neither copy the logits nor hide the head.
    """
    plain = model.forward
    narrows = "logits_to_keep" in inspect.signature(plain).parameters
    projects = not logits and not cast_lm_head_to_fp32

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        tokens: int | None = None,
        rows: HeadRows | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {} if labels is None else {"labels": labels}
            return plain(*args, **given, **kwargs)
        assert labels is not None and tokens is not None
        targets, kwargs["use_cache"] = labels[:, -tokens:], False
        if projects and not kwargs.get("output_router_logits") and _has_plain_head(self):
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, -tokens - 1 :]
            return _score_hidden(self, hidden, targets, rows, temperature)
        # The last position predicts nothing: it stays, with weight 0, because the backward of a
        # slice would allocate the logits once more.
        kept = {"logits_to_keep": tokens + 1} if narrows else {}
        return _score_logits(plain(*args, **kept, **kwargs), targets, rows, temperature)

    model.forward = types.MethodType(forward, model)


# Fields of a configuration that scale or cut the logits although their names do not say logit, or
# that are properties, and words in the names of fields about other logits than the head's.
SHAPING = ("output_multiplier", "lm_head_multiplier", "unpadded_vocab_size", "logits_scaling")
ELSEWHERE = ("final_logit_softcapping", "router", "attn", "attention", "to_keep")


def _has_plain_head(model: Any) -> bool:
    """Whether the logits are a linear map of the last hidden states, but for a soft-cap.

    A field about logits that is not known makes it False: the model's own logits are right. Asked
    at each call: after patching PEFT may replace the head, and FSDP2 or DeepSpeed its weight.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    about_logits = (n for n in vars(config) if "logit" in n and not any(x in n for x in ELSEWHERE))
    shaped = any(getattr(config, name, None) is not None for name in (*SHAPING, *about_logits))
    if type(head) is not torch.nn.Linear or shaped:
        return False
    return not any(hasattr(head.weight, name) for name in ("ds_id", "full_tensor"))


def _score_hidden(
    model: Any, hidden: Tensor, targets: Tensor, rows: HeadRows | None, temperature: float
) -> HeadOutput:
    """Without logits; rows that are masked out take no part in the matrix products."""
    head, inside = model.get_output_embeddings(), slice(None, -1)
    y = F.pad(targets, (0, 1), value=-100)
    options: dict[str, Any] = {
        "bias": head.bias, "temperature": temperature, "compact": True,
        "softcap": getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    }  # fmt: skip
    if rows is None:
        stats = linear_token_stats(hidden, head.weight, y, mask=y >= 0, **options)
        return HeadOutput(_statistics(stats.logprob, stats.entropy, inside), None)
    out = linear_policy_loss(hidden, head.weight, y, **rows.padded(0, 1), **options)
    return _head_output(out, inside, None)


def _score_logits(
    output: Any, targets: Tensor, rows: HeadRows | None, temperature: float
) -> HeadOutput:
    """With the model's logits, over which the gradient is written."""
    logits = output.logits
    left = logits.shape[1] - targets.shape[1] - 1
    inside = slice(left, -1)
    aux_loss = getattr(output, "aux_loss", None)
    y = F.pad(targets, (left, 1), value=-100)
    if rows is None:
        stats = token_stats(logits, y, temperature=temperature, mask=y >= 0)
        return HeadOutput(_statistics(stats.logprob, stats.entropy, inside), aux_loss)
    out = policy_loss(logits, y, temperature=temperature, inplace_grad=True, **rows.padded(left, 1))
    return _head_output(out, inside, aux_loss)


def _statistics(logprob: Tensor, entropy: Tensor, inside: slice) -> HeadStatistics:
    return HeadStatistics(logprob[:, inside], entropy[:, inside])


def _head_output(out: PolicyLossOutput, inside: slice, aux_loss: Tensor | None) -> HeadOutput:
    token_loss, logprob, entropy = (x[:, inside] for x in out[1:4])
    statistics = HeadStatistics(logprob, entropy, token_loss, out.metrics)
    return HeadOutput(statistics, aux_loss, out.loss)
