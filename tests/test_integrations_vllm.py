"""Control in vLLM, by what its model runner does with a processor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_control_cases import END, SETS, SPECS, THINK, V, expected_row
from engine_fixtures import INTERFACES, adapter, some_tokens
from tolerance import randn
from torch import Tensor

import reasonkern as rk
from reasonkern.integrations import _request

pytest_plugins = ("engine_fixtures",)


class Vllm:
    """What the model runner does with a processor: slots, steps of draft rows, preemption."""

    def __init__(self, kind: Any, slots: int, drafts: int, rng: Random) -> None:
        self.rng, self.drafts = rng, drafts
        self.tokens: dict[int, list[int]] = {}  # of each slot in use, prompt included
        self.prompt: dict[int, int] = {}
        self.params: dict[int, Any] = {}
        self.length = 40  # of a text, of which a step with drafts may look beyond the end

        def both(*shape: int) -> Any:
            array = np.zeros(shape, dtype=np.int32)
            return SimpleNamespace(np=array, gpu=torch.from_numpy(array))

        self.buffers = SimpleNamespace(
            device=torch.device("cpu"), max_num_reqs=slots, vocab_size=V,
            all_token_ids=both(slots, self.length), prompt_len=both(slots), prefill_len=both(slots),
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
            tokens = self.tokens[slot] + accepted + some_tokens(self.rng, 1)
            self.tokens[slot] = tokens[: self.length]
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
            full = used and len(engine.tokens[slot]) == engine.length
            if full or (used and rng.random() < 0.05):
                spec, prompt, tokens = specs[slot], engine.prompt[slot], engine.finish(slot)
                if not full and rng.random() < 0.5:  # preempted: comes back with what it had
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
        ({"cyclic": {"amplitude": 1, "period": 0}}, "period: expected .* >= 1e-06"),
        ({"cyclic": 3}, "modulation.cyclic: expected a mapping"),
        ({"wave": {}}, r"modulation: expected arguments of Modulation: cyclic.*got \['wave'\]"),
        ({"ban": {"set": "refect"}}, "modulation.ban.set: expected 'reflect' or 'switch'"),
        (
            {"ban": {}, "think_end": 1, "min_think": {"tokens": 9, "wait": [5]}},
            r"modulation.min_think.wait: expected a first id that ban leaves, got 5",
        ),
        ({"budget": {"tokens": 4, "end": [V]}}, r"modulation.budget.end: .*\[0, 32\), got 32"),
        (
            {"min_think": {"tokens": 9, "wait": [5, V]}, "think_end": END},
            r"modulation.min_think.wait: .*\[0, 32\), got 32",
        ),
        ({"think_end": V}, r"modulation.think_end: expected token ids in \[0, 32\)"),
        ({"deepconf": {"threshold": 1.0}}, "modulation.deepconf: expected None"),
        (
            {"ban": {}, "min_think": {"ignore": 1, "wait": [5]}, "think_end": END},
            r"min_think.wait: expected a first id that ban leaves, got 5",
        ),
        ("{", "modulation: expected JSON"),
        ([1], "modulation: expected a mapping"),
    ]
    for values, message in wrong:
        with pytest.raises(ValueError, match=message):
            params = SimpleNamespace(extra_args={"modulation": values}, temperature=1.0)
            vllm.validate_params(params)


def test_vllm_refuses_ids_beyond_the_models(vllm: Any) -> None:
    large = type("Large", (vllm,), {"vocab_size": V + 1})
    with pytest.raises(ValueError, match="vocab_size: expected at most the model's 32"):
        Vllm(large, 1, 0, Random(0))
