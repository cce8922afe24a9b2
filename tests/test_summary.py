"""The summary that `make test-all` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("i", range(3))
def test_skips(i): pytest.skip("needs a thing")

def test_fails(): assert False

@pytest.fixture
def broken(): raise RuntimeError

def test_errs(broken): pass

@pytest.mark.xfail
def test_xfails(): assert False
"""


@pytest.mark.parametrize("processes", [[], ["-p", "xdist", "-n", "2"]], ids=["one", "workers"])
def test_summary(tmp_path: Path, processes: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nfrom summary import Summary\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(Summary(Path('out.md')))\n"
    )
    (tmp_path / "test_it.py").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *processes],
        cwd=tmp_path, capture_output=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    text = (tmp_path / "out.md").read_text()
    assert ": 1 passed, 2 failed, 4 skipped in" in text and "(exit status 1)" in text
    assert "| test_it.py | 1 | 2 | 4 |" in text
    assert "* 3 × needs a thing" in text and "* 1 × expected to fail" in text
    assert "test_it.py::test_passes" in text
    assert "torch 2." in text and "Python 3." in text
