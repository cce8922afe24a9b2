"""Control in SGLang, by what its sampler does with a processor."""

from __future__ import annotations

import gc
import sys
import weakref
from array import array
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_control_cases import END, SETS, SPECS, THINK, V, expected_row
from engine_fixtures import adapter, some_tokens
from tolerance import randn

import reasonkern as rk
from reasonkern.integrations import _request

pytest_plugins = ("engine_fixtures",)


class Request:
    """sglang.srt.managers.schedule_batch.Req, as a processor sees it."""

    def __init__(
        self, prompt: list[int], spec: rk.Modulation | None, temperature: float, weak: bool = True
    ) -> None:
        self.origin_input_ids, self.output_ids = array("q", prompt), array("q")
        greedy = temperature == 0
        self.sampling_params = SimpleNamespace(
            temperature=1.0 if greedy else temperature, top_k=1 if greedy else 1 << 30
        )
        self.spec, self.temperature = spec, temperature
        self.parameters: Any = {} if spec is None else dict(_request.request_parameters(spec))
        self.parameters["__req__"] = weakref.proxy(self) if weak else self  # 0.5.23, and before


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
            requests.append(Request(prompt, spec, rng.choice((0.0, 0.6)), rng.random() < 0.5))
        batch = [r for r in requests if rng.random() < 0.8]
        rng.shuffle(batch)
        logits = randn(len(batch), V, seed=step).float()
        out = sglang()(logits.clone(), [r.parameters for r in batch])
        for r, row, found in zip(batch, logits, out, strict=True):
            history = list(r.origin_input_ids), list(r.output_ids)
            expected = expected_row(row, r.spec, *history, r.temperature)
            assert torch.equal(found, expected), (step, r.spec, r.output_ids)
            changed += not torch.equal(found, row)
            r.output_ids.extend(some_tokens(rng, 1))
        total += len(batch)
    assert total > changed > 50
    kept = sys.modules[sglang.__mro__[1].__module__]._Rows._all
    (rows,) = kept.values()
    del r, batch, requests
    gc.collect()
    rows.advance([], [])
    assert sorted(rows.free) == list(range(20))
    del rows
    gc.collect()
    assert not list(kept.values())  # megabytes for every class that clients have sent


def test_sglang_begins_anew_where_the_text_was_thrown_away(sglang: Any) -> None:
    """As SGLang does where it retracts a request of embeddings: `output_ids` are empty again."""
    one = Request([THINK], SPECS[1], 0.6)
    row = torch.zeros(1, V)
    for tokens in ([9] * 3, [9] * 4, [], [11], [6, 9]):
        one.output_ids = array("q", tokens)
        out = sglang()(row.clone(), [one.parameters])
        assert torch.equal(out[0], expected_row(row[0], SPECS[1], [THINK], tokens, 0.6)), tokens


def test_sglang_prompts_may_hold_images(sglang: Any) -> None:
    """Which SGLang writes as hashes of 62 bits."""
    one = Request([11, 10**18, THINK, 10**18, 12], SPECS[1], 0.6)
    row = torch.zeros(1, V)
    out = sglang()(row.clone(), [one.parameters])
    assert torch.equal(out[0], expected_row(row[0], SPECS[1], [THINK, 12, 12], [], 0.6))
    assert not torch.equal(out, row)


def test_sglang_refuses_what_it_cannot_control(sglang: Any) -> None:
    one = Request([THINK], SPECS[0], 0.6)
    with pytest.raises(ValueError, match="one row per request: .* got 2 rows of 1 requests"):
        sglang()(torch.zeros(2, V), [one.parameters, one.parameters])
    with pytest.raises(ValueError, match="one row per request"):
        sglang()(torch.zeros(2, V), [one.parameters])
    alone = {k: v for k, v in one.parameters.items() if k != "__req__"}
    with pytest.raises(ValueError, match="custom_params: expected SGLang's request"):
        sglang()(torch.zeros(1, V), [alone])
    wrong = Request([-5], SPECS[0], 0.6)  # no id: the slot it would have had stays free
    for _ in range(2):
        with pytest.raises(ValueError, match="prompt_tokens"):
            sglang()(torch.zeros(1, V), [wrong.parameters])
    del wrong
    gc.collect()
    sglang()(torch.zeros(1, V), [one.parameters])  # a step of others
    many = [Request([THINK], SPECS[0], 0.6) for _ in range(21)]
    with pytest.raises(ValueError, match="max_requests: expected more .*, got 20"):
        sglang()(torch.zeros(21, V), [r.parameters for r in many])


def test_sglang_clients_check_what_they_send(sglang: Any) -> None:
    assert sglang.parameters(SPECS[0]) == _request.request_parameters(SPECS[0])
    for spec, message in (
        (rk.Modulation(ban=rk.Ban("words")), r"modulation\.ban\.set: expected "),
        (rk.Modulation(think_end=V), rf"modulation\.think_end: expected token ids in \[0, {V}\)"),
        (rk.Modulation(deepconf=rk.DeepConf(1.0)), r"modulation\.deepconf: expected None"),
        (
            rk.Modulation(ban=rk.Ban(), min_think=rk.MinThink(1, wait=[5]), think_end=END),
            "min_think.wait: expected a first id that ban leaves",
        ),
        ({}, "spec: expected a Modulation, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            sglang.parameters(spec)


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
