"""`generate` and `custom_generate` on tiny random transformers models: the texts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers_fixtures import IDS, KINDS, LEAST, LETTERS, MASK, NEW, TREE, VOCAB, T, taught

import reasonkern as rk
from reasonkern.generation import Statistics, chain_proposal, loop
from reasonkern.integrations._transformers_stop import StopStrings

pytest_plugins = ("transformers_fixtures",)
pytestmark = pytest.mark.peers


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


def test_ids_of_numpy(ours, make):
    options = {"attention_mask": MASK, "temperature": 1.0, "max_new_tokens": NEW}
    found = ours.generate(make(), IDS, eos=np.int64(5), pad=np.int32(7), **options)
    expected = ours.generate(make(), IDS, eos=5, pad=7, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.lengths < NEW).any() and (found.sequences[:, -1] == 7).any()


def test_strings_of_spaces_that_decoding_drops(ours, transformers):
    """Those of a list's first token, and those before punctuation."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<pad>", "▁so", "▁Stop", "▁.", "Stop"))}
    words_alone = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    words_alone.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_alone, clean_up_tokenization_spaces=True
    )
    assert (tokenizer.decode([2, 1]), tokenizer.decode([1, 3])) == ("Stop so", "so.")
    cases = ((" Stop", [2], True), (" .", [3], True), (" .", [1, 3], True), ("so.", [1, 3], False),
             (" Stop", [4], False), ("so Stop", [2], False))  # fmt: skip
    for string, new, ends in cases:
        stop = StopStrings(string, tokenizer, [1], 5)
        assert stop(0, [1, *new]) == ends, (string, new)


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


def test_an_assistant_does_nothing_in_custom_generate(ours, make):
    """transformers keeps it back, and nothing tells of it: once this fails, it can be refused."""
    model, given = make(), []

    def custom_generate(model, input_ids, **options):
        given.append(options)
        return ours.custom_generate(model, input_ids, **options)

    texts = [
        model.generate(IDS[:1], max_new_tokens=4, custom_generate=custom_generate,
                       assistant_model=assistant) for assistant in (None, make())
    ]  # fmt: skip
    assert torch.equal(*texts)
    plain, assisted = given
    assert set(plain) == set(assisted)
    assert vars(plain["generation_config"]).keys() == vars(assisted["generation_config"]).keys()
    assert plain["generation_config"].to_dict() == assisted["generation_config"].to_dict()


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


# ---- control


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the first raises, the second has no words
def test_the_example_on_a_folder_without_a_tokenizer(make, tmp_path, capsys, kind):
    make(kind).save_pretrained(tmp_path)
    example = importlib.import_module("examples.transformers_generate")
    with pytest.raises(SystemExit):
        example.main([str(tmp_path)])
    assert "expected a tokenizer" in capsys.readouterr().err
