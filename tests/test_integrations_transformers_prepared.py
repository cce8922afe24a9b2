"""What transformers hands to `custom_generate` is what its own generate takes, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers_fixtures import IDS, MASK, VOCAB

pytest_plugins = ("transformers_fixtures",)
pytestmark = pytest.mark.peers

TAKEN_OVER = {
    "max_length", "max_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k",
    "top_p", "min_p", "num_return_sequences", "return_dict_in_generate", "pad_token_id",
    "eos_token_id",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "min_length": 20, "min_new_tokens": 4, "num_beams": 2, "use_mtp": True,
    "cache_implementation": "static", "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[3]],
    "renormalize_logits": True, "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "remove_invalid_values": True, "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": [3], "begin_suppress_tokens": [3], "sequence_bias": [[[3], 2.0]],
    "token_healing": True, "guidance_scale": 2.0, "watermarking_config": {}, "penalty_alpha": 0.5,
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "dola_layers": "low",
    "constraints": [3], "force_words_ids": [[3]], "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "is_assistant": True,
}  # fmt: skip
# Caches, compilation, beams and assistants: the text is that of transformers, which reads them.
WITHOUT_EFFECT: dict[str, Any] = {
    "early_stopping": True, "use_cache": False, "cache_config": {}, "max_cache_len": 99,
    "length_penalty": 2.0, "bos_token_id": 3, "decoder_start_token_id": 3,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0, "max_matching_ngram_size": 2, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": "x",
    "compile_config": "CompileConfig", "disable_compile": True,
    "continuous_batching_config": "ContinuousBatchingConfig",
    "low_memory": True, "diversity_penalty": 0.5, "num_beam_groups": 1, "prefill_chunk_size": 2,
}  # fmt: skip


def test_every_field_of_a_configuration_is_known(transformers):
    fields = {name for name in vars(transformers.GenerationConfig()) if name[0] != "_"}
    known = TAKEN_OVER | set(REFUSED) | set(WITHOUT_EFFECT) | {"transformers_version"}
    assert fields - known == set()


def generated(model: Any, ours: Any, ids: torch.Tensor = IDS, **options: Any) -> list[list[int]]:
    """The greedy text, of transformers' own loop where `ours` is None."""
    given = {"max_new_tokens": 12} | options
    if ours is not None:
        given["custom_generate"] = ours.custom_generate
    found: list[list[int]] = model.generate(ids, **given).tolist()
    return found


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_is_refused(ours, make, field):
    """By us, or by transformers before us."""
    changes = {field: REFUSED[field], "return_dict_in_generate": field.startswith("output_")}
    if field in ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        changes["do_sample"] = True
    if field == "penalty_alpha":
        changes["top_k"] = 3
    if field.startswith(("min_", "exponential_")):
        changes["eos_token_id"] = 3
    with pytest.raises(ValueError, match=": expected |requires|tokenizer"):
        generated(make(), ours, attention_mask=MASK, **changes)


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_a_field_without_effect(ours, make, transformers, field):
    value = WITHOUT_EFFECT[field]
    changes = {"attention_mask": MASK, field: value}
    if field.endswith("_config") and value:
        changes[field] = getattr(transformers, value)()
    assert generated(make(), ours, **changes) == generated(make(), None, **changes)


# ---- masks, positions


def test_a_mask_of_ones_is_one(ours, make):
    """transformers hands over none instead, and the padding id is an id of the prompt."""
    ids = IDS.clone()
    ids[0, 0] = ids[1, 4] = 0
    model, mask = make(), torch.ones_like(ids)
    assert model.generation_config.pad_token_id == 0
    expected = generated(model, None, ids, attention_mask=mask)
    assert generated(model, ours, ids, attention_mask=mask) == expected
    assert generated(model, None, ids[:1, 1:]) != [row[1:] for row in expected[:1]]


def test_positions_are_those_of_the_tokens(ours, make):
    model = make()
    counted = (MASK.cumsum(-1) - 1).clamp_min(0)
    given = {"attention_mask": MASK, "position_ids": counted}
    assert generated(model, ours, **given) == generated(model, None, **given)
    with pytest.raises(ValueError, match="position_ids: expected tokens counted from 0"):
        generated(model, ours, attention_mask=MASK, position_ids=2 * counted)


# ---- criteria and warpers of a user


def test_a_users_criteria_of_ids_and_length(ours, make, transformers):
    """They take the place of the configuration's."""
    model, kinds = make(), transformers.generation.stopping_criteria
    free = generated(model, None, IDS[:1])[0][9:]
    assert free[4] not in free[:4] and free[2] not in (free[0], free[1], free[4])
    for criterion, eos, length in (
        (kinds.EosTokenCriteria(free[4]), None, 5),
        (kinds.EosTokenCriteria(free[4]), free[2], 5),
        (kinds.MaxLengthCriteria(9 + 3), None, 3),
        (kinds.MaxLengthCriteria(9 + 20), None, 20),
    ):
        given = {"stopping_criteria": [criterion], "eos_token_id": eos}
        found = generated(model, ours, IDS[:1], **given)
        assert found == generated(model, None, IDS[:1], **given)
        assert len(found[0]) == 9 + length


@pytest.mark.parametrize("eos", [-1, [VOCAB + 9, -1]])
def test_ids_of_a_configuration_that_never_come(ours, make, monkeypatch, eos):
    model = make()
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    expected = generated(model, None, attention_mask=MASK)
    assert generated(model, ours, attention_mask=MASK) == expected
    found = ours.generate(model, IDS, attention_mask=MASK, temperature=0, max_new_tokens=12)
    assert found.sequences.tolist() == expected
    with pytest.raises(ValueError, match="eos: expected ids in"):
        ours.generate(model, IDS, temperature=0, max_new_tokens=12, eos=eos)


def test_warpers_in_another_order_or_with_other_settings(ours, make, transformers):
    top_p, heat = transformers.TopPLogitsWarper, transformers.TemperatureLogitsWarper
    options = {"do_sample": True, "attention_mask": MASK, "max_new_tokens": 4, "seed": 3}
    cases = (
        ([top_p(0.5)], "each at most once, in the order Temp.*, got .'TopP.*, 'Temp"),
        ([heat(0.5)], "each at most once, .*got .'Temp.*, 'Temp"),
    )
    for processors, message in cases:
        with pytest.raises(ValueError, match=f"logits_processor: expected {message}"):
            generated(make(), ours, logits_processor=processors, temperature=2.0, **options)
    for processor in (top_p(0.5, min_tokens_to_keep=2), top_p(0.5, filter_value=-9.0)):
        with pytest.raises(ValueError, match="expected a TopP.* with min_tokens_to_keep = 1 and"):
            generated(make(), ours, logits_processor=[processor], top_k=0, **options)
    own = generated(make(), ours, logits_processor=[heat(0.5)], top_k=VOCAB, top_p=0.7, **options)
    assert own == generated(make(), ours, temperature=0.5, top_k=VOCAB, top_p=0.7, **options)
