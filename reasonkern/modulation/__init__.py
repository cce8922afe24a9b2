"""Control of decoding: what a request does to its logits, as a function of its tokens.

`Modulation` says what, `ModulationState` holds the requests in flight, `modulate_logits_` applies
it to rows of logits (draft rows included), `commit_` advances it by accepted tokens.
"""

from .control import commit_, modulate_logits_
from .sets import TokenSets
from .spec import (
    TIP,
    Ban,
    Budget,
    Constant,
    Cyclic,
    DeepConf,
    EntropyTrigger,
    MinThink,
    Modulation,
    Schedule,
    SoftBudget,
)
from .state import ModulationState

__all__ = [
    "TIP",
    "Ban",
    "Budget",
    "Constant",
    "Cyclic",
    "DeepConf",
    "EntropyTrigger",
    "MinThink",
    "Modulation",
    "ModulationState",
    "Schedule",
    "SoftBudget",
    "TokenSets",
    "commit_",
    "modulate_logits_",
]
