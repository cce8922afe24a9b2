"""`tune_tree` and ``python -m reasonkern tune``: replay, cutting, files, messages."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_speculation_tree import parent_lists

from reasonkern import DraftTree, tune_tree
from reasonkern.__main__ import main
from reasonkern._progress import counted
from reasonkern.speculation.cli import TuneConfig, investigate, read_traces
from reasonkern.speculation.replay import TokenTrace, replay
from reasonkern.speculation.tokenizers import TokenizerError, load_tokenizer
from reasonkern.speculation.tune import big_tree

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "traces" / "traces.jsonl.gz"


# ---- tune_tree


@given(parent_lists(), st.data())
def test_the_kept_nodes_are_the_most_accepted(parents: list[int], data: st.DataObject) -> None:
    tree = DraftTree(parents)
    counts = data.draw(st.lists(st.integers(0, 5), min_size=tree.nodes, max_size=tree.nodes))
    nodes = data.draw(st.integers(1, tree.nodes))
    tuned = tune_tree(torch.tensor(counts), nodes, tree=tree)
    assert tuned.nodes == nodes
    assert tune_tree(torch.tensor(counts), tree=tree, nodes=tree.nodes).prefix(nodes) == tuned


def test_counts_of_real_walks_need_no_closure() -> None:
    """Counts that fall down the tree and along ranks: simply the largest, ties by depth."""
    tree = DraftTree([-1, 0, 0, 1, 1, 2, 3])
    counts = torch.tensor([10.0, 6, 3, 4, 1, 3, 2])
    assert tune_tree(counts, 4, tree=tree).parents.tolist() == [-1, 0, 1, 0]
    assert tune_tree(counts, 6, tree=tree).parents.tolist() == [-1, 0, 1, 0, 3, 2]


def test_a_later_sibling_keeps_the_earlier_ones() -> None:
    tree = DraftTree([-1, 0, 0, 0, 3])
    assert tune_tree([9, 1, 0, 5, 4], 4, tree=tree).parents.tolist() == [-1, 0, 0, 0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.ones(3), {}, r"source: expected shape \(nodes of the tree,\) = \(2,\)"),
        (torch.tensor([1.0, -1.0]), {}, "source: expected finite counts >= 0"),
        (torch.tensor([1.0, torch.nan]), {}, "source: expected finite counts >= 0"),
        (torch.ones(2), {"nodes": 3}, r"nodes: expected an integer in \[1, 2\]"),
        (torch.ones(2), {"nodes": True}, "nodes: expected an integer .* got True"),
        ([], {}, "source: expected at least one sequence of token ids, got none"),
        (None, {}, "source: expected counts, or a list of sequences of token ids, got None"),
        ("traces.jsonl", {}, "source: expected counts, or a list .* got 'traces.jsonl'"),
        ([[1, 2, 3]], {"vocab_size": 2}, "vocab_size: expected an integer above the largest id, 3"),
    ],
)
def test_bad_sources(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune_tree(source, **({"nodes": 2, "tree": DraftTree.chain(2)} | options))


def test_a_repeated_sequence_makes_a_chain() -> None:
    tree = tune_tree([list(range(100, 130)) * 8], 10)
    assert tree == DraftTree.chain(10)


def test_the_big_tree() -> None:
    assert (big_tree().nodes, big_tree().depth) == (625, 20)


# ---- replay


def test_replay_counts_steps_and_tokens() -> None:
    """A period of 5 after 6 tokens of context: then each step takes the whole chain and one."""
    tokens = np.array(([1, 2, 3, 4, 5] * 20)[:96])
    result = replay([TokenTrace(tokens)], DraftTree.chain(5), vocab_size=9, orders=(1,))
    assert int(result.tokens[0]) == 96
    assert result.accepted[0] == result.steps[0] == 5 + 1 + 18  # 6 steps of one token, 18 of five
    assert result.accepted.tolist() == [24, 18, 18, 18, 18]
    assert result.hits == {1: 18 * 4} and result.misses == 5  # the first step has no context


def test_groups_do_not_help_each_other() -> None:
    tokens = np.arange(50)
    alone = replay([TokenTrace(tokens, group=0)] * 2, DraftTree.chain(5), vocab_size=50)
    apart = [TokenTrace(tokens, group=group) for group in (0, 1)]
    separate = replay(apart, DraftTree.chain(5), vocab_size=50)
    # The second time: two tokens without a bigram, then five per step.
    assert alone.steps.tolist() == [50, 2 + 10] and separate.steps.tolist() == [100]


def test_groups_are_replayed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = [TokenTrace(np.arange(9) % (2 + n % 3), group=n) for n in range(5)] * 2
    told: list[int] = []
    found = []
    for together in (64, 2):
        monkeypatch.setattr("reasonkern.speculation.replay.TOGETHER", together)
        found.append(replay(traces, DraftTree.chain(3), vocab_size=4, advance=told.append))
    assert sum(told) == 2 * 90 and min(told) > 0
    for name, value in vars(found[0]).items():
        assert np.array_equal(value, getattr(found[1], name)), name


def test_the_prompt_is_learnt_first() -> None:
    tokens = np.arange(50)
    trace = TokenTrace(tokens, prompt=np.append(tokens, 60))
    result = replay([trace], DraftTree.chain(5), vocab_size=61, orders=(1,))
    assert int(result.steps[0]) == 1 + 10


def test_logged_laws_are_learnt() -> None:
    """Each token was seen once, but the model's second candidate is what follows next time."""
    first, second = np.array([1, 2, 3, 4]), np.array([1, 9, 3, 8, 6])
    ids = np.array([[1, 7], [2, 9], [3, 7], [4, 8]])
    logged = np.log(np.full((4, 2), 0.5, np.float32))
    prompt = np.array([5])
    traces = [TokenTrace(first, prompt, 0, ids, logged), TokenTrace(second, prompt)]
    wide = DraftTree([-1, 0, 0])
    with_laws = replay(traces, wide, vocab_size=10, orders=(1,))
    traces[0] = TokenTrace(first, prompt)
    without = replay(traces, wide, vocab_size=10, orders=(1,))
    assert with_laws.steps[1] < without.steps[1]


# ---- the command line


def write(path: Path, records: list[Any], packed: bool = False) -> Path:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def texts() -> list[dict[str, Any]]:
    text = "First I add two and two. Then I check: two and two is four. "
    return [{"problem_id": k % 2, "prompt": "2+2?", "text": text * (1 + k)} for k in range(4)]


def test_tune_writes_a_tree_and_a_picture(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    traces = write(tmp_path / "traces.jsonl.gz", texts(), packed=True)
    out, png = tmp_path / "tree.json", tmp_path / "tree.png"
    assert main(["tune", str(traces), "--nodes", "12", "-o", str(out), "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "4 traces of 2 problems" in printed and "counted as certain" in printed
    assert DraftTree.load(out).nodes == 12 and png.stat().st_size > 10_000
    for title in ("orders  ", "nodes  ", "trajectory  "):
        assert title in printed
    assert re.search(r"^1 +1\.00$", printed, re.M)  # a tree of the root alone
    orders = re.findall(r"^([2-4,]+) +[1-9]\.\d\d$", printed, re.M)[:3]
    assert orders == ["2", "3,2", "4,3,2"] and printed.count("\n1 ") == 2
    assert 98 <= sum(map(int, re.findall(r": (\d+) %", printed))) <= 102
    assert "(bytes, vocabulary 256)" in printed
    rates = re.findall(r"^(?:DraftTree.default\(12\)|tuned.*[a-z])  +([\d.]+)$", printed, re.M)
    default, fitted, held_out = map(float, rates)
    assert fitted >= default > 1 and fitted >= held_out > 1


def test_held_out_problems_are_not_those_of_the_tree(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One repeats itself, in the other a token has two successors: neither tree fits the other."""
    one = [TokenTrace(np.arange(50), group=0)] * 2
    other = [TokenTrace(np.array(([1, 2, 1, 3] * 40)[n:]), group=1) for n in (0, 1)]
    config = TuneConfig(Path("-"), nodes=5, orders=(1,))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    found = investigate([*one, *other], 60, config)
    done, told = re.findall(r"(\d+)/(\d+) ", capsys.readouterr().out)[-1]
    assert done == told  # of all replays

    trees = [investigate(half, 60, config).tree for half in (other, one)]
    rates = [
        replay(h, t, vocab_size=60, orders=(1,)) for h, t in zip((one, other), trees, strict=True)
    ]
    assert found.held_out == sum(r.tokens.sum() for r in rates) / sum(r.steps.sum() for r in rates)
    assert investigate(one, 60, config).held_out is None


def test_token_ids_need_no_tokenizer(tmp_path: Path, capsys: Any) -> None:
    records = [{"tokens": [7, 300_000, 5] * 9, "topk_ids": [[7, 5]] * 27}]
    records[0]["topk_logprobs"] = [[-0.5, -1.5]] * 27
    traces = write(tmp_path / "traces.jsonl", records)
    assert main(["tune", str(traces), "--nodes", "4", "--orders", "2"]) == 0
    printed = capsys.readouterr().out
    assert "(token ids, vocabulary 300,001)" in printed and "without logits" not in printed
    assert "(one problem: what the tree brings on another is not measured)" in printed
    assert "1 trace of 1 problem, 27 tokens" in printed and "warning" not in printed
    law = {"topk_ids": [[500, 7]] * 18, "topk_logprobs": [[-1.0, -1.0]] * 18}
    for more, largest, problems in (
        ({}, 255, 2),
        ({"prompt_tokens": [400]}, 400, 1),
        (law, 500, 2),
    ):
        write(
            traces, [{"tokens": [7, 5] * 9} | more, {"text": "abab"} | more | ({"text": "ab" * 9})]
        )
        assert main(["tune", str(traces), "--nodes", "4", "--orders", "2"]) == 0
        printed = capsys.readouterr().out
        assert f"2 traces of {counted(problems, 'problem')}, " in printed
        assert f"(bytes and token ids, vocabulary {largest + 1})" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, column 2: not JSON"),
        ("[]", "line 2: expected a JSON object, got list"),
        ({}, r"line 2: expected a non-empty 'tokens' \(ids\) or 'text'"),
        ({"text": ""}, "line 2: expected a non-empty 'tokens'"),
        ({"text": 3}, "line 2: field 'text' must be a string, got int 3"),
        ({"tokens": [1, -2]}, "line 2: field 'tokens' must be token ids"),
        ({"tokens": [1, True]}, "line 2: field 'tokens' must be token ids"),
        ({"tokens": [1 << 26]}, "line 2: field 'tokens' must be token ids"),
        ({"text": "a", "prompt": []}, "line 2: field 'prompt' must be a string"),
        ({"text": "a", "problem_id": {}}, "line 2: field 'problem_id' must be"),
        ({"text": "ab", "topk_ids": [[1]]}, "line 2: 'topk_ids' and 'topk_logprobs' must"),
        (
            {"text": "ab", "topk_ids": [[1], [2]], "topk_logprobs": [[0.1], [0.1]]},
            "line 2: 'topk_logprobs' must be log-probabilities",
        ),
        ({"text": "a", "topk_ids": [[-2, 1]], "topk_logprobs": [[0, 0]]}, "line 2: .* of ids"),
        ({"text": "a", "topk_ids": [[1 << 26]], "topk_logprobs": [[0]]}, "line 2: .* of ids"),
        ({"text": "a", "topk_ids": [[]], "topk_logprobs": [[]]}, "line 2: 'topk_ids' .* one row"),
        ({"text": "a", "topk_ids": [[1.5]], "topk_logprobs": [[0]]}, "line 2: .* be integers"),
        ({"text": "a", "topk_ids": [["1"]], "topk_logprobs": [["0"]]}, "line 2: .* be integers"),
        ({"text": "a", "topk_ids": [[1 << 64]], "topk_logprobs": [[0]]}, "line 2: .* be integers"),
        ({"text": "ab", "topk_ids": [[1], []], "topk_logprobs": [[0], []]}, "line 2: .* one len"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, capsys: Any, line: Any, message: str) -> None:
    traces = write(tmp_path / "traces.jsonl", [{"text": "fine"}, line])
    assert main(["tune", str(traces)]) == 2
    assert re.search(rf"^error: .*traces\.jsonl, {message}", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "700"], "--nodes: expected 1 to 625, got 700"),
        (["--png", "tree.gif"], "--png: expected a name that ends in .png, got tree.gif"),
        (["--tokenizer", "nowhere"], "--tokenizer nowhere: expected bytes, mistral-common, a"),
        (["--tokenizer", "{tmp}"], "expected bytes, mistral-common, a tokenizer.json or a model's"),
        (["-o", "{tmp}/no/tree.json"], "tree.json: there is no folder"),
        (["--png", "{tmp}/no/tree.png"], "tree.png: there is no folder"),
        (["-o", "{tmp}"], "expected the name of a file, got a folder"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    traces = write(tmp_path / "traces.jsonl", [{"text": "abc"}])
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    assert main(["tune", str(traces), *filled]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_alone_needs_matplotlib(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["tune", str(write(tmp_path / "traces.jsonl", [{"text": "abc"}])), "--nodes", "1"]
    assert main(command) == 0 and main([*command, "--png", "tree.png"]) == 2
    assert "--png needs matplotlib (pip install" in capsys.readouterr().err


def test_candidates_that_are_none_take_no_place_and_null_is_no_field(tmp_path: Path) -> None:
    """Of more than a table keeps."""
    law = {"topk_ids": [[-1] * 12 + [7]] * 2, "topk_logprobs": [[0.0] * 12 + [-0.1]] * 2}
    record = {"tokens": None, "prompt": None, "text": "ab", "problem_id": None, **law}
    traces = write(tmp_path / "traces.jsonl", [record, {"text": "ab", "topk_ids": None}])
    first, second = read_traces(traces, load_tokenizer("bytes"))
    assert first.topk_ids is not None and first.topk_ids[:, 0].tolist() == [7, 7]
    assert second.topk_ids is None and len(first.prompt) == 0 and first.from_text


@pytest.mark.parametrize("packed", [False, True])
def test_traces_come_out_of_a_pipe(tmp_path: Path, packed: bool) -> None:
    """As of a shell's ``<(zstdcat …)``."""
    content = write(tmp_path / "traces", [{"text": "ab"}], packed).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    (trace,) = read_traces(tmp_path / "pipe", load_tokenizer("bytes"))
    writer.join()
    assert trace.tokens.tolist() == [97, 98]


def test_a_missing_file_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["tune", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_a_tokenizer_file_is_used(tmp_path: Path, capsys: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    traces = write(tmp_path / "traces.jsonl", [{"text": "a b a b a"}])
    for name in (tmp_path, tmp_path / "tokenizer.json"):  # a model's folder, or the file in it
        assert main(["tune", str(traces), "--tokenizer", str(name)]) == 0
        printed = capsys.readouterr().out
        assert "5 tokens (tokenizer, vocabulary 3)" in printed and "encodes no" not in printed
        assert "\nwarning: 5 tokens, fewer than the 80 nodes of the tree" in printed
    assert load_tokenizer(str(tmp_path)).encode("a \ud83d b") == [0, 2, 1]
    write(traces, [{"tokens": [0, 1] * 40, "text": "a"}])
    assert main(["tune", str(traces), "--tokenizer", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 trace of 1 problem, 80 tokens (token ids, vocabulary 2)" in printed
    assert "\n--tokenizer encodes no trace" in printed and "warning" not in printed
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["tune", str(traces), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 2
    assert "not a tokenizer.json of tokenizers" in capsys.readouterr().err


def test_a_missing_tokenizer_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with pytest.raises(TokenizerError, match=r"mistral-common needs .*\(pip install mistral-comm"):
        load_tokenizer("mistral-common")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"no real traces at {REAL}")
@pytest.mark.parametrize("tokenizer", ["bytes", "mistral-common"])
def test_real_traces(tmp_path: Path, capsys: Any, tokenizer: str) -> None:
    if tokenizer == "mistral-common":
        pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    out = tmp_path / "tree.json"
    assert main(["tune", str(REAL), "--tokenizer", tokenizer, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    rate = float(re.search(r"^80 +([\d.]+)$", printed, re.M)[1])
    assert rate > {"bytes": 4.0, "mistral-common": 2.3}[tokenizer]
    assert DraftTree.load(out).nodes == 80
