"""Which values of an `Objective` have no meaning; tensors are taken as they are (no sync)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from .. import _checks
from .reference_objective import CLIP, DPPO_KL, DPPO_TV, DRO, GPPO, SAPO

if TYPE_CHECKING:
    from .objective_fields import ObjectiveFields

REQUIRED = ("low", "high", "entropy_coef", "log_ratio_penalty")
# What the constructors call the fields low and high.
LIMITS = {
    SAPO: ("tau_positive", "tau_negative"),
    DPPO_TV: ("threshold_low", "threshold_high"),
    DPPO_KL: ("threshold_low", "threshold_high"),
    DRO: ("beta",),
    GPPO: ("beta_low", "beta_high"),
}
OPTIONAL = ("ratio_min", "ratio_max", "dual_clip", "ratio_cap", "log_ratio_clamp", "opsm")


def fail(name: str, expected: str, got: object) -> NoReturn:
    """ValueError for a field of an objective."""
    _checks.fail(f"objective {name}", expected, got)


def check(ok: bool, name: str, expected: str, got: object) -> None:
    """`fail` unless `ok`."""
    if not ok:
        fail(name, expected, got)


def of_python(x: Any) -> Any:
    """NumPy's numbers as Python's, whose bounds are checked; all else as it is."""
    if x is None or isinstance(x, (int, float, str, Tensor)) or not _checks.is_number(x):
        return x
    return float(x)


def validate(o: ObjectiveFields) -> None:
    """Refuses values that have no meaning; tensors are taken as they are (no synchronisation)."""
    called = dict(zip(("low", "high"), LIMITS.get(o.kind, ()), strict=False))
    for name in (*OPTIONAL, *REQUIRED):
        x = getattr(o, name)
        left_out = x is None and name in OPTIONAL
        if not left_out and not isinstance(x, Tensor) and not _is_number(x):
            fail(called.get(name, name), "a number", repr(x))
    lo, hi, cap, dual = o.ratio_min, o.ratio_max, o.ratio_cap, o.dual_clip
    if isinstance(lo, (int, float)) and not 0 <= lo <= 1:
        expected = f"a ratio in [0, 1], not an epsilon, or None{_order(o.name)}"
        fail("ratio_min", expected, lo)
    if isinstance(hi, (int, float)) and not hi >= 1:
        expected = f"a ratio >= 1, not an epsilon, or None{_as_ratios(lo, hi)}{_order(o.name)}"
        fail("ratio_max", expected, hi)
    if isinstance(cap, (int, float)):
        bound = hi if isinstance(hi, (int, float)) else math.inf if hi is None else 0.0
        check(cap > bound, "ratio_cap", f"more than ratio_max = {hi}", cap)
    if isinstance(dual, (int, float)):
        check(dual > 1, "dual_clip", "a ratio > 1 or None", dual)
    _validate_kind(o)
    _validate_terms(o)


def validate_kl(estimator: object, coef: Any) -> None:
    """Refuses what is no KL term."""
    check(estimator in ("k1", "k2", "k3"), "kl", "estimator k1, k2 or k3", estimator)
    # A negative one would push the policy away from its reference, without bound for k2 and k3.
    if not isinstance(coef, Tensor) and not (_is_number(coef) and 0 <= coef < math.inf):
        fail("kl", "a finite coefficient >= 0", repr(coef))


def _order(name: str) -> str:
    """One constructor has the bound first that the others have second."""
    return " (cispo takes ratio_max first, then ratio_min)" if name == "cispo" else ""


def _as_ratios(lo: object, hi: float) -> str:
    """What was meant where bounds can be epsilons, as in ``dapo(0.2, 0.28)``."""
    if not isinstance(lo, (int, float)) or not 0 < lo < 0.5 or not 0 < hi < 1:
        return ""
    ratios = f"ratio_min={1 - lo:.7g}, ratio_max={1 + hi:.7g}"
    return f" ({ratios} for the epsilons {lo:g} and {hi:g})"


# torch.compile(dynamic=True) cannot trace math.isnan, math.isfinite or repr of a number: hence
# these two, and words of an error that are put together where there is one.


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == x


def _is_finite(x: float) -> bool:
    return -math.inf < x < math.inf


def _validate_kind(o: ObjectiveFields) -> None:
    clips = o.kind in (CLIP, GPPO) and (o.level == "token" or o.name == "gspo")
    check(o.dual_clip is None or clips, "dual_clip", f"None for {o.name}", o.dual_clip)
    check(
        o.ratio_cap is None or (clips and o.kind == CLIP),
        "ratio_cap", f"None for {o.name}", o.ratio_cap,
    )  # fmt: skip
    if o.level == "token" and o.kind in LIMITS:
        for name, x in zip(LIMITS[o.kind], (o.low, o.high), strict=False):
            if isinstance(x, (int, float)):
                ok, bound = (x >= 0, ">= 0") if o.kind == GPPO else (x > 0, "> 0")
                check(ok and _is_finite(x), name, f"a finite number {bound}", x)
    if o.vespo_shape is not None:
        ok = all(isinstance(x, Tensor) or (_is_finite(x) and x > 0) for x in o.vespo_shape)
        check(ok, "vespo", "finite k, lambda > 0", o.vespo_shape)


def _validate_terms(o: ObjectiveFields) -> None:
    kind = type(o.selection).__name__
    check(o.selection is None or isinstance(o.selection, Tensor), "selection", "a tensor", kind)
    check(o.rule is None or o.level == "token", "rule", "None unless level is token", o.level)
    expected = "0 unless level is token"
    penalty = o.log_ratio_penalty
    check(o.level == "token" or not o.is_penalised, "log_ratio_penalty", expected, penalty)
    if isinstance(o.log_ratio_clamp, (int, float)):
        check(o.log_ratio_clamp > 0, "log_ratio_clamp", "a number > 0 or None", o.log_ratio_clamp)
    if isinstance(o.entropy_coef, (int, float)):
        check(_is_finite(o.entropy_coef), "entropy_coef", "a finite number", o.entropy_coef)
    if o.importance is not None:
        level, mode, lo, hi, _ = o.importance
        check(level in ("token", "sequence"), "importance", "level token or sequence", level)
        check(mode in ("truncate", "mask"), "importance", "mode truncate or mask", mode)
        low, high = 0.0 if lo is None else lo, math.inf if hi is None else hi
        if not isinstance(low, Tensor) and not isinstance(high, Tensor):
            check(0 <= low <= high, "importance", "0 <= lo <= hi", (lo, hi))
