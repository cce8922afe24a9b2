"""Token sets: ids of a tokenizer's pieces by name, and how the operators are given them."""

from __future__ import annotations

from typing import Any

import pytest
from modulation_cases import BYTE_LEVEL, SENTENCES, Vocabulary

import reasonkern as rk
from reasonkern.modulation import layout as at
from reasonkern.modulation.sets import _BYTES


def test_ids_are_sorted_and_given_once():
    sets = rk.TokenSets.from_ids({"a": [5, 2, 5], "b": {7}})
    assert dict(sets) == {"a": (2, 5), "b": (7,)} and sets.max_id == 7
    assert repr(sets) == "TokenSets(a: 2 ids, b: 1 ids)"
    packed = rk.TokenSets.from_ids({"a": [5, 2], "b": [5, 9]}).tensor()
    assert packed[: at.LARGEST_ID + 1].tolist() == [0, 2] + [4] * (at.MAX_SETS - 1) + [9]
    storage = at.Storage(packed, packed)
    assert (storage.set_ids.tolist(), storage.set_member.tolist()) == ([2, 5, 5, 9], [1, 3, 3, 2])


def test_an_id_may_be_in_every_set():
    """The last set's bit is the sign of an entry."""
    names = [f"set {s}" for s in range(at.MAX_SETS)]
    largest = (1 << 31) - 1
    storage = at.Storage(None, rk.TokenSets.from_ids(dict.fromkeys(names, [largest])).tensor())
    assert storage.sets[at.LARGEST_ID] == largest and (storage.set_ids == largest).all()
    assert (storage.set_member == (1 << at.MAX_SETS) - 1).all()


def test_added_pieces_are_text_as_they_are():
    """Not bytes, nor a space at the character that stands for one elsewhere (DeepSeek's ends)."""

    class Added(Vocabulary):
        def get_added_vocab(self) -> dict[str, int]:
            return {piece: token for piece, token in self.get_vocab().items() if piece[0] == "<"}

    words = ["<｜end▁of▁sentence｜>", "<«»>", "wait"]
    for first in ("Ġwait", "▁wait"):
        sets = rk.TokenSets.from_tokenizer(Added(first, *words), {"s": words})
        assert sets["s"] == (101, 102, 103)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCES])
def test_pieces_by_variant(tokenizer):
    """What is written with Ġ or ▁ is a space; other than as spaces they are not special."""
    vocab = tokenizer.get_vocab()

    def names(variants: str, *strings: str, **more: Any) -> set[str]:
        sets = rk.TokenSets.from_tokenizer(
            tokenizer, {"reflect": strings}, variants=variants, **more
        )
        return {piece for piece, i in vocab.items() if i in sets["reflect"]}

    space = "Ġ" if tokenizer is BYTE_LEVEL else "▁"
    assert names("exact", "wait", "Wait") == {"wait", "Wait"}
    assert names("exact", " wait") == {space + "wait"}
    assert names("space", "wait") == {"wait", space + "wait"}
    everything = {piece for piece in vocab if "wait" in piece.lower()}
    assert names("all", "wait") == everything and len(everything) >= 4
    assert names("all", "wait", exclude=["kuwait"]) == everything - {space + "Kuwait"}
    assert names("exact", " café") in ({"ĠcafÃ©"}, {"▁café"})


def test_a_letter_of_maltese_makes_no_byte_level():
    """Large vocabularies of SentencePiece hold it, byte-level ones an added token with ▁."""
    for space in ("▁", " "):
        sentences = Vocabulary(f"{space}o", f"{space}café", "é", "Ġgan", "Ġ", f"{space}Ġ")
        for variants, ids in (("exact", (102,)), ("all", (101, 102))):
            sets = rk.TokenSets.from_tokenizer(sentences, {"a": ["é"]}, variants=variants)
            assert sets["a"] == ids
    byte_level = Vocabulary("Ġo", "ĠcafÃ©", "Ã©", "▁of▁sentence", "Ã")  # the last: half a letter
    assert rk.TokenSets.from_tokenizer(byte_level, {"a": ["é"]}, variants="all")["a"] == (101, 102)
    neither = Vocabulary("wait", "é")  # no piece has a space: text as it is
    assert rk.TokenSets.from_tokenizer(neither, {"a": ["é"]})["a"] == (101,)


def test_every_byte_has_its_character():
    """GPT-2's table, as it publishes it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    others = [byte for byte in range(256) if byte not in printable]
    expected = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    assert expected == _BYTES


def test_strings_of_several_tokens_are_named():
    with pytest.raises(ValueError, match="one token each, got a: 'Hold on', b: 'hm'"):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": ["wait", "Hold on"], "b": ["hm"]})
    with pytest.raises(ValueError, match="one token each, got a: 'kuwait'"):
        rk.TokenSets.from_tokenizer(
            BYTE_LEVEL, {"a": ["kuwait"]}, variants="all", exclude=["Kuwait"]
        )


@pytest.mark.parametrize("strings", ["wait", ["wait", 3], 3])
def test_a_set_is_a_sequence_of_strings(strings):
    """The letters of "wait" may be pieces of their own."""
    with pytest.raises(
        ValueError, match=r"sets\['reflect'\]: expected a sequence of strings, got "
    ):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"reflect": strings})
    with pytest.raises(ValueError, match="exclude: expected a sequence of strings, got "):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"reflect": ["wait"]}, exclude=strings)
    with pytest.raises(ValueError, match="sets: expected a mapping from names to strings"):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, ["wait"])  # type: ignore[arg-type]


@pytest.mark.peers
def test_the_published_set_of_a_real_tokenizer():
    """`convert_tokens_to_ids`, the published look-up, on a byte-level tokenizer trained here."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["wait", "Wait", "but", "But", "Alternatively"]
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([f"{w} {w}" for w in words for _ in range(50)], 600, min_frequency=2)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer)
    sets = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": words})
    assert set(sets["reflect"]) == set(tokenizer.convert_tokens_to_ids(words))
    spaced = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": words}, variants="space")
    texts = {tokenizer.decode([i]) for i in spaced["reflect"]}
    assert texts == {*words, *(" " + w for w in words)}
