"""The interfaces of vLLM and SGLang that logit control plugs into, recorded or published.

The records are those of vLLM 0.33 (Model Runner V2) and SGLang 0.5: names, arguments and what their
engines promise. Where a package is found, the same tests run over its own class, too; its code is
enough, and beside the environment, where nobody else takes it for an installed one::

    pip install --no-deps --target DIR vllm==0.33.0 sglang==0.5.23
    PYTHONPATH=DIR python -m pytest tests/test_integrations_{modulation,vllm,sglang}.py
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from engine_control_cases import WAIT, V
from torch import Tensor


def some_tokens(rng: Random, count: int) -> list[int]:
    return [rng.choice((rng.randrange(V), 5, 6, WAIT, 8)) for _ in range(count)]


class VllmProcessor(abc.ABC):
    """vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        raise NotImplementedError

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        raise NotImplementedError

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        raise NotImplementedError

    def apply_staged_writes(self) -> None:
        raise NotImplementedError

    @abc.abstractmethod
    def apply(self, logits: Tensor, ctx: Any) -> Tensor: ...


class SglangProcessor(abc.ABC):
    """sglang.srt.sampling.custom_logit_processor.CustomLogitProcessor."""

    @abc.abstractmethod
    def __call__(self, logits: Tensor, custom_param_list: Any = None) -> Tensor: ...


class Interface(NamedTuple):
    """Where an engine has it, and what its modules import that no processor needs."""

    module: str
    name: str
    recorded: type
    version: str
    stubs: dict[str, dict[str, Any]]


INTERFACES = {
    "vllm": Interface(
        "vllm.v1.worker.gpu.sample.logits_processor", "LogitsProcessor", VllmProcessor, "0.33.0",
        {
            "vllm": {"SamplingParams": object},
            "vllm.exceptions": {"VLLMValidationError": ValueError},
            "vllm.logger": {"init_logger": logging.getLogger},
            "vllm.utils.torch_utils": {"guard_cuda_initialization": contextlib.nullcontext},
            "vllm.v1.sample.logits_processor": {"STR_POOLING_REJECTS_LOGITSPROCS": ""},
            "vllm.v1.worker.gpu.buffer_utils": dict.fromkeys(
                ("StagedWriteTensor", "UvaBackedTensor"), object
            ),
            "vllm.v1.worker.gpu.states": {"RequestState": object},
        },
    ),
    "sglang": Interface(
        "sglang.srt.sampling.custom_logit_processor", "CustomLogitProcessor", SglangProcessor,
        "0.5.23", {},
    ),
}  # fmt: skip


def packages(name: str, root: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty packages for the parents of a module, and itself, that find the rest of theirs."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        if (path := ".".join(parts[:n])) not in sys.modules:
            module = ModuleType(path)
            module.__path__ = [] if root is None else [str(root.joinpath(*parts[1:n]))]
            monkeypatch.setitem(sys.modules, path, module)


@contextlib.contextmanager
def adapter(engine: str, source: str) -> Iterator[Any]:
    """The integration over an interface: the recorded one, or the one of the installed package.

    The latter's own modules run; what they import of the rest of the package is left out, so that
    ``pip install --no-deps`` is enough.
    """
    module, name, recorded, version, stubs = INTERFACES[engine]
    found = importlib.util.find_spec(engine)
    if source == "published" and (found is None or not found.submodule_search_locations):
        pytest.skip(f"{engine} is not installed")
    before, known = set(sys.modules), importlib.metadata.version
    ours = f"reasonkern.integrations.{engine}"
    with pytest.MonkeyPatch.context() as patch:
        if source == "recorded":
            packages(module, None, patch)
            setattr(sys.modules[module], name, recorded)
            patch.setattr(
                importlib.metadata, "version", lambda p: version if p == engine else known(p)
            )
        else:
            assert found is not None and found.submodule_search_locations
            root = Path(found.submodule_search_locations[0])
            packages(module.rpartition(".")[0], root, patch)
            for stub, values in stubs.items():
                packages(stub, root, patch)
                vars(sys.modules[stub]).update(values)
        try:
            yield importlib.import_module(ours)
        finally:
            for new in set(sys.modules) - before:
                if new == ours or new.partition(".")[0] == engine:
                    del sys.modules[new]


@pytest.fixture(params=["recorded", "published"])
def source(request: pytest.FixtureRequest) -> str:
    """Which interface the adapters are run over."""
    name: str = request.param
    return name


def processor_class(module: Any) -> Any:
    return getattr(module, "ModulationLogitsProcessor", None) or module.ModulationLogitProcessor
