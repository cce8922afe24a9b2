"""reasonkern: exact, fast kernels for the inner loops of LLM reasoning, as PyTorch operators."""

from . import scaling, shaping
from ._load import info
from .policy_loss import (
    KL,
    Importance,
    Objective,
    Parallel,
    PolicyLossOutput,
    PolicyMetrics,
    RowContext,
    TokenStats,
    bapo_bounds,
    conflict_token_weights,
    covariance_mask,
    entropy_filter,
    high_entropy_mask,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    token_stats,
    token_weights,
)
from .speculation import Draft, DraftTree, NgramTable, tune_tree

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Draft",
    "DraftTree",
    "Importance",
    "NgramTable",
    "Objective",
    "Parallel",
    "PolicyLossOutput",
    "PolicyMetrics",
    "RowContext",
    "TokenStats",
    "bapo_bounds",
    "conflict_token_weights",
    "covariance_mask",
    "entropy_filter",
    "high_entropy_mask",
    "info",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "scaling",
    "shaping",
    "token_stats",
    "token_weights",
    "tune_tree",
]
