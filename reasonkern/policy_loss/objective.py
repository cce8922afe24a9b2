"""Which loss: `Objective` and its named constructors, each with its source and published defaults.

Bounds are explicit ratios (``ratio_min``, ``ratio_max``; None = unbounded), never an epsilon,
because projects disagree on what epsilon means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .reference import CISPO, CLIP, DPPO_KL, DPPO_TV, DRO, GPPO, SAPO

Number = float | Tensor
E_MINUS_0_4, E_PLUS_0_4 = math.exp(-0.4), math.exp(0.4)
KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}

# The order of `values` and `hyper` in the operators, and of struct Hyper in objective.h.
HYPER = (
    "ratio_min",
    "ratio_max",
    "dual_clip",
    "ratio_cap",
    "low",
    "high",
    "kl_coef",
    "entropy_coef",
    "log_ratio_clamp",
)


class KL(NamedTuple):
    """KL term ``coef * k(d)`` with d = ref - logp: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1."""

    estimator: Literal["k1", "k2", "k3"]
    coef: Number
    unbiased: bool = False


class Importance(NamedTuple):
    """Detached trainer/inference correction w = exp(old_logprob - rollout_logprob).

    ``truncate`` clamps w to [lo, hi] (TIS); ``mask`` zeroes tokens with w outside (IcePop, MIS).
    ``level="sequence"`` uses the product over the sequence, or its geometric mean.
    """

    level: Literal["token", "sequence"]
    mode: Literal["truncate", "mask"]
    lo: Number | None
    hi: Number | None
    geometric_mean: bool = False


@dataclass(frozen=True, eq=False)
class Objective:
    """A clipped policy-gradient objective; build it with a named constructor.

    Every constructor also takes the added terms as keywords:

    * ``kl=("k1" | "k2" | "k3", coef, unbiased=False)``: KL to ``ref_logprob``; unbiased multiplies
      the estimator by the ratio and differentiates through both.
    * ``entropy_coef``: subtracts ``entropy_coef * sum(entropy_weight * entropy)``.
    * ``importance=("token" | "sequence", "truncate" | "mask", lo, hi, geometric_mean=False)``:
      weight exp(old_logprob - rollout_logprob) on the policy term (TIS, IcePop, MIS).
    * ``opsm``: drops sequences with A < 0 and mean(rollout_logprob - logp) > opsm (DeepSeek-V3.2,
      arXiv 2512.02556).
    * ``log_ratio_clamp`` (20): the log-ratio is clamped to +-this before exp; the gradient through
      the ratio is 0 outside. None turns it off.

    Numeric fields are floats, 0-dim tensors (a schedule never recompiles) or per-row tensors.
    """

    name: str
    level: Literal["token", "sequence", "custom"] = "token"
    kind: int = CLIP
    ratio_min: Number | None = None
    ratio_max: Number | None = None
    dual_clip: Number | None = None
    ratio_cap: Number | None = None
    low: Number = 0.0
    high: Number = 0.0
    vespo_shape: tuple[Number, Number, Number, Number] | None = None
    function: Callable[..., Tensor] | None = None
    kl: KL | tuple[Any, ...] | None = None
    entropy_coef: Number = 0.0
    importance: Importance | tuple[Any, ...] | None = None
    opsm: Number | None = None
    log_ratio_clamp: Number | None = 20.0

    def __post_init__(self) -> None:
        """Normalises the tuples and refuses values that have no meaning."""
        for name, kind in (("kl", KL), ("importance", Importance)):
            given = getattr(self, name)
            if given is None:
                continue
            required = len(kind._fields) - len(kind._field_defaults)
            fits = isinstance(given, (tuple, list)) and required <= len(given) <= len(kind._fields)
            _check(fits, name, "a tuple (" + ", ".join(kind._fields) + ")", given)
            object.__setattr__(self, name, kind(*given))
        _validate(self)

    # ---- token-local objectives

    @classmethod
    def ppo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """-min(rA, clip(r, ratio_min, ratio_max) A)  (PPO, arXiv 1707.06347).

        Keywords: ``dual_clip=c`` (A < 0: loss at most -cA, arXiv 1912.09729) and ``ratio_cap``
        (r <- min(r, cap) in the unclipped branch: two-sided clipping of INTELLECT-2, 2505.07291).
        """
        return cls("ppo", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def grpo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """PPO's loss with group-normalised advantages (DeepSeekMath, arXiv 2402.03300).

        Use weights of mode ``seq-mean-token-mean``; the paper adds ``kl=("k3", 0.04)``.
        """
        return cls("grpo", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def dapo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.28, **terms: Any
    ) -> Objective:
        """PPO's loss with clip-higher (DAPO, arXiv 2503.14476); weights of mode ``token-mean``."""
        return cls("dapo", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def dr_grpo(
        cls, ratio_min: Number | None = 0.8, ratio_max: Number | None = 1.2, **terms: Any
    ) -> Objective:
        """PPO's loss without length or std normalisation (arXiv 2503.20783); mode ``constant``."""
        return cls("dr_grpo", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

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
            "gppo", kind=GPPO, ratio_min=ratio_min, ratio_max=ratio_max, low=beta_low,
            high=beta_high, **terms,
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
        """GPPO with separate factors that steer the entropy (CE-GPPO, arXiv 2509.20712)."""
        return cls(
            "ce_gppo", kind=GPPO, ratio_min=ratio_min, ratio_max=ratio_max, low=beta_low,
            high=beta_high, **terms,
        )  # fmt: skip

    @classmethod
    def cispo(
        cls, ratio_max: Number | None = 5.0, ratio_min: Number | None = None, **terms: Any
    ) -> Objective:
        """-sg(clip(r)) A logp: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585).

        The upper bound is the one ScaleRL recommends (arXiv 2510.13786), without a lower one.
        """
        return cls("cispo", kind=CISPO, ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def sapo(
        cls, tau_positive: Number = 1.0, tau_negative: Number = 1.05, **terms: Any
    ) -> Objective:
        """-A (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, arXiv 2511.20347)."""
        return cls("sapo", kind=SAPO, low=tau_positive, high=tau_negative, **terms)

    @classmethod
    def reinforce(
        cls, ratio_min: Number | None = 1.0, ratio_max: Number | None = 1.0, **terms: Any
    ) -> Objective:
        """-sg(clip(r)) A logp; the default bounds [1, 1] leave out the ratio.

        ``reinforce(0.1, 10)`` is torchforge's clamped detached ratio.
        """
        return cls("reinforce", kind=CISPO, ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def gpg(cls, **terms: Any) -> Objective:
        """-A logp (GPG, arXiv 2504.02546); its rescaling of A is the caller's."""
        return cls("gpg", kind=CISPO, ratio_min=1.0, ratio_max=1.0, **terms)

    @classmethod
    def rloo(cls, **terms: Any) -> Objective:
        """-A logp with leave-one-out advantages (RLOO, arXiv 2402.14740)."""
        return cls("rloo", kind=CISPO, ratio_min=1.0, ratio_max=1.0, **terms)

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
            "dppo_tv", kind=DPPO_TV, ratio_max=ratio_max, low=threshold_low, high=threshold_high,
            **terms,
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
            "dppo_kl", kind=DPPO_KL, ratio_max=ratio_max, low=threshold_low, high=threshold_high,
            **terms,
        )  # fmt: skip

    @classmethod
    def dro(cls, beta: Number = 0.1, **terms: Any) -> Objective:
        """-(A logp - beta/2 (logp - old)^2)  (DRO, arXiv 2405.19107)."""
        return cls("dro", kind=DRO, low=beta, **terms)

    # ---- sequence-level objectives (two passes over the logits)

    @classmethod
    def gspo(
        cls, ratio_min: Number | None = 0.9997, ratio_max: Number | None = 1.0004, **terms: Any
    ) -> Objective:
        """PPO's loss on s = exp(mean of the log-ratio over the sequence) (GSPO, 2507.18071)."""
        return cls("gspo", level="sequence", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

    @classmethod
    def gmpo(
        cls,
        ratio_min: Number | None = E_MINUS_0_4,
        ratio_max: Number | None = E_PLUS_0_4,
        **terms: Any,
    ) -> Objective:
        """-A exp(mean of one-sidedly clipped log-ratios) (GMPO, arXiv 2507.20673)."""
        return cls("gmpo", level="sequence", ratio_min=ratio_min, ratio_max=ratio_max, **terms)

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
        """
        shape = (k_positive, lambda_positive, k_negative, lambda_negative)
        return cls("vespo", level="sequence", vespo_shape=shape, **terms)

    @classmethod
    def custom(cls, function: Callable[..., Tensor], **terms: Any) -> Objective:
        """A user-defined torch function ``(logprob, entropy, ctx) -> token_loss``.

        It runs on `token_stats`; ``ctx`` is a `reasonkern.RowContext` with the rows' other inputs.
        """
        return cls("custom", level="custom", function=function, **terms)

    @property
    def leaves_out_ratio(self) -> bool:
        """Whether both bounds of a detached ratio are 1, as in REINFORCE: it clips nothing."""
        bounds = (self.ratio_min, self.ratio_max)
        return self.kind == CISPO and all(isinstance(x, (int, float)) and x == 1 for x in bounds)

    # ---- what the operators take

    def numbers(self) -> tuple[Number, ...]:
        """The fields in the order of `HYPER`, with None replaced by the number it stands for."""
        kl_coef: Number = self.kl[1] if self.kl is not None else 0.0
        return (
            0.0 if self.ratio_min is None else self.ratio_min,
            math.inf if self.ratio_max is None else self.ratio_max,
            math.inf if self.dual_clip is None else self.dual_clip,
            math.inf if self.ratio_cap is None else self.ratio_cap,
            self.low,
            self.high,
            kl_coef,
            self.entropy_coef,
            math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp,
        )

    def pack(self, rows: Tensor) -> tuple[list[float], Tensor | None]:
        """``(values, hyper)`` for rows like ``rows`` (B, T), of its dtype and device.

        ``hyper`` is None when all numbers are floats, else (9, 1), or (9, B*T) with per-row fields.
        """
        numbers = self.numbers()
        if not any(isinstance(x, Tensor) for x in numbers):
            return [float(x) for x in numbers], None
        per_row = any(isinstance(x, Tensor) and x.ndim > 0 for x in numbers)
        shape = rows.shape if per_row else torch.Size(())
        fields = [
            _row_field(name, x, rows, shape) if isinstance(x, Tensor) else rows.new_full(shape, x)
            for name, x in zip(HYPER, numbers, strict=True)
        ]
        return [0.0] * len(HYPER), torch.stack(fields).reshape(len(HYPER), -1)


def _row_field(name: str, x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    x = x.to(device=rows.device, dtype=rows.dtype)
    if x.shape == rows.shape[1:] and rows.shape[0] == 1:
        x = x.unsqueeze(0)  # packed (N,) tokens are rows of shape (1, N)
    if x.ndim and x.shape != rows.shape:
        expected = f"a float, a 0-dim tensor or one value per row {tuple(rows.shape)}"
        _check(False, name, expected, f"shape {tuple(x.shape)}")
    return x.expand(shape)


def _check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"objective {name}: expected {expected}, got {got}")


def _validate(o: Objective) -> None:
    """Refuses values that have no meaning; tensors are taken as they are (no synchronisation)."""
    for name in (*HYPER[:6], "entropy_coef", "log_ratio_clamp", "opsm"):
        x = getattr(o, name)
        optional = x is None and name not in ("low", "high", "entropy_coef")
        if not optional and not isinstance(x, Tensor):
            _check(isinstance(x, (int, float)) and not math.isnan(x), name, "a number", x)
    lo, hi, cap, dual = o.ratio_min, o.ratio_max, o.ratio_cap, o.dual_clip
    if isinstance(lo, (int, float)):
        _check(lo >= 0, "ratio_min", "a ratio >= 0 or None", lo)
        if isinstance(hi, (int, float)):
            _check(hi >= lo, "ratio_max", f"at least ratio_min = {lo}", hi)
    if isinstance(hi, (int, float)):
        _check(hi > 0, "ratio_max", "a ratio > 0 or None", hi)
    if isinstance(cap, (int, float)):
        bound = hi if isinstance(hi, (int, float)) else math.inf if hi is None else 0.0
        _check(cap > bound, "ratio_cap", f"more than ratio_max = {hi}", cap)
    if isinstance(dual, (int, float)):
        _check(dual > 1, "dual_clip", "a ratio > 1 or None", dual)
    _validate_kind(o)
    _validate_terms(o)


def _validate_kind(o: Objective) -> None:
    clips = o.kind in (CLIP, GPPO) and (o.level == "token" or o.name == "gspo")
    _check(o.dual_clip is None or clips, "dual_clip", f"None for {o.name}", o.dual_clip)
    _check(
        o.ratio_cap is None or (clips and o.kind == CLIP),
        "ratio_cap", f"None for {o.name}", o.ratio_cap,
    )  # fmt: skip
    limits = {SAPO: "tau", DPPO_TV: "threshold", DPPO_KL: "threshold", DRO: "beta", GPPO: "beta"}
    if o.level == "token" and o.kind in limits:
        for side, x in (("low", o.low), ("high", o.high)):
            if isinstance(x, (int, float)) and not (o.kind == DRO and side == "high"):
                ok = x >= 0 if o.kind == GPPO else x > 0
                _check(ok and math.isfinite(x), limits[o.kind], "a positive number", x)
    if o.vespo_shape is not None:
        ok = all(isinstance(x, Tensor) or (math.isfinite(x) and x > 0) for x in o.vespo_shape)
        _check(ok, "vespo", "finite k, lambda > 0", o.vespo_shape)


def _validate_terms(o: Objective) -> None:
    if isinstance(o.log_ratio_clamp, (int, float)):
        _check(o.log_ratio_clamp > 0, "log_ratio_clamp", "a number > 0 or None", o.log_ratio_clamp)
    if isinstance(o.entropy_coef, (int, float)):
        _check(math.isfinite(o.entropy_coef), "entropy_coef", "a finite number", o.entropy_coef)
    if isinstance(o.kl, KL):
        _check(o.kl.estimator in KL_KINDS, "kl", "estimator k1, k2 or k3", o.kl.estimator)
        coef = o.kl.coef
        if not isinstance(coef, Tensor):
            ok = isinstance(coef, (int, float)) and math.isfinite(coef)
            _check(ok, "kl", "a finite coefficient", coef)
    if isinstance(o.importance, Importance):
        level, mode, lo, hi, _ = o.importance
        _check(level in ("token", "sequence"), "importance", "level token or sequence", level)
        _check(mode in ("truncate", "mask"), "importance", "mode truncate or mask", mode)
        low, high = 0.0 if lo is None else lo, math.inf if hi is None else hi
        if not isinstance(low, Tensor) and not isinstance(high, Tensor):
            _check(0 <= low <= high, "importance", "0 <= lo <= hi", (lo, hi))
