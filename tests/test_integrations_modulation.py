"""Control in vLLM and SGLang, against their recorded interfaces.

The records are those of vLLM 0.33 (Model Runner V2) and SGLang 0.5: names, arguments and what their
engines promise. Where a package is found, the same tests run over its own class, too; its code is
enough, and beside the environment, where nobody else takes it for an installed one::

    pip install --no-deps --target DIR vllm==0.33.0 sglang==0.5.23
    PYTHONPATH=DIR python -m pytest tests/test_integrations_modulation.py
"""

from __future__ import annotations

import abc
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine_control_cases import END, SETS, SPECS, THINK, WAIT, V, expected_row
from tolerance import randn
from torch import Tensor

import reasonkern as rk
from reasonkern.integrations import _request


def some_tokens(rng: Random, count: int) -> list[int]:
    return [rng.choice((rng.randrange(V), 5, 6, WAIT, 8)) for _ in range(count)]


# ---- vLLM


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


class Vllm:
    """What the model runner does with a processor: slots, steps of draft rows, preemption."""

    def __init__(self, kind: Any, slots: int, drafts: int, rng: Random) -> None:
        self.rng, self.drafts = rng, drafts
        self.tokens: dict[int, list[int]] = {}  # of each slot in use, prompt included
        self.prompt: dict[int, int] = {}
        self.params: dict[int, Any] = {}
        length = 200

        def both(*shape: int) -> Any:
            array = np.zeros(shape, dtype=np.int32)
            return SimpleNamespace(np=array, gpu=torch.from_numpy(array))

        self.buffers = SimpleNamespace(
            device=torch.device("cpu"), max_num_reqs=slots, vocab_size=V,
            all_token_ids=both(slots, length), prompt_len=both(slots), prefill_len=both(slots),
            total_len=both(slots),
        )  # fmt: skip
        speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
        self.config = SimpleNamespace(speculative_config=speculative)
        self.processor = kind(self.config, self.buffers)

    def add(self, slot: int, params: Any, prompt: list[int], generated: list[int]) -> bool:
        self.tokens[slot], self.prompt[slot] = prompt + generated, len(prompt)
        self.params[slot] = params
        self._write(slot)
        self.buffers.prompt_len.np[slot] = len(prompt)
        self.buffers.prefill_len.np[slot] = len(prompt) + len(generated)
        wanted: bool = self.processor.add_request(slot, params)
        return wanted

    def _write(self, slot: int) -> None:
        tokens = self.tokens[slot]
        self.buffers.all_token_ids.np[slot, : len(tokens)] = tokens
        self.buffers.all_token_ids.np[slot, len(tokens) :] = V - 1  # left from another request
        self.buffers.total_len.np[slot] = len(tokens)

    def step(self) -> list[tuple[int, list[int], Tensor, Tensor]]:
        """(slot, tokens before the row, logits, what apply made of them) of every row."""
        self.processor.apply_staged_writes()
        slots = [s for s in self.tokens if self.rng.random() < 0.8]
        self.rng.shuffle(slots)
        drafts = [some_tokens(self.rng, self.rng.randint(0, self.drafts)) for _ in slots]
        rows = [(s, j, d) for s, d in zip(slots, drafts, strict=True) for j in range(len(d) + 1)]
        before = [self.tokens[s] + d[:j] for s, j, d in rows]

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        ctx = SimpleNamespace(
            expanded_idx_mapping=column([s for s, _, _ in rows]),
            idx_mapping=column(slots),
            idx_mapping_np=np.array(slots, dtype=np.int32),
            expanded_local_pos=column([j for _, j, _ in rows]),
            input_ids=column([tokens[-1] for tokens in before]),
            pos=torch.tensor([len(tokens) - 1 for tokens in before], dtype=torch.int64),
        )
        logits = randn(len(rows), V, seed=self.rng.randrange(10**6)).float()
        out = self.processor.apply(logits.clone(), ctx)
        found = [(r[0], b, x, y) for r, b, x, y in zip(rows, before, logits, out, strict=True)]
        for slot, draft in zip(slots, drafts, strict=True):
            accepted = draft[: self.rng.randint(0, len(draft))]
            self.tokens[slot] = self.tokens[slot] + accepted + some_tokens(self.rng, 1)
            self._write(slot)
        return found

    def finish(self, slot: int) -> list[int]:
        del self.prompt[slot], self.params[slot]
        return self.tokens.pop(slot)


def vllm_params(spec: rk.Modulation | None, temperature: float = 0.6) -> Any:
    extra = None if spec is None else _request.request_parameters(spec)
    return SimpleNamespace(extra_args=extra, temperature=temperature)


@pytest.fixture
def vllm(source: str) -> Iterator[Any]:
    with adapter("vllm", source) as module:

        class Control(module.ModulationLogitsProcessor):
            sets = SETS
            vocab_size = V

        yield Control


def test_vllm_loads_a_class_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the published loader, which also makes the request's state."""
    with adapter("vllm", "published") as module:
        theirs = sys.modules[INTERFACES["vllm"].module]
        control = ModuleType("my_control")
        control.Control = type(
            "Control", (module.ModulationLogitsProcessor,), {"sets": SETS, "vocab_size": V}
        )
        monkeypatch.setitem(sys.modules, "my_control", control)
        engine = Vllm(control.Control, 3, 2, Random(0))
        (found,) = theirs.build_custom_logits_processors(
            engine.config, engine.buffers, False, ["my_control:Control"]
        )
        assert type(found) is control.Control
        assert found.requests.max_num_reqs == 3
        validate = theirs.build_custom_logits_processors_params_validator(["my_control:Control"])
        validate(vllm_params(SPECS[0]))
        with pytest.raises(ValueError, match=r"modulation\.think_end"):
            validate(vllm_params(rk.Modulation(think_end=V)))


@pytest.mark.parametrize("drafts", [0, 3])
def test_vllm_rows_equal_a_request_on_its_own(vllm: Any, drafts: int) -> None:
    """Steps of 5 slots: reordered rows, rejected drafts, reuse, preemption, no control."""
    rng = Random(drafts)
    engine = Vllm(vllm, 5, drafts, rng)
    specs: dict[int, rk.Modulation | None] = {}
    changed = forced = 0
    for step in range(80 if drafts == 0 else 50):
        for slot in range(5):
            used = slot in engine.tokens
            if used and rng.random() < 0.05:
                spec, prompt, tokens = specs[slot], engine.prompt[slot], engine.finish(slot)
                if rng.random() < 0.5:  # preempted: comes back with what it had generated
                    engine.add(slot, vllm_params(spec), tokens[:prompt], tokens[prompt:])
            elif not used and (step == 0 or rng.random() < 0.5):
                spec = specs[slot] = rng.choice((*SPECS, SPECS[1], None))
                prompt = rng.choice(([THINK], [11, END, THINK, 12], [11]))
                assert engine.add(slot, vllm_params(spec), prompt, []) == (spec is not None)
        for slot, tokens, logits, out in engine.step():
            n = engine.prompt[slot]
            expected = expected_row(logits, specs[slot], tokens[:n], tokens[n:], 0.6)
            assert torch.equal(out, expected), (step, slot, specs[slot], tokens)
            changed += not torch.equal(out, logits)
            forced += int((out == 3e4).any())
    assert changed > 50 and forced > 5


def test_vllm_leaves_a_batch_without_control_alone(vllm: Any) -> None:
    engine = Vllm(vllm, 2, 0, Random(0))
    assert not engine.add(0, vllm_params(None), [11], [])
    engine.processor.state = None  # not touched
    for _, _, logits, out in engine.step():
        assert torch.equal(out, logits)


def test_vllm_refuses_at_admission_what_a_step_would_trip_over(vllm: Any) -> None:
    vllm.validate_params(vllm_params(None))
    for spec in SPECS:
        vllm.validate_params(vllm_params(spec))
    wrong: list[tuple[Any, str]] = [
        ({"cyclic": {"period": 5}}, "modulation.cyclic: .*missing .*amplitude"),
        ({"cyclic": {"amplitude": 1, "period": 0}}, "period: expected .* > 0"),
        ({"cyclic": 3}, "modulation.cyclic: expected a mapping"),
        ({"wave": {}}, r"modulation: expected arguments of Modulation: cyclic.*got \['wave'\]"),
        ({"ban": {"set": "refect"}}, "modulation.ban.set: expected 'reflect' or 'switch'"),
        ({"budget": {"tokens": 4, "end": [V]}}, r"modulation.budget.end: .*\[0, 32\), got 32"),
        ({"think_end": V}, r"modulation.think_end: expected token ids in \[0, 32\)"),
        ({"deepconf": {"threshold": 1.0}}, "modulation.deepconf: expected None"),
        ("{", "modulation: expected JSON"),
        ([1], "modulation: expected a mapping"),
    ]
    for values, message in wrong:
        with pytest.raises(ValueError, match=message):
            params = SimpleNamespace(extra_args={"modulation": values}, temperature=1.0)
            vllm.validate_params(params)


@pytest.mark.parametrize("engine", INTERFACES)
def test_a_class_says_which_tokens_it_controls(engine: str) -> None:
    with adapter(engine, "recorded") as module:
        base = processor_class(module)
        with pytest.raises(ValueError, match="sets: expected a subclass that sets it to TokenSets"):
            _request.controlled_tokens(base)
        small = type("Small", (base,), {"sets": SETS, "vocab_size": 9})
        with pytest.raises(ValueError, match="vocab_size: expected .* above 9, got 9"):
            _request.controlled_tokens(small)
        if engine == "vllm":
            large = type("Large", (base,), {"sets": SETS, "vocab_size": V + 1})
            with pytest.raises(ValueError, match="vocab_size: expected at most the model's 32"):
                Vllm(large, 1, 0, Random(0))


@pytest.mark.parametrize("spec", SPECS)
def test_a_modulation_survives_the_wire(spec: rk.Modulation) -> None:
    sent = json.loads(json.dumps(_request.request_parameters(spec)))
    assert _request.modulation_of(sent) == spec
    assert _request.modulation_of({"modulation": spec and json.loads(sent["modulation"])}) == spec


# ---- SGLang


class Request:
    """sglang.srt.managers.schedule_batch.Req, as a processor sees it."""

    def __init__(self, prompt: list[int], spec: rk.Modulation | None, temperature: float) -> None:
        self.origin_input_ids, self.output_ids = prompt, []
        greedy = temperature == 0
        self.sampling_params = SimpleNamespace(
            temperature=1.0 if greedy else temperature, top_k=1 if greedy else 1 << 30
        )
        self.spec, self.temperature = spec, temperature
        self.parameters: Any = {} if spec is None else dict(_request.request_parameters(spec))
        self.parameters["__req__"] = self


@pytest.fixture
def sglang(source: str) -> Iterator[Any]:
    with adapter("sglang", source) as module:

        class Control(module.ModulationLogitProcessor):
            sets = SETS
            vocab_size = V
            max_requests = 20

        yield Control


def test_sglang_rows_equal_a_request_on_its_own(sglang: Any) -> None:
    """60 steps, a new instance each: requests come, are left out of a step, go, and are freed."""
    rng = Random(1)
    requests: list[Request] = []
    changed = total = 0
    for step in range(60):
        requests = [r for r in requests if rng.random() > 0.06]
        if step % 20 == 19:
            gc.collect()
        while len(requests) < 5:
            spec = rng.choice((*SPECS, None))
            prompt = rng.choice(([THINK], [11, END, THINK, 12], [11]))
            requests.append(Request(prompt, spec, rng.choice((0.0, 0.6))))
        batch = [r for r in requests if rng.random() < 0.8]
        rng.shuffle(batch)
        logits = randn(len(batch), V, seed=step).float()
        out = sglang()(logits.clone(), [r.parameters for r in batch])
        for r, row, found in zip(batch, logits, out, strict=True):
            history = r.origin_input_ids, r.output_ids
            expected = expected_row(row, r.spec, *history, r.temperature)
            assert torch.equal(found, expected), (step, r.spec, r.output_ids)
            changed += not torch.equal(found, row)
            r.output_ids += some_tokens(rng, 1)
        total += len(batch)
    assert total > changed > 50
    del r, batch, requests
    gc.collect()
    sglang()(logits[:0], [])
    (rows,) = sys.modules[sglang.__mro__[1].__module__]._Rows._all.values()
    assert sorted(rows.free) == list(range(20))


def test_sglang_refuses_what_it_cannot_control(sglang: Any) -> None:
    one = Request([THINK], SPECS[0], 0.6)
    with pytest.raises(ValueError, match="one row per request: .* got 2 rows of 1 requests"):
        sglang()(torch.zeros(2, V), [one.parameters, one.parameters])
    with pytest.raises(ValueError, match="one row per request"):
        sglang()(torch.zeros(2, V), [one.parameters])
    alone = {k: v for k, v in one.parameters.items() if k != "__req__"}
    with pytest.raises(ValueError, match="custom_params: expected SGLang's request"):
        sglang()(torch.zeros(1, V), [alone])
    many = [Request([THINK], SPECS[0], 0.6) for _ in range(21)]
    with pytest.raises(ValueError, match="max_requests: expected more .*, got 20"):
        sglang()(torch.zeros(21, V), [r.parameters for r in many])


def test_sglang_leaves_requests_without_control_alone(sglang: Any) -> None:
    logits = randn(3, V, seed=1)
    for given in ([None, {}, {"__req__": object()}], [{}] * 3):
        assert torch.equal(sglang()(logits.clone(), given), logits)
    assert sglang()(logits[:0], None).shape == (0, V)


def test_sglang_sends_classes(source: str) -> None:
    """By dill: the base by name, a subclass of a script by value, with its sets."""
    dill = pytest.importorskip("dill")
    with adapter("sglang", source) as module:
        control = type(
            "Control", (module.ModulationLogitProcessor,),
            {"sets": SETS, "vocab_size": V, "__module__": "__main__"},
        )  # fmt: skip
        if source == "published":
            found = type(control.from_str(control.to_str()))
        else:
            found = dill.loads(dill.dumps(control))
        assert found is not control and found.sets == SETS and found.vocab_size == V
        assert found.__bases__ == (module.ModulationLogitProcessor,)
        one = Request([THINK], SPECS[3], 0.6)
        out = found()(torch.zeros(1, V), [one.parameters])
        assert torch.equal(out[0], expected_row(torch.zeros(V), SPECS[3], [THINK], [], 0.6))
