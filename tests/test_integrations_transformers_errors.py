"""`generate` of transformers models: arguments and models that are refused."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers_fixtures import IDS, MASK, NEW, SHAPE, VOCAB, T

import reasonkern as rk

pytest_plugins = ("transformers_fixtures",)
pytestmark = pytest.mark.peers

ERRORS = {
    "device": ({"ids": IDS.to("meta")}, "input_ids: expected the model's device, cpu"),
    "shape": ({"ids": IDS[0]}, r"input_ids: expected shape \(batch, length\)"),
    "dtype": ({"ids": IDS.float()}, "input_ids: expected dtype torch.int64 or torch.int32"),
    "right padding": (
        {"attention_mask": MASK.flip(1)}, r"attention_mask\[1\]: expected 0 on the left .*got \[1",
    ),
    "right padding without a mask": (
        {"ids": torch.tensor([[3, 4], [3, 0]])}, r'attention_mask\[1\]: .*padding_side="left"',
    ),
    "temperatures": (
        {"temperature": torch.ones(3)}, r"temperature: expected shape \(requests,\) = \(4,\)",
    ),
    "all padding": ({"attention_mask": 0 * MASK}, r"attention_mask\[0\]: .* then 1 up to the end"),
    "mask": ({"attention_mask": MASK[:2]}, "attention_mask: expected shape that of input_ids"),
    "ids of another tokenizer": (
        {"ids": IDS + VOCAB}, r"prompt 0: expected ids in \[0, 48\), .* \(another tokenizer's ids",
    ),
    "vocabulary": (
        {"table": rk.NgramTable(1024, vocab_size=VOCAB - 1)},
        "table: expected vocab_size >= 48, the columns of the model's logits, got 47",
    ),
    "strings without tokenizer": ({"stop_strings": "a"}, "tokenizer: expected the model's"),
    "one criterion": (
        {"stopping_criteria": lambda ids, scores: True},
        "stopping_criteria: expected a sequence of criteria, got function",
    ),
    "no strings": ({"stop_strings": []}, "stop_strings: expected strings that are not empty"),
    "numbers for strings": ({"stop_strings": 3}, "stop_strings: expected strings .*, got 3"),
    "no criterion": ({"stopping_criteria": [3]}, "stopping_criteria: expected criteria that"),
    "what a tokenizer returns": (
        {"ids": {"input_ids": IDS}}, r"input_ids: expected a tensor \(of .*, got dict",
    ),
    "no number of trajectories": (
        {"num_trajectories": "four"}, "num_trajectories: expected an integer >= 1, got 'four'",
    ),
    "transformers' name": (
        {"num_return_sequences": 4},
        "num_return_sequences: expected its name here, num_trajectories, got 4",
    ),
    "eos by name": ({"eos": "<eos>"}, "eos: expected an id or several, got '<eos>'"),
    "eos of another model": ({"eos": [VOCAB]}, r"eos: expected ids in \[0, 48\), .* got 48"),
    "a flag for eos": ({"eos": True}, r"eos: expected ids in \[0, 48\), .* got True"),
    "a flag for padding": ({"pad": True}, "pad: expected an id or None, got True"),
    "padding by name": ({"pad": "<pad>"}, "pad: expected an id or None, got '<pad>'"),
    "streamer": ({"streamer": print}, "streamer: expected an object with put and end, got builtin"),
    "a forgotten mask": (
        {"ids": (IDS * MASK).flip(1)}, r"attention_mask\[1\]: expected 0 on the left alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(ours, make, case):
    changes, message = ERRORS[case]
    given = {"ids": IDS, "temperature": T, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        ours.generate(make(), given.pop("ids"), **given)


def test_an_argument_of_no_name_is_a_type_error(ours, make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        ours.generate(make(), IDS, temperature=T, max_new_tokens=4, temprature=1.0)


@pytest.mark.parametrize("eos, padded", [((), True), ((0, 5), False)])
def test_a_forgotten_mask_is_that_of_the_padding_id(ours, make, monkeypatch, eos, padded):
    """As transformers infers it; an id that ends texts, too, may be one of the prompt."""
    model, ids = make(), IDS * MASK
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos or None)
    options = {"temperature": T, "max_new_tokens": 8, "eos": ()}
    found = ours.generate(model, ids, **options).sequences
    mask = MASK if padded else torch.ones_like(MASK)
    given = ours.generate(model, ids, attention_mask=mask, **options).sequences
    assert torch.equal(found, given)
    other = ours.generate(model, ids, attention_mask=torch.ones_like(MASK), **options).sequences
    assert torch.equal(found, other) != padded


def test_another_models_tokenizer(ours, make, tokenizer):
    class Larger:
        decode = tokenizer.decode

        def __len__(self) -> int:
            return VOCAB + 1

    with pytest.raises(ValueError, match=r"tokenizer: expected at most 48 ids.* got 49 \(another"):
        ours.generate(make(), IDS, temperature=T, max_new_tokens=4, stop_strings="a",
                      tokenizer=Larger())  # fmt: skip


# ---- models


def unsupported(transformers: ModuleType) -> dict[str, tuple[Any, str]]:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                               num_heads=2)  # fmt: skip
    mamba = transformers.MambaConfig(**small, state_size=4)
    bloom = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    japanese = transformers.GPTNeoXJapaneseConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    xlm = transformers.XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2)
    flex = transformers.LlamaConfig(**(SHAPE | {"num_hidden_layers": 1}))
    llama = transformers.LlamaForCausalLM(flex)
    llama.config._attn_implementation = "flex_attention"
    bert = transformers.BertConfig(**small, num_attention_heads=2, intermediate_size=16)
    return {
        "encoder and decoder": (
            transformers.T5ForConditionalGeneration(t5), r"a causal \(decoder-only\) language model"
        ),
        "recurrent": (transformers.MambaForCausalLM(mamba), "a key-value cache in every layer"),
        "positions by slot": (transformers.BloomForCausalLM(bloom), "BloomForCausalLM"),
        "keys of one request": (
            transformers.GPTNeoXJapaneseForCausalLM(japanese), r"cache \(RuntimeError: view size"
        ),
        "assertions": (transformers.XLMWithLMHeadModel(xlm), r"XLM.* \(AssertionError: \)"),
        "attention": (llama, "attn_implementation 'sdpa' or 'eager'.* got 'flex_attention'"),
        "no model": (torch.nn.Linear(2, 2), "a causal language model of transformers, got Linear"),
        "tokens that see later ones": (
            transformers.BertLMHeadModel(bert).eval(), "is_decoder=True.* BertLMHeadModel, whose",
        ),
        "classifier": (
            transformers.LlamaForSequenceClassification(flex), "model: expected|does not take",
        ),
    }  # fmt: skip


KINDS_OF_UNSUPPORTED = (
    "encoder and decoder", "recurrent", "positions by slot", "keys of one request", "assertions",
    "attention", "no model", "tokens that see later ones", "classifier",
)  # fmt: skip


@pytest.mark.parametrize("case", KINDS_OF_UNSUPPORTED)
def test_unsupported_models(ours, transformers, case):
    model, message = unsupported(transformers)[case]
    with pytest.raises(ValueError, match=message):
        ours.generate(model, torch.tensor([[1, 2]]), temperature=0, max_new_tokens=2)


def test_berts_with_a_causal_mask_of_their_own(ours, transformers):
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, is_decoder=True,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given = {"max_new_tokens": NEW, "eos": (), "attention_mask": MASK}
    drafts = {"drafter": lambda _, texts: [([1, 2, 3, 4], range(-1, 3))] * len(texts)}
    found = ours.generate(model, IDS, temperature=0, **given, **drafts)
    given.pop("eos")
    assert torch.equal(found.sequences, model.generate(IDS, do_sample=False, **given))


def test_a_model_that_ignores_the_mask(ours, make):
    """What does not follow a tree is found by trying, whatever its name."""
    import copy

    model = copy.deepcopy(make())
    forward = model.model.forward
    model.model.forward = lambda *args, **rest: forward(*args, **(rest | {"attention_mask": None}))
    message = "model: expected the same logits for a branch of a tree|does not take a tree's mask"
    with pytest.raises(ValueError, match=message):
        ours.generate(model, IDS, temperature=0, max_new_tokens=2)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_columns_that_a_model_masks(ours, make, value):
    """They are not what the others are measured by."""
    import copy

    model = copy.deepcopy(make())
    column = torch.arange(VOCAB) == 3
    model.lm_head.register_forward_hook(lambda *args: args[-1].masked_fill(column, value))
    options = {"temperature": 0, "max_new_tokens": 4}
    if value != value:
        with pytest.raises(ValueError, match="model: expected logits without NaN"):
            ours.generate(model, IDS, **options)
        return
    assert 3 not in ours.generate(model, IDS, **options).sequences[:, 9:]
    broken, forward = copy.deepcopy(model), model.model.forward
    ignores = lambda *args, **rest: forward(*args, **(rest | {"position_ids": None}))  # noqa: E731
    broken.model.forward = ignores
    with pytest.raises(ValueError, match="expected the same logits for a branch"):
        ours.generate(broken, IDS, **options)


def test_dropout_is_named_where_a_model_is_refused_for_it(ours, transformers):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    with pytest.raises(ValueError, match=r"in training mode \(model.eval\(\) switches dropout off"):
        ours.generate(model, IDS, temperature=0, max_new_tokens=2)


def test_a_model_is_tried_again_once_it_is_another_one(ours, make):
    """Known in eval(), then trained with dropout; resized embeddings; and back."""
    import copy

    model = copy.deepcopy(make("llama"))
    options = {"temperature": 0, "max_new_tokens": 2}
    plain = ours.generate(model, IDS, **options).sequences
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with pytest.raises(ValueError, match=r"in training mode \(model.eval\(\) switches dropout off"):
        ours.generate(model, IDS, **options)
    model.eval().resize_token_embeddings(VOCAB + 2)
    found = ours.generate(model, torch.tensor([[VOCAB + 1, 5]]), **options)
    assert found.sequences.shape == (1, 4)
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(ours.generate(model, IDS, **options).sequences, plain)


ROPES = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 4.0,
        "original_max_position_embeddings": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_positions_that_change_with_the_longest_text_of_a_pass(ours, transformers, rope):
    """Up to where they do not, drafts and other requests do not matter; beyond, they would."""
    parameters = ROPES[rope] | {"rope_type": rope, "rope_theta": 1e4}
    shape = SHAPE | {"max_position_embeddings": 20, "rope_parameters": parameters}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    options = {"attention_mask": MASK, "temperature": 0}
    alone = [
        ours.generate(model, IDS[b : b + 1, 9 - n :], temperature=0, max_new_tokens=12).sequences
        for b, n in enumerate(MASK.sum(1).tolist())
    ]
    drafts = {"drafter": lambda _, texts: [([1, 2, 3, 4], range(-1, 3))] * len(texts)}
    found = ours.generate(model, IDS, max_new_tokens=12, **options, **drafts).sequences
    assert all(torch.equal(row[-12:], one[0, -12:]) for row, one in zip(found, alone, strict=True))
    message = f"texts of up to 21 tokens .* '{rope}' changes all positions .* got 22"
    with pytest.raises(ValueError, match=message):
        ours.generate(model, IDS, max_new_tokens=13, **options)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, max_new_tokens=13, custom_generate=ours.custom_generate)


def test_texts_beyond_the_models_positions_are_warned_of(ours, make):
    """256 of them; the last token is not read."""
    options = {"temperature": 0, "stopping_criteria": [lambda ids, scores: True]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(make(), IDS, max_new_tokens=256 + 1 - 9, **options)
    with pytest.warns(UserWarning, match="make 258 tokens, .* max_position_embeddings are 256"):
        ours.generate(make(), IDS, max_new_tokens=256 + 1 - 8, **options)
