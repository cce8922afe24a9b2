"""Fixtures of the tests against TRL: the modules, and a model in a folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trl_cases import make_trainer

Make = Callable[..., Any]  # from a class of trainers and options


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl==1.16.0")


@pytest.fixture(scope="module")
def ours(trl: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.trl")


@pytest.fixture(scope="module")
def example(ours: ModuleType) -> ModuleType:
    return importlib.import_module("examples.trl_grpo")


@pytest.fixture(scope="module")
def model_folder(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TRL loads the reference model from where the model came from."""
    folder = tmp_path_factory.mktemp("model")
    model = example.make_model(initializer_range=0.3)  # logits that are not all alike
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(example: ModuleType, model_folder: Path, tmp_path: Path) -> Make:
    """Trainers of one kind of model and data."""
    return lambda kind, **options: make_trainer(kind, example, model_folder, tmp_path, **options)
