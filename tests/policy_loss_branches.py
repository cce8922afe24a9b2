"""Which branch of its objective each row takes: inputs are hard when every branch is taken."""

from __future__ import annotations

import math

import policy_loss_cases as cases
import torch
from policy_loss_cases import LossArgs
from torch import Tensor

from reasonkern.policy_loss import reference_objective as formulas


def branches(a: LossArgs) -> dict[str, Tensor]:
    """Which rows take which branch of the objective, from float64 and the published conditions."""
    a = a.cast(torch.float64)
    logp = cases.literal_stats(a.logits, a.targets).logprob
    assert a.old_logprob is not None
    difference = logp - a.old_logprob
    n, adv = cases.numbers(a), a.advantage
    r = difference.clamp(-n.log_ratio_clamp, n.log_ratio_clamp).exp()
    taken = {
        "A > 0": adv > 0,
        "A < 0": adv < 0,
        "A = 0 and an extreme ratio": (adv == 0) & (difference > 20),
    }
    for sign, side in (("A > 0", adv > 0), ("A < 0", adv < 0)):
        taken |= {f"{sign}, {name}": side & rows for name, rows in regions(a.kind, r, n).items()}
        if math.isfinite(n.log_ratio_clamp) and a.kind not in (
            formulas.DRO,
            formulas.DPPO_TV,
            formulas.DPPO_KL,
        ):
            taken[f"{sign}, clamp low"] = side & (difference < -n.log_ratio_clamp)
            taken[f"{sign}, clamp high"] = side & (difference > n.log_ratio_clamp)
    if a.kind in (formulas.DPPO_TV, formulas.DPPO_KL):
        taken |= dppo_branches(a, logp, r, n)
    return taken


def regions(kind: int, r: Tensor, n: cases.Numbers) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if kind in (formulas.CLIP, formulas.GPPO, formulas.CISPO):
        out["inside"] = (r > n.ratio_min) & (r < n.ratio_max)
        for name in ("ratio_max", "dual_clip", "ratio_cap"):
            if math.isfinite(getattr(n, name)):
                out[f"above {name}"] = r > getattr(n, name)
        if n.ratio_min > 0:
            out["below ratio_min"] = r < n.ratio_min
        if n.ratio_min == n.ratio_max:
            del out["inside"]
    return out


def dppo_branches(a: LossArgs, logp: Tensor, r: Tensor, n: cases.Numbers) -> dict[str, Tensor]:
    assert a.old_logprob is not None
    moved = logp.exp() - a.old_logprob.exp()
    up, pos, neg = moved > 0, a.advantage > 0, a.advantage < 0
    distance = moved.abs()
    if a.kind == formulas.DPPO_KL:
        distance = cases.bernoulli_kl(a.old_logprob, logp)
    far = distance > torch.where(pos, n.high, n.low)
    between = (distance > n.low) & (distance < n.high)
    return {
        "between the two thresholds, A > 0": between & pos & up,
        "between the two thresholds, A < 0": between & neg & ~up,
        "dropped, A > 0": pos & far & up,
        "dropped, A < 0": neg & far & ~up,
        "far but moving back, A > 0": pos & far & ~up,
        "far but moving back, A < 0": neg & far & up,
        "near, A > 0": pos & ~far,
        "near, A < 0": neg & ~far,
        "ratio truncated and kept": (r > n.ratio_max) & ((pos & ~far) | (neg & up)),
    }


def assert_branches_taken(a: LossArgs) -> None:
    for name, rows in branches(a).items():
        assert (rows & (a.weight != 0)).any(), f"no row takes the branch: {name}"
