"""For pytest -p: tests of the Triton backend, with TRITON_INTERPRET=0, run what is compiled."""

from __future__ import annotations

import sys

import pytest

from .driver import install

install()


def pytest_sessionstart(session: pytest.Session) -> None:
    backend = sys.modules["conftest"].Backend
    backend.slow = property(lambda self: self.name == "cuda-sim")  # it is not the interpreter
