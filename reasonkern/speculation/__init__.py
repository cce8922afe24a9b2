"""Draft tables, draft trees and their lossless verification: see README.md in this folder."""

from __future__ import annotations

from .check import check_verifier
from .draft import Draft
from .laws import Law, LawReport
from .table import NgramTable
from .tree import DraftTree
from .tune import tune_tree
from .verify import Status, Verified, compact_kv_, request_seeds, sample, verify_tree

__all__ = [
    "Draft",
    "DraftTree",
    "Law",
    "LawReport",
    "NgramTable",
    "Status",
    "Verified",
    "check_verifier",
    "compact_kv_",
    "request_seeds",
    "sample",
    "tune_tree",
    "verify_tree",
]
