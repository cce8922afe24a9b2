"""Reward from parts: gated, normalised, scheduled weighted sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _checks
from .advantages import over_sigma
from .groups import Groups, check_vector, narrow, wide

NORMALISE = ("none", "per-component")


def mix_rewards(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    gates: Mapping[str, Tensor] | None = None,
    *,
    normalise: str = "none",
    schedule: Mapping[str, float] | None = None,
    group: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """One reward from several: ``Σ_c schedule_c weight_c gate_c r_c``.

    PTA-GRPO (2510.01833: answer, plan quality, format), RLSP (2502.06773: exploration decoupled
    from correctness), AdaCtrl (2505.18822), Datarus-R1 (2508.13382: two rewards that change places
    by a `cosine` schedule) and GDPO (2601.05242: components normalised by group before the sum,
    which then goes to ``group_advantages(baseline="batch-mean", scale="batch-std")``).
    Equivalent to, without ``normalise`` and ``schedule``:
    ``sum(weights[c] * gates[c] * components[c] for c in components)``.

    Args:
        components: name → (N,) rewards, all on one device.
        weights: name → number; the names of ``components``, no more and no less.
        gates: name → (N,) bool or numbers that multiply a component; what a False hides is not
            read (a NaN behind it stays there). A name without a gate is open; None = all open.
        normalise: "none", or "per-component": after its gate each component becomes
            (r - mean) / (std + eps) over its group, std Bessel-corrected, 0 in a group of one.
        schedule: name → factor of the weight at this step, such as ``cosine(step, total)``; a name
            without one has factor 1; None = all 1.
        group: (N,) int64 ids, for "per-component"; None = not needed.
        eps: added to the std.

    Returns:
        (N,) float32 (float64 where a component is).

    Raises:
        ValueError: no mapping, names that do not match, no component, wrong shape or device, or an
            unknown choice.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import mix_rewards
        >>> parts = {"answer": torch.tensor([1.0, 0.0]), "length": torch.tensor([0.2, 0.6])}
        >>> gate = {"length": parts["answer"] > 0}
        >>> mix_rewards(parts, {"answer": 1.0, "length": 0.5}, gate)
        tensor([1.1000, 0.0000])
    """
    _checks.check_choice("normalise", normalise, NORMALISE)
    _checks.check_number("eps", eps, 0.0)
    for what, given in (("components", components), ("weights", weights)):
        if not isinstance(given, Mapping):
            _checks.fail(what, "a mapping from names", type(given).__name__)
    names = list(components)
    if not names:
        _checks.fail("components", "one component or more", "none")
    if set(weights) != set(names):
        _checks.fail("weights", f"the names {sorted(names)}", sorted(weights))
    gates = {} if gates is None else gates
    schedule = {} if schedule is None else schedule
    for what, given in (("gates", gates), ("schedule", schedule)):
        if not isinstance(given, Mapping):
            _checks.fail(what, "a mapping from names or None", type(given).__name__)
        if not set(given) <= set(names):
            _checks.fail(what, f"some of the names {sorted(names)}", sorted(given))
    first = check_vector(names[0], components[names[0]])
    groups = None
    if normalise == "per-component":
        if group is None:
            _checks.fail("group", "a tensor for normalise='per-component'", None)
        groups = Groups(group, first, names[0])
    total = torch.zeros_like(first, dtype=torch.float64)
    for name in names:
        part = check_vector(name, components[name], first, names[0])
        weight, scheduled = weights[name], schedule.get(name, 1.0)
        _checks.check_number(f"weights[{name!r}]", weight)
        _checks.check_number(f"schedule[{name!r}]", scheduled)
        total = total + weight * scheduled * _part(name, wide(part), gates.get(name), groups, eps)
    widest = next((c for c in components.values() if c.dtype == torch.float64), first)
    return narrow(total, widest)


def _part(name: str, r: Tensor, gate: Tensor | None, groups: Groups | None, eps: float) -> Tensor:
    if gate is not None:
        check_vector(f"gates[{name!r}]", gate, r, name)
        r = torch.where(gate != 0, r * wide(gate), 0.0)
    if groups is None:
        return r
    scaled = over_sigma(r - groups.mean(r), groups.std(r) + eps)
    return torch.where(groups.size() > 1, scaled, 0.0)


def cosine(step: float, total: float, start: float = 1.0, end: float = 0.0) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``total``, and ``end`` after it.

    ``end + (start - end) (1 + cos(π step / total)) / 2``; two of them with start and end exchanged
    move the emphasis from one reward to another (Datarus-R1, arXiv 2508.13382).

    Args:
        step: where training is, >= 0.
        total: steps until ``end``, > 0.
        start: value at step 0.
        end: value from step ``total`` on.

    Returns:
        A Python number.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> from reasonkern.shaping import cosine
        >>> cosine(25, 100, start=1.0, end=0.0)
        0.8535533905932737
    """
    for name, value in (("start", start), ("end", end)):
        _checks.check_number(name, value)
    _checks.check_number("step", step, 0.0)
    _checks.check_number("total", total, 0.0, exclusive=True)
    if step >= total:
        return float(end)
    start, end = float(start), float(end)  # NumPy's would sum in their own precision
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2
