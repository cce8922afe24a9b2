"""reasonkern: exact, fast kernels for the inner loops of LLM reasoning, as PyTorch operators."""

from ._load import info
from .policy_loss import (
    KL,
    Importance,
    Objective,
    PolicyLossOutput,
    PolicyMetrics,
    RowContext,
    TokenStats,
    policy_loss,
    token_stats,
    token_weights,
)
from .speculation import (
    Draft,
    DraftTree,
    Law,
    LawReport,
    NgramTable,
    Status,
    Verified,
    check_verifier,
    compact_kv_,
    request_seeds,
    sample,
    tune_tree,
    verify_tree,
)

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Draft",
    "DraftTree",
    "Importance",
    "Law",
    "LawReport",
    "NgramTable",
    "Objective",
    "PolicyLossOutput",
    "PolicyMetrics",
    "RowContext",
    "Status",
    "TokenStats",
    "Verified",
    "check_verifier",
    "compact_kv_",
    "info",
    "policy_loss",
    "request_seeds",
    "sample",
    "token_stats",
    "token_weights",
    "tune_tree",
    "verify_tree",
]
