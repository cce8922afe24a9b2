"""OpenRLHF's PPO trainer with its log-probabilities and entropies, and its loss, from reasonkern.

A script stands for ``python -m openrlhf.cli.train_ppo_ray`` and takes its arguments::

    import runpy
    from reasonkern.integrations.openrlhf import install

    install()  # OpenRLHF's own loss; install(rk.Objective.gppo()): any other
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")

OpenRLHF keeps the rest: its KL and entropy terms, importance-sampling correction, normalisers,
metrics, packing, ring attention. Its trainer asks the actor for log-probabilities and computes the
loss from them, so the logits are read twice, for the statistics and for the gradient.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, token_weights
from ..policy_loss.adaptive import drawn_anew
from ..policy_loss.inputs import check_no_constructor
from ._log_probs import check_terms, log_prob_loss
from ._openrlhf_actor import TESTED, fuse
from ._peer import import_peer, require_arguments

_Base: Any = import_peer("openrlhf.models", TESTED).PolicyLoss
OPTIONS = (
    "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type",
    "is_correction_level", "is_correction_mode", "is_correction_gating", "is_correction_threshold",
)  # fmt: skip
require_arguments("openrlhf", TESTED, _Base, *OPTIONS)
require_arguments(
    "openrlhf", TESTED, _Base.forward, "log_probs", "old_log_probs", "advantages", "action_mask",
    "rollout_log_probs", "dp_size", "batch_num_tokens", "global_batch_size",
)  # fmt: skip

# Terms of an `Objective` that are not its business in OpenRLHF, and what is instead.
NOT_HERE = {
    "kl": "--algo.kl.use_loss, --algo.kl.init_coef",
    "importance": "--algo.advantage.is_correction_level",
    "entropy_coef": "--actor.entropy_coef",
    "function": "OpenRLHF gives a loss no entropies",
}
# Options of OpenRLHF's loss that an objective has itself.
ITS_OWN = {
    "clip_eps_low": "its ratio_min",
    "clip_eps_high": "its ratio_max",
    "dual_clip": "its dual_clip",
    "policy_loss_type": "its formula",
}


class PolicyLoss(_Base):
    """``openrlhf.models.PolicyLoss`` with the token losses of an `Objective`.

    Args:
        objective: any but ``gtpo``, ``high_entropy`` and user-defined ones, which need entropies.
            KL, entropy bonus and importance weights are OpenRLHF's own terms. ``opsm`` and BAPO as
            in the paper need its rollout log-probabilities, which it only keeps when it corrects.
        **options: as for OpenRLHF's loss. ``token_level_loss`` (``--actor.loss_agg_mode``) and
            ``is_correction_*`` hold for the objective.

    Its metrics have the meaning that OpenRLHF's have. Objectives by whole batch see the micro-batch
    of their rank.

    Raises:
        ValueError: a term or an option that would be ignored: the objective's own KL, …; OpenRLHF's
            bounds (``--actor.eps_clip``), dual clip or loss type; its correction with a
            sequence-level objective. In the call: advantages that differ within a sequence, for
            such an objective.
    """

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__(**options)
        check_no_constructor(objective)
        if not isinstance(objective, Objective):
            _checks.fail("objective", "an Objective, such as Objective.gppo()", repr(objective))
        check_terms(objective, NOT_HERE, "OpenRLHF")
        for name, own in ITS_OWN.items():
            default = inspect.signature(_Base).parameters[name].default
            if (given := getattr(self, name)) != default:
                _checks.fail(name, f"{default!r} with an objective ({own} counts)", repr(given))
        if objective.level == "sequence" and self.is_correction_level != "off":
            expected = f"'off' with objective {objective.name}, of whole sequences"
            _checks.fail("is_correction_level", expected, repr(self.is_correction_level))
        self.objective = objective
        self._calls = 0
        self._correction = _Base(**{name: getattr(self, name) for name in OPTIONS[-4:]})

    def _corrected(self, old: Tensor, mask: Tensor, rollout: Tensor) -> tuple[Tensor, ...]:
        """OpenRLHF's coefficients, vllm_kl and is_filter_ratio.

        Its loss is linear in them: with A = -1 and a ratio of 1 they are the gradient of the sum.
        """
        old, rollout = (torch.where(mask, x, 0.0) for x in (old, rollout))
        with torch.enable_grad():
            at, a = old.detach().requires_grad_(), -torch.ones_like(old)
            total, _, _, *metrics = self._correction(
                at, old, a, mask.to(old), rollout, batch_num_tokens=1.0
            )
            return torch.autograd.grad(total, at)[0], *metrics

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Loss, clip ratio, KL to the old policy, vllm_kl and is_filter_ratio, as OpenRLHF's."""
        mask = action_mask != 0
        by_token = self.token_level_loss
        total = batch_num_tokens if by_token else global_batch_size
        weight = token_weights(
            mask,
            "token-mean" if by_token else "seq-mean-token-mean",
            num_tokens=total if by_token else None,
            num_sequences=None if by_token else total,
            data_parallel_size=1 if total is None else dp_size,
            count_empty=False,
        )
        importance = vllm_kl = filtered = None
        if (level := self.is_correction_level) != "off":
            if rollout_log_probs is None:
                expected = f"a tensor with is_correction_level {level!r}"
                _checks.fail("rollout_log_probs", expected, None)
            corrected = self._corrected(old_log_probs, mask, rollout_log_probs)
            importance, vllm_kl, filtered = corrected
        self._calls += 1
        loss, metrics = log_prob_loss(
            drawn_anew(self.objective, self._calls),  # the same on ranks with the same rows
            log_probs,
            mask,
            old_logprob=old_log_probs,
            advantage=advantages,
            weight=weight,
            importance=importance,
            rollout_logprob=rollout_log_probs,
        )
        found = metrics.compute()
        return loss, found["clip_frac"], -found["kl_old_k1"], vllm_kl, filtered


def _check_advantages(objective: Objective, algo: Any) -> None:
    """ValueError for a sequence-level objective where OpenRLHF's advantages are by token."""
    if objective.level == "sequence":
        given = f"with objective {objective.name}, of whole sequences"
        if algo.advantage.estimator == "gae":
            _checks.fail("--algo.advantage.estimator", f"any but 'gae' {given}", "'gae'")
        if algo.kl.init_coef > 0 and not algo.kl.use_loss:
            expected = f"True or an --algo.kl.init_coef of 0 {given}"
            _checks.fail("--algo.kl.use_loss", expected, "False, a KL in each token's reward")


@functools.cache
def _workers() -> tuple[Any, Any, Any, Any]:
    """OpenRLHF's modules of the policy's and the reference's workers, and the classes of these."""
    policy = import_peer("openrlhf.trainer.ray.ppo_actor", TESTED)
    reference = import_peer("openrlhf.trainer.ray.launcher", TESTED)
    remote = policy.PolicyModelActor, reference.ReferenceModelActor
    return policy, reference, *(x.__ray_actor_class__ for x in remote)


def install(objective: Objective | None = None) -> None:
    """Replaces OpenRLHF's classes of the workers that hold the policy and its reference.

    Call it before the module that trains is imported or run, which takes the classes by name. The
    workers' actors then read their logits once for log-probabilities and entropies, as they are,
    and write the gradient over them, where OpenRLHF's make copies in float32.

    Args:
        objective: None = the loss of OpenRLHF's arguments; else `PolicyLoss` with their
            ``--actor.loss_agg_mode`` and ``--algo.advantage.is_correction_*``.

    Raises:
        ValueError: as `PolicyLoss`; what depends on OpenRLHF's arguments, and a vision-language
            model, in the workers. There also advantages by token (``gae``, a KL in the rewards) for
            a sequence-level objective.
    """
    if objective is not None:
        PolicyLoss(objective)
    policy, reference, Policy, Reference = _workers()
    ray = importlib.import_module("ray")

    class PolicyModelActor(Policy):  # type: ignore[misc, valid-type]
        def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
            super().init_model_from_pretrained(*args, **kwargs)
            fuse(self.actor)
            if objective is not None:
                _check_advantages(objective, self.trainer.args.algo)
                theirs = self.trainer.actor_loss_fn
                options = {name: getattr(theirs, name) for name in OPTIONS}
                self.trainer.actor_loss_fn = PolicyLoss(objective, **options)

    class ReferenceModelActor(Reference):  # type: ignore[misc, valid-type]
        def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
            super().init_model_from_pretrained(*args, **kwargs)
            fuse(self.model)

    policy.PolicyModelActor = ray.remote(num_gpus=1)(PolicyModelActor)
    reference.ReferenceModelActor = ray.remote(num_gpus=1)(ReferenceModelActor)
