"""Control of decoding: what a request does to its logits, as a function of its tokens.

`Modulation` says what, `ModulationState` holds the requests in flight, `modulate_logits_` applies
it to rows of logits (draft rows included), `sample_controlled` samples under it and describes each
row, `commit_` advances it by accepted tokens.
"""

from .control import commit_, modulate_logits_
from .latent import LatentPolicy, SrgenDelta, latent_policy_gradient, srgen_delta
from .parts import (
    TIP,
    Ban,
    Budget,
    Constant,
    Cyclic,
    DeepConf,
    EntropyTrigger,
    MinThink,
    Schedule,
    SoftBudget,
)
from .sampler import Sampled, sample_controlled
from .sets import TokenSets
from .signals import completion_probe, entropy_forks
from .spec import Modulation
from .state import ModulationState

__all__ = [
    "TIP",
    "Ban",
    "Budget",
    "Constant",
    "Cyclic",
    "DeepConf",
    "EntropyTrigger",
    "LatentPolicy",
    "MinThink",
    "Modulation",
    "ModulationState",
    "Sampled",
    "Schedule",
    "SoftBudget",
    "SrgenDelta",
    "TokenSets",
    "commit_",
    "completion_probe",
    "entropy_forks",
    "latent_policy_gradient",
    "modulate_logits_",
    "sample_controlled",
    "srgen_delta",
]
