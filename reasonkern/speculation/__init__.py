"""Draft tables, draft trees and their lossless verification: see README.md in this folder."""

from __future__ import annotations

from .draft import Draft
from .table import NgramTable
from .tree import DraftTree
from .tune import tune_tree

__all__ = ["Draft", "DraftTree", "NgramTable", "tune_tree"]
