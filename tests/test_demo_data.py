"""The demo's data: tokenizer, traces, generated arithmetic, windows."""

import gzip
import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reasonkern.__main__ import main
from reasonkern.demo import arithmetic, tokenizer, traces, windows

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "traces" / "traces.jsonl.gz"
GENERATED = arithmetic.generate(problems=8, samples=4, seed=3)
TOKENIZER = tokenizer.Tokenizer.learn(trace.prompt + trace.text for trace in GENERATED)


# ---- tokenizer


@given(st.text(st.characters(exclude_categories=())))
def test_tokenizer_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < tokenizer.VOCABULARY for token in ids)


@given(st.lists(st.sampled_from([trace.text[:40] for trace in GENERATED] + ["Wait,", "é", "\n"])))
def test_tokenizer_round_trip_on_known_words(parts):
    text = " ".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tokenizer_learns_words_deterministically():
    texts = [trace.text for trace in GENERATED]
    again = tokenizer.Tokenizer.learn(texts)
    assert again.pieces == tokenizer.Tokenizer.learn(texts).pieces
    assert len(again.encode(" Wait")) == 1
    assert len(again.encode(texts[0])) < 0.7 * len(texts[0])  # digits stay single
    assert tokenizer.VOCABULARY >= 32_000


def test_the_vocabulary_and_what_it_is_learnt_from_are_bounded():
    most = tokenizer.VOCABULARY - tokenizer.FIRST_PIECE
    full = tokenizer.Tokenizer([b"%d" % n for n in range(most)])
    assert full.decode([tokenizer.VOCABULARY - 1]) == str(most - 1)
    with pytest.raises(ValueError, match=f"pieces: at most {most} fit, got {most + 1}"):
        tokenizer.Tokenizer([*full.pieces, b"x"])
    learnt = tokenizer.Tokenizer.learn(["aaaa", "bbbbbbbbbb"], characters=2)
    assert learnt.pieces == [b"aa"] and learnt.decode([tokenizer.FIRST_PIECE + 1]) == ""


def test_tokenizer_keeps_digits_apart():
    assert len(TOKENIZER.encode("1234")) == 4


# ---- traces

GOOD = {"problem_id": 1, "prompt": "p", "text": "t", "correct": True}


def lines(*records):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records).encode()


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


MALFORMED = {
    "missing field": (lines(GOOD, without("correct")), r"line 2: field 'correct' is missing"),
    "string for bool": (lines({**GOOD, "correct": "yes"}), r"line 1: field 'correct' must be true"),
    "int for bool": (lines({**GOOD, "correct": 1}), r"field 'correct' must be .*got int 1"),
    "float id": (lines({**GOOD, "problem_id": 1.5}), r"field 'problem_id' must be an integer"),
    "bool id": (lines({**GOOD, "problem_id": True}), r"field 'problem_id' must be an integer"),
    "null text": (lines(GOOD, "", {**GOOD, "text": None}), r"line 3: field 'text' must be"),
    "empty text": (lines({**GOOD, "text": ""}), r"field 'text' must be a non-empty string"),
    "not JSON": (lines(GOOD, '{"problem_id": 1,'), r"line 2, column \d+: not JSON"),
    "not an object": (lines(GOOD, "[1, 2]"), r"line 2: expected a JSON object, got list \[1, 2\]"),
    "nested too deeply": (b"[" * 200_000, r"line 1.*not JSON"),
    "not UTF-8": (lines(GOOD) + b"\n\xff\xfe", r"line 2: not UTF-8 \(byte 1"),
    "empty": (b"", r"holds no traces"),
    "blank lines": (b"\n \n", r"holds no traces"),
    "one outcome": (lines(GOOD, {**GOOD, "problem_id": 2, "correct": False}), r"no group has both"),
    "truncated gzip": (gzip.compress(lines(GOOD) * 50)[:-12], r"truncated file"),
    "damaged gzip": (gzip.compress(lines(GOOD))[:-8] + bytes(8), r"gzip stream is damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_traces_name_file_line_and_field(case, tmp_path, capsys):
    content, message = MALFORMED[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(traces.TraceError, match=message) as error:
        traces.load_traces(path)
    assert str(path) in str(error.value)
    assert main(["demo", "--traces", str(path), "--out", str(tmp_path)]) == 2
    assert str(error.value) in capsys.readouterr().err


def test_missing_file_is_a_trace_error(tmp_path):
    with pytest.raises(traces.TraceError, match="cannot be read"):
        traces.load_traces(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_traces_are_read_plain_and_compressed(pack, tmp_path):
    path = tmp_path / "traces"
    path.write_bytes(pack(lines(GOOD, {**GOOD, "correct": False, "extra": 1})))
    assert [trace.correct for trace in traces.load_traces(path)] == [True, False]


def test_advantages_are_normalised_within_the_group():
    records = [
        traces.Trace(p, "", "t", c) for p, c in [(1, True), (2, True), (1, False), (2, True)]
    ]
    records += [traces.Trace(1, "", "t", False), traces.Trace(1, "", "t", False)]
    advantages = traces.group_advantages(records)
    assert set(advantages) == {0, 2, 4, 5}
    values = torch.tensor([advantages[index] for index in (0, 2, 4, 5)], dtype=torch.float64)
    assert values[0] > 0 > values[1]
    assert values.mean().abs() < 1e-12
    assert (values.std() - 1).abs() < 1e-12


def test_many_traces_are_cut_to_whole_mixed_groups():
    kept = traces.first_groups(GENERATED, 10)
    assert len(kept) == 8 and {trace.problem_id for trace in kept} == {0, 1}


# ---- generated arithmetic


def slips(text):
    """The equations that do not hold."""
    equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)
    return [e for e in equations if arithmetic.apply(e[1], int(e[0]), int(e[2])) != int(e[3])]


@given(st.integers(0, 10_000))
@example(263)  # a value far below 0 slips
@settings(max_examples=20, deadline=None)
def test_generated_traces_are_verifiable(seed):
    made = arithmetic.generate(problems=3, samples=4, seed=seed)
    assert len(traces.mixed_groups(made)) == 3
    for trace in made:
        assert "Wait, " in trace.text
        assert trace.correct == arithmetic.verify(trace.prompt, trace.text)
        if not trace.correct:
            assert slips(trace.text)


def test_generated_traces_catch_some_slips_and_are_reproducible():
    caught = [trace for trace in GENERATED if trace.correct and slips(trace.text)]
    assert caught and all("is wrong" in trace.text for trace in caught)
    assert arithmetic.generate(8, 4, seed=3) == GENERATED != arithmetic.generate(8, 4, seed=4)


def test_verifier_rejects_other_answers():
    trace = next(trace for trace in GENERATED if trace.correct)
    answer = arithmetic.expected_answer(trace.prompt)
    assert not arithmetic.verify(trace.prompt, trace.text.replace(f"{{{answer}}}", "{7777}"))
    assert not arithmetic.verify(trace.prompt, "no box")
    with pytest.raises(ValueError, match="Start with"):
        arithmetic.expected_answer("What is love?")


# ---- windows


def test_windows_shift_targets_and_mask_prompt_and_end():
    encoded = windows.encode(GENERATED, TOKENIZER)
    batch = windows.random_batch(encoded, 6, 40, Random(0))
    assert not batch.mask[:, -1].any()
    assert batch.mask.any(1).all()
    used = batch.mask[:, :-1]
    assert torch.equal(batch.targets[:, :-1][used], batch.ids[:, 1:][used])
    whole = windows.logged_batches(encoded[:4], 1, 4, 400, Random(0))[0]
    assert whole.mask.sum(1).sort().values.tolist() == sorted(
        len(TOKENIZER.encode(trace.text)) + 1 for trace in GENERATED[:4]
    )


@given(st.integers(8, 300), st.integers(1, 300), st.integers(1, 600))
def test_windows_cover_the_text(window, prompt, text):
    encoded = windows.Encoded(list(range(prompt + text)), prompt, 0, 1.0)
    starts = encoded.starts(window)
    targets = {t for s in starts for t in range(s + 1, min(s + window, prompt + text))}
    assert targets >= set(range(prompt, prompt + text))
    assert starts == sorted(set(starts)) and starts[0] + window > prompt


def test_long_traces_give_windows_from_their_beginning_to_their_end():
    right, wrong = (windows.Encoded(list(range(100)), 5, 0, a) for a in (0.5, -2.0))
    batches = windows.logged_batches([right, wrong], 2, 4, 16, Random(0))
    starts = right.starts(16)
    expected = sorted(2 * [starts[0], starts[2], starts[4], starts[6]])
    assert len(starts) == 7 and expected[-1] == 84
    assert sorted(torch.cat([batch.ids[:, 0] for batch in batches]).tolist()) == expected
    alone = windows.Encoded([1] * 20, 5, 0, None)  # of a group with one outcome
    assert windows.random_batch([alone], 2, 16, Random(0)).advantage.tolist() == [0, 0]


def test_a_huge_group_is_cut_with_both_outcomes():
    right, wrong = (windows.Encoded([1] * 20, 5, 0, advantage) for advantage in (0.5, -2.0))
    batches = windows.logged_batches([right] * 300 + [wrong] * 9, 2, 4, 16, Random(0))
    assert len(batches) == 2
    assert {value for batch in batches for value in batch.advantage.tolist()} == {0.5, -2.0}


@pytest.mark.skipif(not REAL.exists(), reason=f"no real traces at {REAL}")
def test_real_traces_load_and_round_trip():
    real = traces.load_traces(REAL)
    learnt = tokenizer.Tokenizer.learn(trace.text for trace in real)
    assert len(traces.mixed_groups(real)) == 5
    for trace in real:
        assert learnt.decode(learnt.encode(trace.text)) == trace.text
    assert all(sequence.advantage for sequence in windows.encode(real, learnt))
