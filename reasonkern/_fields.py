"""Docstrings of the fields of the named tuples that users get."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def documented(kind: Kind) -> Kind:
    """Gives each field its text under "Attributes:"; help() says "Alias for field number 0" else.

    The class keeps the whole: help() shows it at its top, the fields some forty lines below.
    """
    # With python -OO there is no docstring.
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
        getattr(kind, name).__doc__ = " ".join(text.split())
    return kind
