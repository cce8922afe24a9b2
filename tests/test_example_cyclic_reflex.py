"""examples/cyclic_reflex.py: the wave and the budget show in what it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

SMALL = ["--steps", "30", "--problems", "2", "--tokens", "100", "--budget", "40"]


def rows(text: str) -> dict[str, list[float]]:
    lines = text.split("correct\n")[1].splitlines()
    found = (line.rsplit(maxsplit=5) for line in lines)
    return {name: [float(x.rstrip("%")) for x in values] for name, *values in found}


def test_the_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import cyclic_reflex

    assert cyclic_reflex.main([*SMALL, "--amplitude", "5"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["plain", "CyclicReflex", "budget 40", "both"]
    for name, (tokens, thinking, above, below, _) in table.items():
        assert tokens <= 100 and thinking <= tokens
        if name in ("CyclicReflex", "both"):
            assert above > 2 * table["plain"][2] and above > 2 * below
        if name in ("budget 40", "both"):
            assert thinking <= 40 + 1  # the newline of the phrase


def test_a_model_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples import cyclic_reflex

    args = cyclic_reflex.arguments(["--steps", "1"])
    model, tokenizer = cyclic_reflex.train(args)
    tokenizer.add_tokens(["wait", "but", "But", "Alternatively"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}\n"
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # A folder with a Qwen2 is read with Qwen2's splitting of words, which this tokenizer has not.
    monkeypatch.setattr(cyclic_reflex, "AutoTokenizer", type(tokenizer))
    options = ["--model", str(tmp_path), "--prompt", "Start with 4.", "--tokens", "30"]
    capsys.readouterr()
    assert cyclic_reflex.main([*options, "--budget", "10", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "TokenSets(reflect: 5 ids)" in out and "</think>" in out
    assert cyclic_reflex.main([*options, "--samples", "1", "--words", "Wait", "But"]) == 0
    assert "TokenSets(reflect: 2 ids)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^--words: .* one token each, got reflect: 'Hmmmm'$"):
        cyclic_reflex.main([*options, "--words", "Hmmmm"])
    tokenizer.add_tokens([" Hmm"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"\(--variants space also takes .*'Hmm'$"):
        cyclic_reflex.main([*options, "--words", "Hmm"])
    few = ["--samples", "1", "--variants", "space", "--words", "Hmm"]
    assert cyclic_reflex.main([*options, *few]) == 0
    assert "TokenSets(reflect: 1 ids)" in capsys.readouterr().out
    monkeypatch.setattr(cyclic_reflex, "END", "</thought>")
    with pytest.raises(SystemExit, match=r"^--model .*: expected a reasoning model, .*</thought>"):
        cyclic_reflex.main(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((f"{name} 0", f"{name}: expected a finite number > 0, got 0") for name in (
            "--period", "--budget", "--tokens", "--samples", "--problems", "--steps"
        )),
        ("--amplitude nan", "--amplitude: expected a finite number > -inf, got nan"),
        ("--prompt 2+2?", "--prompt: expected with --model"),
    ],
)  # fmt: skip
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import cyclic_reflex

    with pytest.raises(SystemExit):
        cyclic_reflex.arguments(options.split())
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there() -> None:
    from examples import cyclic_reflex

    with pytest.raises(SystemExit, match=r"^--model nope: expected a folder .* local cache$"):
        cyclic_reflex.main(["--model", "nope"])
