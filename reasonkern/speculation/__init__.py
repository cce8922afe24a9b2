"""Draft tables, draft trees and their lossless verification: see README.md in this folder."""

from __future__ import annotations

from .draft import Draft
from .tree import DraftTree
from .verify import Status, Verified, compact_kv_, request_seeds, sample, verify_tree

__all__ = [
    "Draft",
    "DraftTree",
    "Status",
    "Verified",
    "compact_kv_",
    "request_seeds",
    "sample",
    "verify_tree",
]
