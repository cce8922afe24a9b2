"""The record of a GPU test run, made here by a toy operator and tensors on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CONFTEST = """
from pathlib import Path

import torch
from gpu_record import GpuRecord, Watch

from reasonkern import _load

def toy(x, wrong=False):
    if wrong:
        raise ValueError("wrong")
    return x

_load.register_op("toy", {"reference": toy, "triton": toy})
_load.register_op("other", {"reference": toy, "triton": toy})

def pytest_configure(config):
    config.pluginmanager.register(GpuRecord(Path("out.json"), False, Watch("cpu")))
"""
RUN = """
import pytest
import torch
from reasonkern import _load

ONE = torch.ones(1)

def call(op, *args, backend="triton"):
    return _load.implementation(op, backend)(*args)

def test_passes(): call("toy", ONE)

def test_refusal_is_no_run():
    with pytest.raises(ValueError): call("toy", ONE, True)

def test_elsewhere():
    call("other", torch.ones(1, device="meta"))
    call("other", ONE, backend="reference")
"""
FAILING = """
def test_fails(): assert call("other", ONE) is None

def test_raises(): call("toy", ONE, True)
"""
LOSING = """
@pytest.fixture
def broken(): raise RuntimeError

def test_errs(broken): call("toy", ONE)
"""


def recorded(folder: Path, text: str) -> dict:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(text)
    root = Path(__file__).parent
    path = f"{root}:{root.parent}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    )
    return json.loads((folder / "out.json").read_text())


def test_passed_tests_vouch_for_what_returned(tmp_path):
    content = recorded(tmp_path, RUN)
    row = {"op": "toy", "backend": "triton", "passed": 1, "failed": 0}
    assert content["tests"] == [row] and content["lost"] == []
    assert content["machine"]["gpu"] is None or content["machine"]["architecture"]


def test_failed_tests_speak_against_what_they_called(tmp_path):
    content = recorded(tmp_path, RUN + FAILING + LOSING)
    assert content["tests"] == [
        {"op": "other", "backend": "triton", "passed": 0, "failed": 1},
        {"op": "toy", "backend": "triton", "passed": 1, "failed": 1},
    ]
    assert content["lost"] == ["test_it.py::test_errs"]
