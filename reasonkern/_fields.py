"""Docstrings of the fields of the named tuples that users get."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def documented(kind: Kind) -> Kind:
    """Gives each field its text in the class docstring's "Attributes:", for help() to show.

    Without it help() says "Alias for field number 0". The class keeps the whole docstring, because
    help() shows the fields some forty lines below it.
    """
    # With python -OO there is no docstring.
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
        getattr(kind, name).__doc__ = " ".join(text.split())
    return kind
