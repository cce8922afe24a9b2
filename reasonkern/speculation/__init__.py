"""Draft tables, draft trees and their lossless verification: see README.md in this folder."""

from __future__ import annotations

from .draft import Draft
from .tree import DraftTree

__all__ = ["Draft", "DraftTree"]
