"""What the integrations say without their trainer, or with one that changed."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reasonkern.integrations import _peer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("trainer", ["trl", "verl", "openrlhf", "transformers", "vllm", "sglang"])
def test_a_missing_trainer_is_an_import_error_that_says_how_to_get_it(
    trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{trainer}.")]:
        monkeypatch.delitem(sys.modules, name)  # another test has imported it
    monkeypatch.setitem(sys.modules, trainer, None)
    monkeypatch.delitem(sys.modules, f"reasonkern.integrations.{trainer}", raising=False)
    with pytest.raises(
        ImportError, match=rf"needs {trainer} .*pip install 'reasonkern\[{trainer}\]'"
    ):
        importlib.import_module(f"reasonkern.integrations.{trainer}")


def test_a_missing_dependency_of_a_trainer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``pip install --no-deps``: the trainer itself is there."""
    (tmp_path / "halftrainer.py").write_text("import absent_dependency.inner")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="installed, but its dependency absent_dependency is not"):
        _peer.import_peer("halftrainer", "1.0")
    (tmp_path / "oldtrainer.py").write_text("import json.gone")
    with pytest.raises(ImportError, match=r"its dependency json\.gone is not \(after pip"):
        _peer.import_peer("oldtrainer", "1.0")


def test_the_page_names_what_verl_needs_without_its_dependencies() -> None:
    """Those that `make test-all` installs beside it."""
    text = (ROOT / "reasonkern/integrations/README.md").read_text()
    (line,) = re.findall(r"^pip install (codetiming .*)$", text, re.M)
    peers = (ROOT / "pyproject.toml").read_text().partition("\npeers = [")[2].partition("\n]")[0]
    named = set(shlex.split(line))
    assert named == set(re.findall(r'"(.*)"', peers)) & named and len(named) == 5


def test_the_package_imports_no_trainer() -> None:
    code = "import sys, reasonkern, reasonkern.integrations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "reasonkern.integrations" in modules
    trainers = {"trl", "verl", "openrlhf", "megatron", "vllm", "sglang", "transformers", "ray"}
    assert not modules & trainers


def test_a_trainer_without_a_needed_argument_is_refused() -> None:
    def loss(model: object, batch: object) -> None: ...

    _peer.require_arguments("pytest", "1.0", loss, "model", "batch")
    with pytest.raises(ImportError, match=r"to take inputs, mask; it is tested with 1\.0"):
        _peer.require_arguments("pytest", "1.0", loss, "model", "inputs", "mask")


def test_another_version_warns() -> None:
    with pytest.warns(UserWarning, match=r"is tested with pytest 1\.16, not"):
        assert _peer.import_peer("pytest", "1.16") is pytest
