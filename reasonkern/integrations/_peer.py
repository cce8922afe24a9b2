"""Importing a trainer that may not be installed, or may have changed since it was last tested."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from typing import Any


def import_peer(module: str, tested: str) -> Any:
    """A module of a trainer; ImportError says how to install it, or which dependency it lacks.

    Another version than ``tested`` (a prefix such as "1.16") warns; what the integration relies on
    is checked by `require_arguments`.
    """
    package = module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        needs = f"reasonkern.integrations.{package} needs {package} {tested}"
        absent = error.name or ""
        if isinstance(error, ModuleNotFoundError) and absent.partition(".")[0] not in ("", package):
            raise ImportError(
                f"{needs}, which is installed, but its dependency {absent} is not (after pip "
                "install --no-deps: reasonkern's README.md names those of verl)"
            ) from error
        raise ImportError(
            f"{needs}: pip install 'reasonkern[{package}]' (importing {module}: {error})"
        ) from error
    version = importlib.metadata.version(package)
    if version != tested and not version.startswith(f"{tested}."):
        warnings.warn(
            f"reasonkern.integrations.{package} is tested with {package} {tested}, not {version}",
            stacklevel=3,
        )
    return found


def require_arguments(package: str, tested: str, function: Callable[..., Any], *names: str) -> None:
    """ImportError where a function of the trainer lost an argument that the integration uses."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        version = importlib.metadata.version(package)
        raise ImportError(
            f"reasonkern.integrations.{package} does not fit {package} {version}: expected "
            f"{function.__qualname__} to take {', '.join(missing)}; it is tested with {tested}"
        )
