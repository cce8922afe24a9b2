"""`generate` and `custom_generate` on tiny random transformers models, in float64."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import reasonkern as rk
from reasonkern.generation import Statistics, chain_proposal, loop

pytestmark = pytest.mark.peers
VOCAB, NEW, T = 48, 40, 0.2
LEAST = 1.3  # tokens per step below which a test of speculation tests nothing
TREE = rk.DraftTree.default(24)
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 12}),
    "qwen2, one layer with a window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
}  # fmt: skip
LETTERS = "!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"  # of the tokenizer, one per id
# Left-padded: rows of 9, 4, 1 and 6 tokens.
IDS = torch.randint(1, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(9) >= torch.tensor([0, 5, 8, 3])[:, None]).long()


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module")
def ours(transformers: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.transformers")


@pytest.fixture(scope="module")
def make(transformers: ModuleType) -> Any:
    models: dict[Any, Any] = {}

    def build(kind: str = "qwen3", attention: str = "sdpa", dtype: torch.dtype = torch.float64):
        key = kind, attention, dtype
        if key not in models:
            family, changes = KINDS[kind]
            config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
            config._attn_implementation = attention
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # logits that are not all alike, and depend on the context
                    scale = 0.5 if "lm_head" in name else 0.25
                    torch.nn.init.normal_(parameter, std=scale)
            models[key] = model.to(dtype)
        return models[key]

    return build


def taught(ours: ModuleType, model: Any, temperature: float = T) -> rk.NgramTable:
    """A table that has seen other trajectories of the prompts."""
    table = rk.NgramTable(1 << 14, vocab_size=VOCAB)
    ours.generate(
        model, IDS, attention_mask=MASK, temperature=temperature, max_new_tokens=NEW, seed=99,
        num_trajectories=16, table=table, tree=rk.DraftTree.default(8),
    )  # fmt: skip
    return table


# ---- the text


@pytest.mark.parametrize("temperature", [0.0, T])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_gives_the_plain_text(ours, make, kind, attention, temperature):
    """One, four and sixteen requests, padded on the left, with the table's scopes of all kinds."""
    model = make(kind, attention)
    table = taught(ours, model, temperature)
    for rows, each, scope in ((1, 1, None), (4, 1, torch.arange(4)), (4, 4, None)):
        given = {
            "attention_mask": MASK[:rows], "temperature": temperature, "max_new_tokens": NEW,
            "num_trajectories": each, "seed": 7,
        }  # fmt: skip
        expected = ours.generate(model, IDS[:rows], **given)
        assert expected.statistics.mean_accepted == 1
        if scope is not None:  # one that has not been taught
            ours.generate(model, IDS[:rows], **(given | {"seed": 8}), table=table, scope=scope)
        found = ours.generate(model, IDS[:rows], **given, table=table, scope=scope, tree=TREE)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.statistics.mean_accepted > (LEAST if scope is None else 1.0)
    auto = ours.generate(model, IDS, **given, table=table)
    assert torch.equal(auto.sequences, expected.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers(ours, make, kind):
    model = make(kind)
    expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    found = ours.generate(model, IDS, attention_mask=MASK, temperature=0, max_new_tokens=NEW,
                          table=taught(ours, model, 0.0), tree=TREE)  # fmt: skip
    assert torch.equal(found.sequences, expected)
    assert found.statistics.mean_accepted > LEAST


def test_sampled_text_is_what_sample_draws_from_whole_texts(ours, make):
    model, seeds = make(), rk.request_seeds(7, 4)
    options = {"temperature": T, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    found = ours.generate(model, IDS, attention_mask=MASK, max_new_tokens=NEW, seed=7,
                          table=taught(ours, model), tree=TREE, **options)  # fmt: skip
    assert found.statistics.mean_accepted > LEAST
    for row, keep, seed in zip(found.sequences, MASK, seeds, strict=True):
        text = row[int((keep == 0).sum()) :]
        with torch.no_grad():
            logits = model(text[None]).logits[0]
        for n in range(int(keep.sum()), len(text)):
            token = rk.sample(logits[n - 1 : n], seed=seed[None], position=n, **options)
            assert int(token) == int(text[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_equality_holds_for_the_logits_that_the_model_gave(ours, make, kind, dtype, monkeypatch):
    """In half precision a tree's logits need not be a single token's: those of the tree count."""
    model, rows, right = make(kind, "sdpa", dtype), {}, loop.verify_tree
    table = taught(ours, model)

    def keep(logits, draft, tree, *, position, **rest):
        out = right(logits, draft, tree, position=position, **rest)
        assert logits.dtype == dtype
        for b in range(len(logits)):
            for j in range(int(out.length[b])):
                rows[b, int(position[b]) + j] = logits[b, out.path[b, j]]
        return out

    monkeypatch.setattr(loop, "verify_tree", keep)
    found = ours.generate(model, IDS[:1], temperature=T, max_new_tokens=2 * NEW, seed=7,
                          table=table, tree=TREE)  # fmt: skip
    assert found.statistics.mean_accepted > LEAST
    seed = rk.request_seeds(7, 1)
    for n in range(9, 9 + 2 * NEW):
        token = rk.sample(rows[0, n][None], temperature=T, seed=seed, position=n)
        assert int(token) == int(found.sequences[0, n])


def test_prompt_lookup_as_drafter(ours, make, transformers):
    """transformers' own candidates in this loop."""
    lookup = transformers.generation.candidate_generator.PromptLookupCandidateGenerator(
        num_output_tokens=6, max_matching_ngram_size=2, max_length=1 << 30
    )

    def drafter(requests: Any, texts: Any) -> list[Any]:
        found = [lookup.get_candidates(torch.tensor([text]))[0][0] for text in texts]
        pairs = zip(found, texts, strict=True)
        return [chain_proposal(ids[len(text) :].tolist()) for ids, text in pairs]

    model, options = make(), {"temperature": 0.1, "max_new_tokens": 3 * NEW, "seed": 1}
    found = ours.generate(model, IDS, attention_mask=MASK, drafter=drafter, **options)
    expected = ours.generate(model, IDS, attention_mask=MASK, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.statistics.mean_accepted > LEAST


# ---- where a text ends


@pytest.fixture(scope="module")
def tokenizer(transformers: ModuleType) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: i for i, letter in enumerate(LETTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!")


def test_eos_and_strings_inside_a_path(ours, make, tokenizer, transformers):
    """Ends that the plain text reaches in the middle of accepted drafts."""
    model = make()
    table = taught(ours, model)
    options = {"attention_mask": MASK, "temperature": T, "max_new_tokens": NEW, "seed": 7,
               "num_trajectories": 4}  # fmt: skip
    free = ours.generate(model, IDS, **options).sequences[:, 9:]
    eos = sorted({int(free[0, 11]), int(free[5, 20])})
    words = free[:, [15, 16]].tolist()
    strings = [LETTERS[a] + LETTERS[b] for a, b in (words[1], words[9])]
    criterion = transformers.StopStringCriteria(tokenizer, strings)
    emitted = []

    class Cancel:
        def __call__(self, ids: Tensor, scores: None) -> Tensor:
            emitted.append(ids.shape[1])
            return torch.tensor([ids.shape[1] == 30])

    cases = {
        "eos": ({"eos": eos}, lambda row, n: row[n] in eos),
        "strings": (
            {"stop_strings": strings, "tokenizer": tokenizer},
            lambda row, n: n > 0 and LETTERS[row[n - 1]] + LETTERS[row[n]] in strings,
        ),
        "criteria": ({"stopping_criteria": [Cancel()]}, None),
    }  # fmt: skip
    for name, (ends, ended) in cases.items():
        plain = ours.generate(model, IDS, **options, **ends)
        found = ours.generate(model, IDS, **options, **ends, table=table, tree=TREE)
        assert torch.equal(found.sequences, plain.sequences), name
        assert torch.equal(found.lengths, plain.lengths)
        assert found.statistics.mean_accepted > LEAST
        assert len(set(found.lengths.tolist())) > 1
        if ended is not None:
            for row, length in zip(free.tolist(), found.lengths.tolist(), strict=True):
                first = next((n + 1 for n in range(NEW) if ended(row, n)), NEW)
                assert length == first
    # transformers' criterion also sees the prompt, which holds none of the strings here.
    by_criterion = ours.generate(model, IDS, **options, stopping_criteria=[criterion])
    by_strings = ours.generate(model, IDS, **options, stop_strings=strings, tokenizer=tokenizer)
    assert torch.equal(by_criterion.sequences, by_strings.sequences)


def test_a_streamer_gets_the_prompt_and_every_token_once(ours, make):
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.ended = True

    streamer, model = Streamer(), make()
    options = {"temperature": T, "max_new_tokens": NEW, "table": taught(ours, model), "tree": TREE}
    found = ours.generate(model, IDS[:1], streamer=streamer, **options)
    assert sum(streamer.parts, []) == found.sequences[0].tolist() and streamer.ended
    assert len(streamer.parts) == 1 + found.statistics.steps < NEW
    with pytest.raises(ValueError, match="streamer: expected a single request, got 4 requests"):
        ours.generate(model, IDS, streamer=streamer, **options)


# ---- model.generate(custom_generate=…)


def test_custom_generate_is_generate_with_transformers_options(ours, make):
    model = make()
    table, statistics = taught(ours, model), Statistics()
    drafts = {"table": table, "tree": TREE}
    eos = int(ours.generate(model, IDS[:1], temperature=0.5, top_k=30, max_new_tokens=NEW,
                            seed=7).sequences[0, 20])  # fmt: skip
    found = model.generate(
        IDS, attention_mask=MASK, do_sample=True, temperature=0.5, top_k=30, top_p=0.9, min_p=0.01,
        max_new_tokens=NEW, eos_token_id=eos, num_return_sequences=4, seed=7, **drafts,
        custom_generate=ours.custom_generate, statistics=statistics,
    )  # fmt: skip
    expected = ours.generate(
        model, IDS, attention_mask=MASK, temperature=0.5, top_k=30, top_p=0.9, min_p=0.01,
        max_new_tokens=NEW, eos=eos, seed=7, num_trajectories=4,
    )  # fmt: skip
    assert torch.equal(found, expected.sequences)
    assert statistics.mean_accepted > LEAST and statistics.tokens == int(expected.lengths.sum())


def test_custom_generate_takes_transformers_defaults(ours, make):
    """do_sample alone: temperature 1 and top_k 50, which a vocabulary of 48 does not feel."""
    model = make()
    found = model.generate(IDS, attention_mask=MASK, do_sample=True, max_length=30, seed=7,
                           return_dict_in_generate=True, top_k=5,
                           custom_generate=ours.custom_generate)  # fmt: skip
    expected = ours.generate(model, IDS, attention_mask=MASK, temperature=1.0, top_k=5, seed=7,
                             max_new_tokens=21)  # fmt: skip
    assert torch.equal(found.sequences, expected.sequences)
    greedy = model.generate(IDS, attention_mask=MASK, max_new_tokens=9, temperature=None,
                            custom_generate=ours.custom_generate)  # fmt: skip
    assert torch.equal(greedy, model.generate(IDS, attention_mask=MASK, max_new_tokens=9))


def test_custom_generate_ends_at_id_0(ours, make):
    model = make()
    options = {"attention_mask": MASK, "max_new_tokens": NEW, "seed": 7}
    found = model.generate(IDS, do_sample=True, eos_token_id=0,
                           custom_generate=ours.custom_generate, **options)  # fmt: skip
    plain = ours.generate(model, IDS, temperature=1.0, top_k=50, eos=0, **options)
    assert torch.equal(found, plain.sequences) and int(plain.lengths.min()) < NEW


def test_custom_generate_stops_by_any_criterion(ours, make, transformers, tokenizer):
    model = make()
    free = ours.generate(model, IDS, attention_mask=MASK, temperature=1.0, top_k=50, seed=7,
                         max_new_tokens=NEW).sequences  # fmt: skip
    string = LETTERS[int(free[0, 20])] + LETTERS[int(free[0, 21])]
    criteria = [transformers.StopStringCriteria(tokenizer, string)]
    options = {"attention_mask": MASK, "max_new_tokens": NEW}
    found = model.generate(
        IDS, do_sample=True, seed=7, stopping_criteria=criteria, table=taught(ours, model),
        custom_generate=ours.custom_generate, **options,
    )  # fmt: skip
    plain = ours.generate(model, IDS, temperature=1.0, top_k=50, seed=7, stop_strings=string,
                          tokenizer=tokenizer, **options)  # fmt: skip
    assert torch.equal(found, plain.sequences) and int(plain.lengths[0]) == 13


REFUSED = {
    "processor": ({"repetition_penalty": 1.5}, "logits_processor: expected none but Temperature"),
    "beams": ({"num_beams": 2}, "generation mode: expected 'greedy_search' or 'sample'"),
    "scores": (
        {"output_scores": True, "return_dict_in_generate": True}, "output_scores: expected False",
    ),
    "cache": ({"cache_implementation": "static"}, "cache_implementation: expected None"),
    "typical": ({"do_sample": True, "typical_p": 0.5}, "got TypicalLogitsWarper"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_custom_generate_refuses_what_it_would_ignore(ours, make, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make().generate(IDS, attention_mask=MASK, max_new_tokens=4, **changes,
                        custom_generate=ours.custom_generate)  # fmt: skip


def test_custom_generate_refuses_a_cache_that_holds_something(ours, make, transformers):
    model, cache = make(), transformers.DynamicCache()
    model(IDS, cache=cache, use_cache=True)
    config = transformers.GenerationConfig(max_length=20, eos_token_id=1)
    with pytest.raises(ValueError, match="cache: expected empty: .* got 9 ids"):
        ours.custom_generate(model, IDS, [], [], config, cache=cache)
    with pytest.raises(ValueError, match="inputs_embeds: expected not given: prompts are ids"):
        ours.custom_generate(model, IDS, [], [], config, inputs_embeds=torch.ones(1))


# ---- errors

ERRORS = {
    "device": ({"ids": IDS.to("meta")}, "input_ids: expected the model's device, cpu"),
    "shape": ({"ids": IDS[0]}, r"input_ids: expected shape \(batch, length\)"),
    "dtype": ({"ids": IDS.float()}, "input_ids: expected dtype torch.int64 or torch.int32"),
    "right padding": ({"attention_mask": MASK.flip(1)}, r"attention_mask\[1\]: expected padding"),
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
    "eos by name": ({"eos": "<eos>"}, "eos: expected an id or several, got '<eos>'"),
    "eos of another model": ({"eos": [VOCAB]}, r"eos: expected ids in \[0, 48\), .* got 48"),
    "padding by name": ({"pad": "<pad>"}, "pad: expected an id or None, got '<pad>'"),
    "streamer": ({"streamer": print}, "streamer: expected an object with put and end, got builtin"),
    "a forgotten mask": (
        {"ids": (IDS * MASK).flip(1)}, r"attention_mask\[1\]: expected padding on the left alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(ours, make, case):
    changes, message = ERRORS[case]
    given = {"ids": IDS, "temperature": T, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        ours.generate(make(), given.pop("ids"), **given)


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


def test_control_under_speculation_gives_the_text_of_control_alone(ours, make):
    """Each request its own spec; a table, a drafter and plain decoding; custom_generate, too."""
    model, ids = make(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    specs = [
        rk.Modulation(cyclic=rk.Cyclic(6.0, 8)),
        rk.Modulation(budget=rk.Budget(5, [7, 8, 9]), ban=rk.Ban("banned")),
    ]
    sets = rk.TokenSets.from_ids({"reflect": [3, 4, 5], "banned": range(10, 20)})

    def control() -> tuple[rk.ModulationState, Tensor]:
        state = rk.ModulationState(3, sets)
        for slot, (spec, prompt) in enumerate(zip(specs, ids.tolist(), strict=True)):
            state.add(2 - slot, spec, prompt)
        return state, torch.tensor([2, 1])

    options = {"temperature": T, "max_new_tokens": NEW, "seed": 3, "eos": ()}
    plain = ours.generate(model, ids, control=control(), **options).sequences
    assert plain.tolist() != ours.generate(model, ids, **options).sequences.tolist()
    new = plain[1, ids.shape[1] :].tolist()
    assert new[5:8] == [7, 8, 9] and not set(range(10, 20)) & set(new)
    table = rk.NgramTable(1 << 12, vocab_size=VOCAB)
    for _ in range(2):  # the second time the table has seen the text
        fast = ours.generate(model, ids, control=control(), table=table, tree=TREE, **options)
        assert fast.sequences.tolist() == plain.tolist()
    assert fast.statistics.mean_accepted > LEAST
    through = model.generate(
        ids, do_sample=True, temperature=T, top_k=0, max_new_tokens=NEW, eos_token_id=None,
        custom_generate=ours.custom_generate, control=control(), table=table, seed=3,
        tree=TREE,
    )  # fmt: skip
    assert through.tolist() == plain.tolist()


def unsupported(transformers: ModuleType) -> dict[str, tuple[Any, str]]:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                               num_heads=2)  # fmt: skip
    mamba = transformers.MambaConfig(**small, state_size=4)
    bloom = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    flex = transformers.LlamaConfig(**(SHAPE | {"num_hidden_layers": 1}))
    llama = transformers.LlamaForCausalLM(flex)
    llama.config._attn_implementation = "flex_attention"
    return {
        "encoder and decoder": (
            transformers.T5ForConditionalGeneration(t5), r"a causal \(decoder-only\) language model"
        ),
        "recurrent": (transformers.MambaForCausalLM(mamba), "a key-value cache in every layer"),
        "positions by slot": (transformers.BloomForCausalLM(bloom), "BloomForCausalLM"),
        "attention": (llama, "attn_implementation 'sdpa' or 'eager'.* got 'flex_attention'"),
        "no model": (torch.nn.Linear(2, 2), "a causal language model of transformers, got Linear"),
        "classifier": (
            transformers.LlamaForSequenceClassification(flex), "model: expected|does not take",
        ),
    }  # fmt: skip


KINDS_OF_UNSUPPORTED = (
    "encoder and decoder", "recurrent", "positions by slot", "attention", "no model", "classifier",
)  # fmt: skip


@pytest.mark.parametrize("case", KINDS_OF_UNSUPPORTED)
def test_unsupported_models(ours, transformers, case):
    model, message = unsupported(transformers)[case]
    with pytest.raises(ValueError, match=message):
        ours.generate(model, torch.tensor([[1, 2]]), temperature=0, max_new_tokens=2)


def test_a_model_that_ignores_the_mask(ours, make):
    """What does not follow a tree is found by trying, whatever its name."""
    import copy

    model = copy.deepcopy(make())
    forward = model.model.forward
    model.model.forward = lambda *args, **rest: forward(*args, **(rest | {"attention_mask": None}))
    message = "model: expected the same logits for a branch of a tree|does not take a tree's mask"
    with pytest.raises(ValueError, match=message):
        ours.generate(model, IDS, temperature=0, max_new_tokens=2)


def test_dropout_is_named_where_a_model_is_refused_for_it(ours, make, transformers):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    with pytest.raises(ValueError, match=r"in training mode \(model.eval\(\) switches dropout off"):
        ours.generate(model, IDS, temperature=0, max_new_tokens=2)


# ---- as a new user: a folder, the example, the README's section


@pytest.fixture(scope="module")
def folder(make: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("qwen3").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_example_on_a_local_folder(ours, folder, capsys):
    example = importlib.import_module("examples.transformers_generate")
    options = ["--prompt", "abcabc", "--max-new-tokens", "60", "--temperature", str(T)]
    plain, found = example.main([str(folder), *options, "--dtype", "float64"])
    printed = capsys.readouterr().out
    assert "4 of 4 texts are equal" in printed and "tokens per step" not in printed
    assert torch.equal(plain.sequences, found.sequences)
    assert found.statistics.passes < plain.statistics.passes or found.statistics.sizes[1] > 0
