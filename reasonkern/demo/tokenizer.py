"""A lossless tokenizer learnt from the traces: bytes, plus the substrings that save most tokens.

The vocabulary always has 32,768 columns. Ids beyond the learnt pieces stay reserved, as in the
padded vocabularies of published models; the loss reads all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

VOCABULARY = 32_768
BYTES = 256
BOS, EOS, PAD = BYTES, BYTES + 1, BYTES + 2
FIRST_PIECE = BYTES + 3
LONGEST = 16  # bytes in a piece
# Digits stay single, so that numbers share their parts.
SPLIT = re.compile(r" ?\d| ?[^\W\d_]+|_+| ?[^\w\s]+|\s+")


def _bytes(text: str) -> bytes:
    # JSON may hold lone surrogates, which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


class Tokenizer:
    """Greedy longest match inside the words and symbols of a text; single bytes as fallback."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        if FIRST_PIECE + len(pieces) > VOCABULARY:
            raise ValueError(f"pieces: at most {VOCABULARY - FIRST_PIECE} fit, got {len(pieces)}")
        self.pieces = list(pieces)
        self._ids = {piece: FIRST_PIECE + index for index, piece in enumerate(pieces)}
        self._known: dict[str, list[int]] = {}

    @classmethod
    def learn(cls, texts: Iterable[str], characters: int = 4_000_000) -> Tokenizer:
        """Rank all substrings of the words by the tokens they save; same texts, same ids."""
        words: Counter[str] = Counter()
        for text in texts:
            words.update(SPLIT.findall(text[:characters]))
            characters -= min(characters, len(text))
        savings: Counter[bytes] = Counter()
        for word, count in words.items():
            data = _bytes(word)[: 4 * LONGEST]
            for start in range(len(data)):
                for end in range(start + 2, min(start + LONGEST, len(data)) + 1):
                    savings[data[start:end]] += count * (end - start - 1)
        ranked = sorted(savings, key=lambda piece: (-savings[piece], piece))
        return cls(ranked[: VOCABULARY - FIRST_PIECE])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; `decode` gives it back exactly."""
        ids: list[int] = []
        for word in SPLIT.findall(text):
            if word not in self._known:
                self._known[word] = self._encode_word(_bytes(word))
            ids += self._known[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The exact text of `ids`; BOS, EOS, PAD and reserved ids stand for no text."""
        return b"".join(map(self._piece, ids)).decode("utf-8", "surrogatepass")

    def _encode_word(self, data: bytes) -> list[int]:
        ids = []
        start = 0
        while start < len(data):
            end = min(start + LONGEST, len(data))
            while end > start + 1 and data[start:end] not in self._ids:
                end -= 1
            ids.append(self._ids.get(data[start:end], data[start]))
            start = end
        return ids

    def _piece(self, token: int) -> bytes:
        if 0 <= token < BYTES:
            return bytes([token])
        index = token - FIRST_PIECE
        return self.pieces[index] if 0 <= index < len(self.pieces) else b""
