"""Control in vLLM and SGLang: what holds of both adapters."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_control_cases import SETS, SPECS
from engine_fixtures import INTERFACES, adapter, processor_class

import reasonkern as rk
from reasonkern.integrations import _request

pytest_plugins = ("engine_fixtures",)


@pytest.mark.parametrize("engine", INTERFACES)
def test_the_adapters_override_what_the_engine_calls(engine: str, source: str) -> None:
    """With the arguments of the record; the record has those of the published interface."""
    interface = INTERFACES[engine]
    with adapter(engine, source) as module:
        ours = processor_class(module)
        published = getattr(sys.modules[interface.module], interface.name)
        assert not inspect.isabstract(ours) and issubclass(ours, published)
        for name, value in vars(interface.recorded).items():
            if inspect.isfunction(value) or isinstance(value, classmethod):
                kinds = (interface.recorded, published, ours)
                names = {tuple(inspect.signature(getattr(k, name)).parameters) for k in kinds}
                assert len(names) == 1 and name in vars(ours)


@pytest.mark.parametrize("engine", INTERFACES)
def test_a_class_says_which_tokens_it_controls(engine: str) -> None:
    with adapter(engine, "recorded") as module:
        base = processor_class(module)
        with pytest.raises(ValueError, match="vocab_size: expected a subclass .* 0, got None"):
            _request.controlled_tokens(base)
        mapping = type("Mapping", (base,), {"sets": dict(SETS), "vocab_size": 10})
        with pytest.raises(ValueError, match="sets: expected a TokenSets or None, got dict"):
            _request.controlled_tokens(mapping)
        without = type("Without", (base,), {"vocab_size": 10})
        assert _request.controlled_tokens(without) == (rk.TokenSets.from_ids({}), 10)
        small = type("Small", (base,), {"sets": SETS, "vocab_size": 9})
        with pytest.raises(ValueError, match="vocab_size: expected .* above 9, got 9"):
            _request.controlled_tokens(small)


@pytest.mark.parametrize("spec", SPECS)
def test_a_modulation_survives_the_wire(spec: rk.Modulation) -> None:
    sent = json.loads(json.dumps(_request.request_parameters(spec)))
    assert _request.modulation_of(sent) == spec
    assert _request.modulation_of({"modulation": spec and json.loads(sent["modulation"])}) == spec


def test_numbers_of_numpy_survive_the_wire() -> None:
    plain = rk.Modulation(cyclic=rk.Cyclic(5.0, 1200), budget=rk.Budget(5, [3]), think_end=3)
    one = rk.Modulation(
        cyclic=rk.Cyclic(np.float32(5.0), np.int64(1200)), think_end=np.int64(3),
        budget=rk.Budget(np.int64(5), np.array([3])),
    )  # fmt: skip
    assert _request.modulation_of(_request.request_parameters(one)) == plain
    records = []
    for spec in (plain, one):
        state = rk.ModulationState(1, SETS)
        state.add(0, spec, np.array([3, 1]))
        records.append(state.tensors.records)
    assert torch.equal(*records)


def test_what_no_engine_serves_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match="spec: expected a Modulation, got dict"):
        _request.request_parameters({"cyclic": {"amplitude": 5, "period": 1200}})
    with pytest.raises(ValueError, match=r"modulation\.deepconf: expected None"):
        _request.request_parameters(rk.Modulation(deepconf=rk.DeepConf(1.0)))


@pytest.mark.parametrize("engine", INTERFACES)
def test_the_pages_class(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer stands in for transformers'."""
    pieces = {"wait": 0, "Wait": 1, "but": 2, "But": 3, "</think>": 151_668}

    class Tokenizer(dict[str, int]):
        get_vocab = dict.copy
        from_pretrained = classmethod(lambda cls, name: cls(pieces))

        def __len__(self) -> int:
            return 151_669

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=Tokenizer))
    page = (Path(_request.__file__).parent / "README.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if f".{engine} " in c)
    with adapter(engine, "recorded") as module:
        monkeypatch.setattr(processor_class(module), "to_str", lambda: "", raising=False)
        here: dict[str, Any] = {}
        exec(code, here)
        sets, vocab_size = _request.controlled_tokens(here["Control"])
        assert sets["reflect"] == (0, 1, 2, 3) and vocab_size == 151_669
        if engine == "sglang":
            assert _request.modulation_of(here["body"]["custom_params"]) == here["spec"]


def test_the_page_writes_requests_by_hand() -> None:
    page = (Path(_request.__file__).parent / "README.md").read_text()
    wave, budget = map(ast.literal_eval, re.findall(r'^\{"modulation".*$', page, re.M))
    assert _request.modulation_of(wave) == rk.Modulation(
        cyclic=rk.Cyclic(5, 1200), think_end=151668
    )
    assert _request.modulation_of(budget) == rk.Modulation(
        budget=rk.Budget(4096, [198, 151668]), think_end=151668
    )
