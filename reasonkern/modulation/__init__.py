"""Control of what is generated, and what a step's logits tell: see README.md in this folder."""

from __future__ import annotations

from .latent import LatentPolicy, SrgenDelta, latent_policy_gradient, srgen_delta
from .signals import completion_probe, entropy_forks

__all__ = [
    "LatentPolicy",
    "SrgenDelta",
    "completion_probe",
    "entropy_forks",
    "latent_policy_gradient",
    "srgen_delta",
]
