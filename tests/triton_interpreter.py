"""Triton's interpreter, made faster: the same operations of the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def patch_once_a_launch() -> None:
    """Replaces what `triton.language` has for kernels at a launch, not at each function they call.

    The interpreter goes through the members of the package at every call of a jitted function,
    finds them replaced, and takes 40 % of its time for that.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton than 3.6 does it another way
        return
    patch, patched = interpreter._patch_lang, set()

    @cache
    def packages(fn: Callable[..., Any]) -> set[int]:
        """The modules that are patched for a function: those it sees."""
        return {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}

    def patch_lang(fn: Callable[..., Any]) -> Any:
        if packages(fn) <= patched:
            return interpreter._LangPatchScope()  # of nothing
        patched.update(packages(fn))
        scope = patch(fn)
        restore = scope.restore

        def restore_all() -> None:
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
