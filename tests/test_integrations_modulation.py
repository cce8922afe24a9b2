"""Control in vLLM and SGLang: what holds of both adapters."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
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
