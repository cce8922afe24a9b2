"""Which loss: `Objective` and its named constructors, each with its source and published defaults.

Bounds are explicit ratios (``ratio_min``, ``ratio_max``; None = unbounded), never an epsilon,
because projects disagree on what epsilon means.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from .adaptive import BalancedBounds, CovarianceSelection, EntropyFilter, HighEntropySelection
from .bapo import Range
from .conflict import LN_2
from .objective_checks import check, fail
from .objective_fields import ObjectiveFields
from .reference_objective import CISPO, DPPO_KL, DPPO_TV, DRO, GPPO, SAPO, Number

# Keywords of every constructor.
TERMS = (
    "kl", "entropy_coef", "importance", "opsm", "log_ratio_clamp", "selection", "dual_clip",
    "ratio_cap",
)  # fmt: skip
E_MINUS_0_4, E_PLUS_0_4 = math.exp(-0.4), math.exp(0.4)


class Objective(ObjectiveFields):
    """A clipped policy-gradient objective; build it with a named constructor.

    Every constructor also takes the added terms as keywords:

    * ``kl=("k1" | "k2" | "k3", coef, unbiased=False)``: `KL` to ``ref_logprob``, coef times -d,
      d^2 / 2 or e^d - d - 1 with d = ref_logprob - logp; unbiased multiplies the estimator by the
      ratio and differentiates through both.
    * ``entropy_coef``: subtracts ``entropy_coef * sum(entropy_weight * entropy)``.
    * ``importance=("token" | "sequence", "truncate" | "mask", lo, hi, geometric_mean=False)``:
      `Importance`, the weight exp(old_logprob - rollout_logprob) on the policy term, clamped to
      [lo, hi] (TIS) or 0 outside (IcePop by token, MIS by sequence).
    * ``opsm``: drops sequences with A < 0 and mean(rollout_logprob - logp) > opsm (DeepSeek-V3.2,
      arXiv 2512.02556).
    * ``log_ratio_clamp`` (20): the log-ratio is clamped to +-this before exp; the gradient through
      the ratio is 0 outside. None turns it off.
    * ``selection``: 0-dim or per-row factor on the policy term alone (a mask, a factor per token).

    Numeric fields are floats, 0-dim tensors (a schedule never recompiles) or per-row tensors.

    Raises:
        ValueError: a value without a meaning, such as an epsilon for a ratio; where an epsilon
            could be one, as in ``ppo(0.2)``, there is a warning.
        TypeError: a name that no objective has, or a call of the class itself.
    """

    def __init__(self, *given: Any, **fields: Any) -> None:
        """For the named constructors: a name alone would be an objective that clips nothing."""
        if "name" not in fields:
            got = f"Objective({', '.join(map(repr, given))})"
            raise TypeError(f"Objective: expected a constructor, Objective.dapo(), got {got}")
        terms: dict[str, Any] = given[0] if given else {}  # the caller's; a copy has none
        allowed = [name for name in TERMS if name not in fields]
        for name in terms:
            if name not in allowed:
                own = inspect.signature(getattr(Objective, fields["name"])).parameters
                expected = ", ".join([*(p for p in own if p != "terms"), *allowed])
                raise TypeError(f"Objective.{fields['name']}: expected {expected}, got {name}")
        super().__init__(**fields, **terms)
        self._warn_of_epsilon()

    def _warn_of_epsilon(self) -> None:
        """An epsilon alone, as in ``ppo(0.2)``, is a legal lower bound, but one nobody chooses."""
        lo, hi = self.ratio_min, self.ratio_max
        if not isinstance(lo, (int, float)) or not isinstance(hi, (int, float)):
            return
        if 0 < lo < 0.5 and hi < 1.5:
            meant = f"a ratio, {1 - lo:.7g} for an epsilon of {lo:g}"
            got = f"{lo:g} beside ratio_max = {hi:g}"
            warnings.warn(
                f"objective ratio_min: expected {meant}, got {got}", UserWarning, stacklevel=4
            )

    # ---- token-local objectives

    @classmethod
    def ppo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """-min(rA, clip(r, ratio_min, ratio_max) A)  (PPO, arXiv 1707.06347).

        Keywords: ``dual_clip=c`` (A < 0: loss at most -cA, arXiv 1912.09729) and ``ratio_cap``
        (r <- min(r, cap) in the unclipped branch: two-sided clipping of INTELLECT-2, 2505.07291).
        """
        return cls(terms, name="ppo", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def grpo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """PPO's loss with group-normalised advantages (DeepSeekMath, arXiv 2402.03300).

        Use weights of mode ``seq-mean-token-mean``; the paper adds ``kl=("k3", 0.04)``.
        """
        return cls(terms, name="grpo", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def dapo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.28, **terms: Any
    ) -> Objective:
        """PPO's loss with clip-higher (DAPO, arXiv 2503.14476); weights of mode ``token-mean``."""
        return cls(terms, name="dapo", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def dr_grpo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """PPO's loss without length or std normalisation (arXiv 2503.20783); mode ``constant``."""
        return cls(terms, name="dr_grpo", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def tppo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.28, **terms: Any
    ) -> Objective:
        """PPO's loss with clip-higher on the current window's tokens (T-PPO, arXiv 2506.15050).

        The paper released no code and its bounds are not known to us: these are DAPO's. Weights
        from its policy mask, advantages from its extended GAE (bootstrap with the last value).
        """
        return cls(terms, name="tppo", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def gppo(
        cls,
        ratio_min: Number | None = 0.8,
        ratio_max: Number | None = 1.28,
        beta_low: Number = 1.0,
        beta_high: Number = 1.0,
        **terms: Any,
    ) -> Objective:
        """Gradient-preserving clipping (Klear-Reasoner, arXiv 2508.07629).

        Tokens on the clipped side keep the gradient ``beta * bound * A`` instead of 0.
        """
        return cls(
            terms, name="gppo", kind=GPPO, ratio_min=ratio_min, ratio_max=ratio_max,
            low=beta_low, high=beta_high,
        )  # fmt: skip

    @classmethod
    def ce_gppo(
        cls,
        ratio_min: Number | None = 0.8,
        ratio_max: Number | None = 1.28,
        beta_low: Number = 0.25,
        beta_high: Number = 1.0,
        **terms: Any,
    ) -> Objective:
        """GPPO with separate factors that steer the entropy (CE-GPPO, arXiv 2509.20712).

        The numbers are those of Klear-Reasoner's script; CE-GPPO's own runs take an upper bound of
        1.2, and a lower factor of 0.5 for 1.5B and 0.75 for 7B.
        """
        return cls(
            terms, name="ce_gppo", kind=GPPO, ratio_min=ratio_min, ratio_max=ratio_max,
            low=beta_low, high=beta_high,
        )  # fmt: skip

    @classmethod
    def cispo(
        cls, ratio_max: Number | None = 5.0, ratio_min: Number | None = None, **terms: Any
    ) -> Objective:
        """-sg(clip(r)) A logp: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585).

        The upper bound is the one ScaleRL recommends (arXiv 2510.13786), without a lower one.
        """
        return cls(terms, name="cispo", kind=CISPO, ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def sapo(
        cls, tau_positive: Number = 1.0, tau_negative: Number = 1.05, **terms: Any
    ) -> Objective:
        """-A (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, arXiv 2511.20347)."""
        return cls(terms, name="sapo", kind=SAPO, low=tau_positive, high=tau_negative)

    @classmethod
    def reinforce(
        cls, ratio_min: Number | None = 1.0, ratio_max: Number | None = 1.0, **terms: Any
    ) -> Objective:
        """-sg(clip(r)) A logp; the default bounds [1, 1] leave out the ratio.

        ``reinforce(0.1, 10)`` is torchforge's clamped detached ratio.
        """
        return cls(terms, name="reinforce", kind=CISPO, ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def gpg(cls, **terms: Any) -> Objective:
        """-A logp (GPG, arXiv 2504.02546); its rescaling of A is the caller's."""
        return cls(terms, name="gpg", kind=CISPO, ratio_min=1.0, ratio_max=1.0)

    @classmethod
    def rloo(cls, **terms: Any) -> Objective:
        """-A logp with leave-one-out advantages (RLOO, arXiv 2402.14740).

        An answer is one action there: weights of mode ``seq-mean-token-sum``.
        """
        return cls(terms, name="rloo", kind=CISPO, ratio_min=1.0, ratio_max=1.0)

    @classmethod
    def dppo_tv(
        cls,
        threshold_low: Number = 0.15,
        threshold_high: Number = 0.15,
        ratio_max: Number | None = 20.0,
        **terms: Any,
    ) -> Objective:
        """-A sg(min(r, ratio_max)) logp where the token's probability stays in the trust region.

        A > 0: p - p_old <= threshold_high; else p - p_old >= -threshold_low (DPPO-Binary-TV,
        arXiv 2602.04879; thresholds of the authors' verl recipe, ratio_max of verl's loss).
        """
        return cls(
            terms, name="dppo_tv", kind=DPPO_TV, ratio_max=ratio_max, low=threshold_low,
            high=threshold_high,
        )  # fmt: skip

    @classmethod
    def dppo_kl(
        cls,
        threshold_low: Number = 0.05,
        threshold_high: Number = 0.05,
        ratio_max: Number | None = 20.0,
        **terms: Any,
    ) -> Objective:
        """As `dppo_tv`, with Bernoulli KL(p_old || p) <= threshold or p moving back to p_old."""
        return cls(
            terms, name="dppo_kl", kind=DPPO_KL, ratio_max=ratio_max, low=threshold_low,
            high=threshold_high,
        )  # fmt: skip

    @classmethod
    def dro(cls, beta: Number = 0.1, **terms: Any) -> Objective:
        """-(A logp - beta/2 (logp - old)^2)  (DRO, arXiv 2405.19107).

        By token, as in verl, which has no default of beta: this one is ours. In the paper logp and
        old, its reference, are of the whole answer.
        """
        return cls(terms, name="dro", kind=DRO, low=beta)

    # ---- sequence-level objectives (two passes over the logits)

    @classmethod
    def gspo(
        cls, ratio_min: Number | None = 0.9997, ratio_max: Number | None = 1.0004, **terms: Any
    ) -> Objective:
        """PPO's loss on s = exp(mean of the log-ratio over the sequence) (GSPO, 2507.18071).

        With weights of mode ``seq-mean-token-sum`` it is LUSPO (2602.05261).
        """
        return cls(terms, name="gspo", level="sequence", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def gmpo(
        cls,
        ratio_min: Number | None = E_MINUS_0_4,
        ratio_max: Number | None = E_PLUS_0_4,
        **terms: Any,
    ) -> Objective:
        """-A exp(mean of one-sidedly clipped log-ratios) (GMPO, arXiv 2507.20673)."""
        return cls(terms, name="gmpo", level="sequence", ratio_min=ratio_min, ratio_max=ratio_max)

    @classmethod
    def vespo(
        cls,
        k_positive: Number = 2.0,
        lambda_positive: Number = 3.0,
        k_negative: Number = 3.0,
        lambda_negative: Number = 2.0,
        **terms: Any,
    ) -> Objective:
        """-phi(w) A logp, phi = e^{lambda + k ln w - lambda w}, w = detached product of ratios.

        ln w is limited to [ln 1e-8, 20]; (k, lambda) by the sign of A (VESPO, arXiv 2602.10693).
        ``importance`` is a factor of the loss; the authors' code multiplies w by it.
        """
        shape = (k_positive, lambda_positive, k_negative, lambda_negative)
        return cls(terms, name="vespo", level="sequence", vespo_shape=shape)

    # ---- objectives that look at the whole batch (two passes over the logits)

    @classmethod
    def bapo(
        cls,
        variant: Literal["paper", "code"] = "paper",
        low: Range | None = None,
        high: Range | None = None,
        target: float | None = None,
        **terms: Any,
    ) -> Objective:
        """PPO's loss with bounds from `reasonkern.bapo_bounds` of each batch (BAPO, 2510.18927).

        ``variant="paper"`` needs ``rollout_logprob``; pass ``old_logprob`` there if that policy
        sampled. ``variant="code"`` clips dually at 3 unless ``dual_clip`` is given, as the released
        code does. The batch is the call's, over the ranks of its ``parallel``; for a window of
        several calls compute the bounds once and use `ppo` with them.
        """
        if variant == "code":
            terms = {"dual_clip": 3.0, **terms}
        return cls(terms, name="bapo", rule=BalancedBounds(variant, low, high, target))

    @classmethod
    def clip_cov(
        cls,
        ratio_min: Number | None = 0.8,
        ratio_max: Number | None = 1.2,
        fraction: float = 2e-4,
        low: float = 1.0,
        high: float = 5.0,
        seed: int | Tensor = 0,
        **terms: Any,
    ) -> Objective:
        """PPO's loss without a few unclipped tokens of high covariance (Clip-Cov, 2505.22617).

        They are drawn by `reasonkern.covariance_mask`; give another ``seed`` each step. The bounds
        are those of the paper's PPO, the rest its and verl's defaults; its runs of Clip-Cov widen
        the bounds to [0, 2].
        """
        rule = CovarianceSelection("clip", fraction, low, high, 0.0, seed)
        return cls(terms, name="clip_cov", ratio_min=ratio_min, ratio_max=ratio_max, rule=rule)

    @classmethod
    def kl_cov(cls, fraction: float = 2e-4, coef: float = 1.0, **terms: Any) -> Objective:
        """-rA, + coef abs(log r) on the tokens of largest covariance (KL-Cov, arXiv 2505.22617).

        The ratio is not clipped. The paper takes fraction 2e-3 for 7B and 2e-4 for 32B with coef 1;
        verl's configuration has 2e-4 and 0.1.
        """
        rule = CovarianceSelection("kl", fraction, 0.0, 0.0, coef, 0)
        return cls(terms, name="kl_cov", rule=rule)

    @classmethod
    def high_entropy(
        cls,
        rho: float = 0.2,
        ratio_min: Number | None = 0.8,
        ratio_max: Number | None = 1.28,
        **terms: Any,
    ) -> Objective:
        """DAPO's loss on the share rho of tokens of highest entropy ("80/20", arXiv 2506.01939).

        The others keep their part in the normaliser, as in TRL; the paper divides by the selected
        ones: then divide the weights by rho. See `reasonkern.high_entropy_mask`.
        """
        rule = HighEntropySelection(rho)
        return cls(terms, name="high_entropy", ratio_min=ratio_min, ratio_max=ratio_max, rule=rule)

    @classmethod
    def gtpo(
        cls,
        conflict_weights: Tensor | None = None,
        max_entropy: float = LN_2,
        coef: float = 0.1,
        initial_entropy: float | Tensor | None = None,
        **terms: Any,
    ) -> Objective:
        """-lambda (A - coef <H>) logp, 0 for sequences with mean entropy <H> > ln 2 (2508.03772).

        lambda is ``conflict_weights``, per row, from `reasonkern.conflict_token_weights` (None: 1);
        see `reasonkern.entropy_filter` for the other arguments and where the released code
        differs. Advantages are r - mean(r) without std, weights of mode ``seq-mean-token-mean``.
        The released code sums over completions instead of averaging.
        """
        known = conflict_weights is None or isinstance(conflict_weights, Tensor)
        check(known, "conflict_weights", "a tensor or None", conflict_weights)
        rule = EntropyFilter(max_entropy, coef, initial_entropy)
        return cls(
            terms, name="gtpo", kind=CISPO, ratio_min=1.0, ratio_max=1.0,
            selection=conflict_weights, rule=rule,
        )  # fmt: skip

    @classmethod
    def custom(cls, function: Callable[..., Tensor], **terms: Any) -> Objective:
        """A user-defined torch function ``(logprob, entropy, ctx) -> token_loss``.

        It runs on `token_stats`; ``ctx`` is a `reasonkern.RowContext` with the rows' other inputs.
        Where the logits want a gradient, the loss must have one, too: a detached one is refused.
        """
        if not callable(function):
            fail("custom", "a function (logprob, entropy, ctx) -> token_loss", repr(function))
        return cls(terms, name="custom", level="custom", function=function)
