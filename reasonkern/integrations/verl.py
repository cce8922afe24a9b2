"""verl's policy-loss registry with reasonkern's objectives, as ``rk_<name>``.

No line of code changes: verl loads this module as a plugin of the installed package, in its driver
and in every worker, and the configuration names the loss::

    actor_rollout_ref.actor.policy_loss.loss_mode=rk_gppo

verl calls a policy loss with log-probabilities, not logits, so this is the objective alone: the
O(N) map of the family, with its analytic gradient. Bounds come from the actor's configuration
(``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c``, ``tau_pos``, ``tau_neg``,
``policy_loss.dro_beta``), as they do for verl's own losses; `register` adds an `Objective` with
numbers of its own. BAPO searches its bounds from those of its released code, VESPO has none.
``NAMES`` are those that are there, all named constructors of `Objective` but ``gtpo`` and
``high_entropy``, which need entropies, and verl gives a loss none.

``loss_agg_mode`` holds for every objective; verl's own ``sapo`` and ``geo_mean`` average over
sequences whatever it says (``seq-mean-token-mean`` gives their numbers here). Importance weights
that differ within a sequence multiply the losses of its tokens: for ``rk_gspo`` each token's
gradient then has the mean of them, for verl's ``gspo`` its own, and ``geo_mean`` takes their
geometric mean. With ``algorithm.rollout_correction.bypass_mode`` verl gives a loss no weights and
rejects nothing before it: both are inside its own loss, ``bypass_mode``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, token_weights
from ..policy_loss.inputs import check_no_constructor
from ._log_probs import check_terms, log_prob_loss
from ._peer import import_peer, require_arguments

TESTED = "0.9"
_core = import_peer("verl.trainer.ppo.core_algos", TESTED)
require_arguments("verl", TESTED, _core.register_policy_loss, "name")
require_arguments(
    "verl", TESTED, _core.get_policy_loss_fn("vanilla"), "old_log_prob", "log_prob", "advantages",
    "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip

# verl's names for an aggregation, and ours.
AGGREGATION = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


# ---- objectives with the numbers of verl's configuration


def _bounds(config: Any) -> tuple[float, float]:
    """clip_ratio_low and clip_ratio_high."""
    given = config.clip_ratio_low, config.clip_ratio_high
    low, high = (config.clip_ratio if x is None else x for x in given)
    return low, high


def _clipped(name: str, config: Any) -> Objective:
    low, high = _bounds(config)
    build = getattr(Objective, name)
    objective: Objective = build(1 - low, 1 + high, dual_clip=config.clip_ratio_c)
    return objective


def _gspo(config: Any) -> Objective:
    low, high = _bounds(config)
    return Objective.gspo(1 - low, 1 + high)


def _gmpo(config: Any) -> Objective:
    """The bounds are of the log-ratio, as in verl's geo_mean."""
    low, high = _bounds(config)
    return Objective.gmpo(math.exp(-low), math.exp(high))


def _cispo(config: Any) -> Objective:
    low, high = _bounds(config)
    return Objective.cispo(1 + high, 1 - low)


def _dppo(name: str, config: Any) -> Objective:
    objective: Objective = getattr(Objective, name)(*_bounds(config), config.clip_ratio_c)
    return objective


def _clip_cov(config: Any) -> Objective:
    """Each call draws anew, from torch's generator."""
    low, high = _bounds(config)
    p, seed = config.policy_loss, int(torch.randint(2**62, ()))
    return Objective.clip_cov(
        1 - low, 1 + high, p.clip_cov_ratio, p.clip_cov_lb, p.clip_cov_ub, seed
    )


def _kl_cov(config: Any) -> Objective:
    return Objective.kl_cov(config.policy_loss.kl_cov_ratio, config.policy_loss.ppo_kl_coef)


def _dro(config: Any) -> Objective:
    beta = config.policy_loss.dro_beta
    if beta is None:
        _checks.fail("actor.policy_loss.dro_beta", "a number > 0 for rk_dro", None)
    return Objective.dro(beta)


CLIPPED = ("ppo", "grpo", "dapo", "dr_grpo", "gppo", "ce_gppo", "tppo")
OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    **{name: functools.partial(_clipped, name) for name in CLIPPED},
    **{name: functools.partial(_dppo, name) for name in ("dppo_tv", "dppo_kl")},
    "gspo": _gspo,
    "gmpo": _gmpo,
    "cispo": _cispo,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    # The paper's variant needs the engine's log-probabilities, which verl gives no policy loss.
    "bapo": lambda config: Objective.bapo("code", dual_clip=config.clip_ratio_c),
    "sapo": lambda config: Objective.sapo(config.tau_pos, config.tau_neg),
    "dro": _dro,
    "vespo": lambda config: Objective.vespo(),
    "gpg": lambda config: Objective.gpg(),
    "rloo": lambda config: Objective.rloo(),
    "reinforce": lambda config: Objective.reinforce(),
}
NAMES = tuple(f"rk_{name}" for name in OBJECTIVES)
# Terms of an `Objective` that are not its business in verl, and what is instead.
NOT_HERE = {
    "kl": "actor.use_kl_loss, actor.kl_loss_coef",
    "importance": "verl's rollout correction",
    "entropy_coef": "actor.entropy_coeff",
    "opsm": "verl's rollout correction: a loss gets no log-probabilities of the engine",
    "function": "a loss of your own: @register_policy_loss",
}


# ---- the loss


def _weights(mask: Tensor, mode: str, info: dict[str, Any]) -> Tensor:
    """The weights of verl's `agg_loss`; ``info`` is the configuration's ``global_batch_info``."""
    _checks.check_choice("loss_agg_mode", mode, AGGREGATION)
    ranks, by_token = info.get("dp_size", 1), mode.startswith("token")
    name = "batch_num_tokens" if by_token else "global_batch_size"
    total = info.get(name)
    if mode == "token-sum":
        total = 1
    elif total is None and ranks > 1:
        _checks.fail(f"global_batch_info[{name!r}]", f"a number with dp_size {ranks}", None)
    return token_weights(
        mask,
        AGGREGATION[mode],
        max_length=info.get("loss_scale_factor") if AGGREGATION[mode] == "constant" else None,
        num_tokens=total if by_token else None,
        num_sequences=None if by_token else total,
        data_parallel_size=ranks,
        count_empty=False,
    )


def objective_loss(
    objective: Objective,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss as verl calls it, for any `Objective` that needs log-probabilities alone.

    Args:
        objective: the loss of a token; entropy bonus and KL are verl's own terms.
        old_log_prob: (B, T), of the policy that the ratio is against.
        log_prob: (B, T), with autograd.
        advantages: (B, T); equal within a sequence for a sequence-level objective.
        response_mask: (B, T) bool or 0/1; masked tokens may hold anything.
        loss_agg_mode: one of verl's, with ``config.global_batch_info`` as its normalisers.
        config: verl's ActorConfig.
        rollout_is_weights: (B, T) detached factors of the token losses. None = 1.

    Returns:
        The loss, and metrics by name: ``actor/pg_clipfrac``, ``actor/ppo_kl`` and
        ``actor/pg_clipfrac_lower`` as verl's ``vanilla`` defines them, and those of
        `PolicyMetrics.compute` as ``actor/reasonkern/*``.

    Raises:
        ValueError: unknown aggregation, missing normaliser, advantages that differ within a
            sequence, an objective with terms that need more than log-probabilities.
    """
    mask = response_mask != 0
    info = {} if config is None else config.global_batch_info
    loss, counted = log_prob_loss(
        objective,
        log_prob,
        mask,
        old_logprob=old_log_prob,
        advantage=advantages,
        weight=_weights(mask, loss_agg_mode, info),
        importance=rollout_is_weights,
    )
    values = counted.compute()
    numbers = torch.stack(list(values.values())).tolist()  # one synchronisation
    found = dict(zip(values, numbers, strict=True))
    metrics = {
        "actor/pg_clipfrac": found["clip_frac"],
        "actor/ppo_kl": -found["kl_old_k1"],
        "actor/pg_clipfrac_lower": found["dual_clip_frac"],
    }
    ours = {k: v for k, v in found.items() if not k.startswith("entropy")}
    return loss, metrics | {f"actor/reasonkern/{k}": v for k, v in ours.items()}


def register(objective: Objective | Callable[[Any], Objective], name: str) -> str:
    """Registers an objective as a policy loss of verl, and returns its name.

    Args:
        objective: an `Objective`, or a function from verl's ActorConfig to one.
        name: for ``policy_loss.loss_mode``. Neither one of ``NAMES`` nor of verl's own losses;
            your own may be registered again.

    Raises:
        ValueError: a term that verl adds itself (``kl``, ``entropy_coef``, ``importance``) or that
            needs the engine's log-probabilities (``opsm``), an objective that needs entropies
            (``gtpo``, ``high_entropy``, user-defined ones), or a name that is taken.

    Example, in a module that ``VERL_USE_EXTERNAL_MODULES`` names::

        register(rk.Objective.gppo(0.8, 1.28, beta_low=0.5), "rk_gppo_half")
    """
    if isinstance(objective, Objective):
        check_terms(objective, NOT_HERE, "verl")
    else:
        check_no_constructor(objective)
        if not callable(objective):
            expected = "an Objective, or a function from verl's configuration to one"
            _checks.fail("objective", expected, repr(objective))
    if not isinstance(name, str) or name in TAKEN:
        _checks.fail("name", "one that neither verl nor reasonkern has taken", repr(name))
    _register(objective, name)
    return name


def _register(objective: Objective | Callable[[Any], Objective], name: str) -> None:
    def loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        found = objective if isinstance(objective, Objective) else objective(config)
        return objective_loss(
            found, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
            rollout_is_weights,
        )  # fmt: skip

    _core.register_policy_loss(name)(loss)


for _name, _build in zip(NAMES, OBJECTIVES.values(), strict=True):
    _register(_build, _name)
TAKEN = frozenset(_core.POLICY_LOSS_REGISTRY)
