"""`ModulationLogitsProcessor` in transformers' own generate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_control_cases import END, SETS, SPECS, THINK, V, expected_row
from torch import Tensor

import reasonkern as rk


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.5, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def processor(*args: Any, **named: Any) -> Any:
    from reasonkern.integrations.transformers import ModulationLogitsProcessor

    return ModulationLogitsProcessor(*args, **named)


PROMPTS = torch.tensor([[0, 0, 11, THINK], [12, 13, 14, THINK], [15, END, THINK, 16]])
KEEP = {
    "attention_mask": (PROMPTS > 0).long(),
    "max_new_tokens": 40,
    "return_dict_in_generate": True,
}


@pytest.mark.peers
def test_transformers_equals_a_literal_cyclic_reflex(model: Any) -> None:
    """Greedy: the wave added to five ids, until the end of thinking."""
    prompt = PROMPTS[1:2]
    spec = rk.Modulation(cyclic=rk.Cyclic(6.0, 16), think_end=END)
    out = model.generate(
        prompt, logits_processor=[processor(spec, SETS)], max_new_tokens=60, do_sample=False
    )
    ids, plain = prompt, []
    for t in range(60):
        with torch.no_grad():
            z = model(ids).logits[0, -1].float()
        plain.append(int(z.argmax()))
        if END not in ids[0, 4:]:
            u = (t % 16) / 16
            delta = 24 * u if u <= 0.25 else 12 - 24 * u if u <= 0.75 else 24 * u - 24
            z[[5, 6, 7]] += delta
        ids = torch.cat((ids, z.argmax().view(1, 1)), 1)
    assert out.tolist() == ids.tolist()
    assert plain != ids[0, 4:].tolist()


@pytest.mark.peers
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam", "assisted"])
def test_transformers_strategies_equal_a_processor_without_memory(
    model: Any, strategy: str
) -> None:
    """One that folds every history anew."""
    import transformers

    specs = [SPECS[0], SPECS[1], SPECS[2]]
    settings: dict[str, Any] = {"do_sample": strategy == "sample"}
    prompt, keep = PROMPTS, KEEP
    if strategy == "beam":
        settings["num_beams"] = 2
        specs = [s for s in specs for _ in range(2)]
    if strategy == "assisted":
        prompt, specs = PROMPTS[1:2], [SPECS[1]]
        keep = KEEP | {"attention_mask": KEEP["attention_mask"][1:2]}
        settings["prompt_lookup_num_tokens"] = 3
    temperature = 0.8 if strategy == "sample" else 0.0
    if strategy == "sample":
        settings["temperature"] = temperature

    class Anew(transformers.LogitsProcessor):  # type: ignore[misc]
        calls = 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            rows = [
                expected_row(row, spec, tokens[:4], tokens[4:], temperature)
                for row, spec, tokens in zip(scores, specs, ids.tolist(), strict=True)
            ]
            return torch.stack(rows)

    found = []
    for control in (processor(specs, SETS, temperature=temperature), Anew()):
        torch.manual_seed(5)
        found.append(model.generate(prompt, logits_processor=[control], **keep, **settings))
    assert found[0].sequences.tolist() == found[1].sequences.tolist()
    plain = model.generate(prompt, **keep, **settings)
    assert plain.sequences.tolist() != found[0].sequences.tolist()
    if strategy in ("greedy", "sample"):
        second = found[0].sequences[1, 4:].tolist()
        assert [4, END] in [second[t : t + 2] for t in range(5, 9)]  # the budget's phrase


@pytest.mark.peers
def test_sequences_may_change_places_in_their_buffer() -> None:
    """As beams do; what was folded is compared with a copy."""
    spec, logits = rk.Modulation(tip=rk.TIP(3.0, 2, "switch")), torch.zeros(2, V)
    control, ids = processor(spec, SETS), torch.full((2, 9), 11)
    for length in range(1, 9):
        out = control(ids[:, :length], logits)
        for row, tokens in zip(out, ids[:, :length].tolist(), strict=True):
            assert torch.equal(row, expected_row(logits[0], spec, tokens[:1], tokens[1:], 1.0))
        ids[1, length] = 9 if length % 3 == 1 else 12
        ids[:] = ids.flip(0)


@pytest.mark.peers
def test_transformers_without_sets(model: Any) -> None:
    """A budget alone, as beside sets that it does not name."""
    spec = rk.Modulation(budget=rk.Budget(5, [4, END]), think_end=END)
    options = {"max_new_tokens": 12, "do_sample": False}
    bare, beside = (
        model.generate(PROMPTS[1:2], logits_processor=[processor(spec, *sets)], **options).tolist()
        for sets in ((), (SETS,))
    )
    assert bare == beside and bare[0][9:11] == [4, END]
    with pytest.raises(ValueError, match=r"ban\.set: expected a TokenSets that has it"):
        processor(rk.Modulation(ban=rk.Ban()))  # not only in generate


@pytest.mark.peers
def test_transformers_keeps_raw_logits_and_refuses_a_second_use(model: Any) -> None:
    spec = rk.Modulation(ban=rk.Ban())
    control = processor(spec, SETS)
    out = model.generate(
        PROMPTS, logits_processor=[control], output_logits=True, output_scores=True,
        do_sample=False, **KEEP,
    )  # fmt: skip
    raw, scores = torch.stack(out.logits), torch.stack(out.scores)
    assert raw[..., [5, 6, 7]].isfinite().all() and (scores[..., [5, 6, 7]] == -torch.inf).all()
    assert not {5, 6, 7} & set(out.sequences[:, 4:].flatten().tolist())
    chat = torch.cat((out.sequences, PROMPTS[:, :2]), 1)
    others = (PROMPTS, PROMPTS[:, 1:], PROMPTS.flip(1), PROMPTS[:2], chat, chat[:, :20], chat[:1])
    for other in others:
        with pytest.raises(ValueError, match="input_ids: expected .*, a processor per generate"):
            model.generate(other, logits_processor=[control], max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids: expected the 5 of the prompt, got 4"):
        late = processor(spec, SETS, prompt_length=5)
        model.generate(PROMPTS, logits_processor=[late], max_new_tokens=2)
    with pytest.raises(ValueError, match="spec: expected one Modulation, or 3 .*got 2"):
        model.generate(PROMPTS, logits_processor=[processor([spec, None], SETS)], max_new_tokens=2)
    for wrong in (None, {}, rk.Cyclic(1.0, 2), [rk.Cyclic(1.0, 2)], "spec"):
        with pytest.raises(ValueError, match="spec: expected a Modulation, or a sequence of them"):
            processor(wrong, SETS)
    with pytest.raises(ValueError, match="sets: expected a TokenSets or None, got dict"):
        processor(spec, {"reflect": [5]})
    with pytest.raises(ValueError, match="prompt_length: expected an integer .* got '4'"):
        processor(spec, SETS, prompt_length="4")
    with pytest.raises(ValueError, match=r"modulation\.deepconf: expected None"):
        processor(rk.Modulation(deepconf=rk.DeepConf(1.0)), SETS)
    with pytest.raises(ValueError, match="temperature: expected a number or"):
        model.generate(PROMPTS, logits_processor=[processor(SPECS[2], SETS)], max_new_tokens=2)


@pytest.mark.peers
def test_transformers_refuses_the_next_turn_of_a_chat(model: Any) -> None:
    """A single sequence, which assisted decoding may shorten: only a beginning passes for it."""
    prompt, control = PROMPTS[1:2], processor(SPECS[0], SETS)
    options = {"max_new_tokens": 8, "do_sample": False}
    first = model.generate(prompt, logits_processor=[control], **options)
    turn = torch.tensor([[12, 13]])
    for other in (torch.cat((first, turn), 1), torch.cat((first[:, :6], turn), 1), prompt.flip(1)):
        with pytest.raises(ValueError, match="input_ids: expected .*, a processor per generate"):
            model.generate(other, logits_processor=[control], **options)
    for same in (prompt, first[:, :7]):  # the text of the first call, over again
        again = model.generate(same, logits_processor=[control], max_length=12, do_sample=False)
        assert torch.equal(again, first)


class Tokenizer:
    """What the page asks one."""

    def get_vocab(self) -> dict[str, int]:
        words = zip(("wait", "Wait", "but", "But"), range(5, 9), strict=True)
        return {**dict(words), "</think>": END}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


@pytest.mark.peers
def test_the_page(model: Any) -> None:
    """Its function serves call after call; its processor gives the same greedy text."""
    from reasonkern.integrations import _peer

    page = (Path(_peer.__file__).parent / "README.md").read_text()
    code = page.partition("## transformers: control")[2].partition("\n## ")[0]
    function, call = re.findall(r"```python\n(.*?)```", code, re.S)
    mask = (PROMPTS > 0).long()
    here: dict[str, Any] = {
        "model": model, "tokenizer": Tokenizer(), "input_ids": PROMPTS, "attention_mask": mask,
    }  # fmt: skip
    exec(function.replace("2048", "20").replace("0.6", "0.0").replace("1200", "16"), here)
    first, second = (here["answer"](PROMPTS, mask, seed) for seed in (1, 2))
    assert torch.equal(first.sequences, second.sequences) and len(here["state"].free) == 64
    exec(call.replace("2048", "20"), here)
    assert torch.equal(first.sequences[::4], here["out"])
    plain = model.generate(PROMPTS, attention_mask=mask, max_new_tokens=20)
    assert not torch.equal(plain, here["out"])
