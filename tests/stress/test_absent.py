"""Without the compiled library, without Triton, without numpy, without rapidfuzz."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
sys.path[:0] = [{root!r}, {here!r}]
"""
SAVE = """
import torch
torch.set_num_threads(1)
from steps import everything
torch.save(everything(3), sys.argv[1])
"""
COMPARE = """
import reasonkern
from reasonkern import _load
expected, got = torch.load(sys.argv[2]), everything(3)
for a, b in zip(expected, got, strict=True):
    if a.is_floating_point():
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(a, b)
"""


def python(code: str, *args: str, hidden: tuple[str, ...] = (), **environment: str) -> str:
    head = HIDE.format(packages=set(hidden) or {"-"}, root=str(ROOT), here=str(HERE))
    done = subprocess.run(
        [sys.executable, "-c", head + code, *args],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compared(path: Path, hidden: tuple[str, ...], more: str = "", **environment: str) -> str:
    """Steps of every family in a process with everything and in one that lacks something."""
    full, less = str(path / "full.pt"), str(path / "less.pt")
    python(SAVE, full)
    return python(SAVE + COMPARE + more, less, full, hidden=hidden, **environment)


def test_without_the_library(tmp_path: Path) -> None:
    more = "assert not _load.available('cpu')\nprint(_load.format_info())"
    out = compared(tmp_path, (), more, REASONKERN_NO_EXT="1")
    assert "switched off by REASONKERN_NO_EXT=1" in out


def test_without_triton(tmp_path: Path) -> None:
    more = "assert not _load.available('triton')\nprint(_load.format_info())"
    assert "triton is not importable" in compared(tmp_path, ("triton",), more)


def test_without_rapidfuzz(tmp_path: Path) -> None:
    more = """
from reasonkern import scaling
try:
    scaling.text_similarity(["a", "b"])
except ImportError as error:
    print(error)
"""
    assert "reasonkern[scaling]" in compared(tmp_path, ("rapidfuzz",), more)


def test_without_numpy(tmp_path: Path) -> None:
    """A declared dependency; replaying traces, timed trees and text similarity alone need it."""
    more = """
try:
    reasonkern.tune_tree([[1, 2, 3]], 2)
except ImportError as error:
    print("tune_tree:", error)
"""
    out = compared(tmp_path, ("numpy",), more)
    assert "tune_tree: No module named 'numpy'" in out
