"""What the integrations say without their trainer, or with one that changed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from reasonkern.integrations import _peer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("trainer", ["trl", "verl", "transformers", "vllm", "sglang"])
def test_a_missing_trainer_is_an_import_error_that_says_how_to_get_it(
    trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, trainer, None)
    monkeypatch.delitem(sys.modules, f"reasonkern.integrations.{trainer}", raising=False)
    with pytest.raises(
        ImportError, match=rf"needs {trainer} .*pip install 'reasonkern\[{trainer}\]'"
    ):
        importlib.import_module(f"reasonkern.integrations.{trainer}")


def test_the_package_imports_no_trainer() -> None:
    code = "import sys, reasonkern, reasonkern.integrations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "reasonkern.integrations" in modules
    assert not modules & {"trl", "verl", "vllm", "sglang", "transformers", "ray"}


def test_a_trainer_without_a_needed_argument_is_refused() -> None:
    def loss(model: object, batch: object) -> None: ...

    _peer.require_arguments("pytest", "1.0", loss, "model", "batch")
    with pytest.raises(ImportError, match=r"to take inputs, mask; it is tested with 1\.0"):
        _peer.require_arguments("pytest", "1.0", loss, "model", "inputs", "mask")


def test_another_version_warns() -> None:
    with pytest.warns(UserWarning, match=r"is tested with pytest 1\.16, not"):
        assert _peer.import_peer("pytest", "1.16") is pytest
