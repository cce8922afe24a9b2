"""`TokenSets`: named sets of token ids, shared by all requests of a state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .layout import LARGEST_ID, MAX_SETS, SET_BITS, SET_ENTRIES
from .parts import checked_id

VARIANTS = ("exact", "space", "all")


class TokenSets(Mapping[str, tuple[int, ...]]):
    """Named sets of token ids: a mapping from names to ascending ids.

    Built by `from_ids` or `from_tokenizer`. ``sets["reflect"]`` are the ids of a set, ``len(sets)``
    is the number of sets and ``max_id`` the largest id of all of them, -1 without a set.
    """

    def __init__(self, sets: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(sets, Mapping):
            _checks.fail("sets", "a mapping from names to token ids", type(sets).__name__)
        if len(sets) > MAX_SETS:
            _checks.fail("sets", f"at most {MAX_SETS} of them", len(sets))
        self._sets = {name: _checked_set(name, ids) for name, ids in sets.items()}

    @classmethod
    def from_ids(cls, sets: Mapping[str, Iterable[int]]) -> TokenSets:
        """Sets of ids; an id that is given twice is in the set once.

        Args:
            sets: ids by name, at most 32 sets, none of them empty.

        Raises:
            ValueError: an empty set, too many of them, or something that is not a token id.

        Example:
            >>> import reasonkern as rk
            >>> rk.TokenSets.from_ids({"reflect": [14190, 3983, 14190]})["reflect"]
            (3983, 14190)
        """
        return cls(sets)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        sets: Mapping[str, Sequence[str]],
        *,
        variants: str = "exact",
        exclude: Sequence[str] = (),
    ) -> TokenSets:
        """Sets of the vocabulary's pieces that are, or contain, given strings.

        A string that is several tokens is refused: a bias on some of its pieces is a bias on other
        words, and the id that look-ups give for unknown pieces is a bias on whatever has that id.

        Args:
            tokenizer: has ``get_vocab()``, from pieces to ids: a tokenizer of transformers or of
                tokenizers. Pieces that its ``get_added_vocab()`` names, if it has one, are text as
                they are.
            sets: strings by name.
            variants: ``"exact"``: the piece that is the string, without a space before it, as
                CyclicReflex publishes its set; ``"space"``: also the piece with a space before it;
                ``"all"``: every piece that contains the string, whatever its case, as NoWait's
                keywords are expanded.
            exclude: words; pieces that contain one of them, whatever their case, stay out of the
                sets (ohio, button, … of NoWait's keywords oh, but).

        Raises:
            ValueError: a string without a piece, all such strings being named; no sequence of
                strings.
        """
        _checks.check_choice("variants", variants, VARIANTS)
        if not hasattr(tokenizer, "get_vocab"):
            _checks.fail("tokenizer", "an object with get_vocab()", type(tokenizer).__name__)
        if not isinstance(sets, Mapping):
            _checks.fail("sets", "a mapping from names to strings", type(sets).__name__)
        added: Mapping[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
        vocab = _by_text(tokenizer.get_vocab(), added)
        unwanted = [word.lower() for word in _checked_strings("exclude", exclude)]
        found: dict[str, set[int]] = {name: set() for name in sets}
        missing, spaced = [], False
        for name, strings in sets.items():
            for string in _checked_strings(f"sets[{name!r}]", strings):
                texts = _matches(vocab, string, variants)
                texts = [t for t in texts if not any(w in t.lower() for w in unwanted)]
                found[name].update(i for text in texts for i in vocab[text])
                if not texts:
                    missing.append(f"{name}: {string!r}")
                    spaced |= " " + string in vocab
        if missing:
            expected = "strings that are one token each" + (
                ' (variants="space" also takes those with a space before)' if spaced else ""
            )
            _checks.fail("sets", expected, ", ".join(missing))
        return cls(found)

    def tensor(self) -> Tensor:
        """All sets as in ``layout.Storage``, on the CPU."""
        bounds: list[int] = [0]
        ids: list[int] = []
        bits: dict[int, int] = {}
        for s, own in enumerate(self._sets.values()):
            ids += own
            bounds.append(len(ids))
            bits |= {i: bits.get(i, 0) | 1 << s for i in own}
        packed = torch.zeros(SET_ENTRIES + len(ids), dtype=torch.int64, device="cpu")
        packed[:LARGEST_ID] = len(ids)
        packed[: len(bounds)] = torch.tensor(bounds, device="cpu")
        packed[LARGEST_ID] = self.max_id
        entries = torch.tensor([ids, [bits[i] for i in ids]], dtype=torch.int64, device="cpu")
        packed[SET_ENTRIES:] = entries[0] | entries[1] << SET_BITS
        return packed

    def index(self, name: str) -> int:
        """The number of a set.

        Raises:
            ValueError: there is no such set.
        """
        check_set("set", name, self)
        return list(self._sets).index(name)

    @property
    def max_id(self) -> int:
        """The largest id of all sets; -1 without a set."""
        return max((own[-1] for own in self._sets.values()), default=-1)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The ids of a set, ascending."""
        return self._sets[name]

    def __iter__(self) -> Iterator[str]:
        """Names in order of their numbers."""
        return iter(self._sets)

    def __len__(self) -> int:
        """Number of sets."""
        return len(self._sets)

    def __repr__(self) -> str:
        """Names and sizes."""
        sizes = ", ".join(f"{name}: {len(ids)} ids" for name, ids in self._sets.items())
        return f"TokenSets({sizes})"


def sets_or_none(sets: TokenSets | None) -> TokenSets:
    """What an argument that may be None stands for."""
    if sets is not None and not isinstance(sets, TokenSets):
        _checks.fail("sets", "a TokenSets or None", type(sets).__name__)
    return TokenSets({}) if sets is None else sets


def check_set(name: str, value: object, sets: TokenSets) -> None:
    """The value is the name of one of the sets."""
    if not sets:
        cure = f"sets=TokenSets.from_ids({{{value!r}: ids}})"
        _checks.fail(name, f"a TokenSets that has it ({cure})", "no sets")
    _checks.check_choice(name, value, sets)


def _checked_set(name: object, ids: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(name, str):
        _checks.fail("sets", "names that are strings", repr(name))
    if isinstance(ids, str):
        _checks.fail(f"sets[{name!r}]", "token ids; strings go to from_tokenizer", repr(ids))
    if not isinstance(ids, Iterable):
        _checks.fail(f"sets[{name!r}]", "a sequence of token ids", repr(ids))
    checked = {checked_id(f"sets[{name!r}]", i) for i in ids}
    if not checked:
        _checks.fail(f"sets[{name!r}]", "at least one id", 0)
    return tuple(sorted(checked))


def _checked_strings(name: str, strings: Sequence[str]) -> Sequence[str]:
    """A string is a sequence of strings, too: of its letters."""
    listed = isinstance(strings, Sequence) and not isinstance(strings, str)
    if not listed or not all(isinstance(string, str) for string in strings):
        _checks.fail(name, "a sequence of strings", repr(strings))
    return strings


def _matches(vocab: Mapping[str, list[int]], string: str, variants: str) -> list[str]:
    if not string.strip():
        _checks.fail("sets", "strings with more than spaces", repr(string))
    if variants == "all":
        return [text for text in vocab if string.lower() in text.lower()]
    wanted = [string] if variants == "exact" else [string, " " + string]
    return [text for text in wanted if text in vocab]


# Byte-level vocabularies write bytes as printable characters: those that are one already stand for
# themselves, the others follow from U+0100 on; a space is U+0120.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in set(_PRINTABLE)]
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


def _by_text(vocab: Mapping[str, int], added: Mapping[str, int]) -> dict[str, list[int]]:
    """Ids by the text of their piece, its leading space included; added pieces are text as is."""
    # Most of them: a few pieces of the other kind begin with a letter of Maltese, or were added.
    starts = Counter(piece[:1] for piece in vocab)
    byte_level = starts["\u0120"] > starts["\u2581"] + starts[" "]
    out: dict[str, list[int]] = {}
    for piece, token in vocab.items():
        if piece in added:
            text = piece
        elif byte_level and all(c in _BYTES for c in piece):
            text = bytes(_BYTES[c] for c in piece).decode("utf-8", errors="replace")
        else:
            text = piece.replace("\u2581", " ")
        out.setdefault(text, []).append(int(token))
    return out
