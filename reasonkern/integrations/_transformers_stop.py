"""Where a request ends other than by an id: strings in its text, transformers' criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import _checks


class StopStrings:
    """Whether the newest token completes a string in the new text of a request."""

    def __init__(
        self, strings: str | Sequence[str], tokenizer: Any, prompts: list[int], vocab_size: int
    ) -> None:
        given = [strings] if isinstance(strings, str) else strings
        listed = isinstance(given, Iterable)
        if not listed or not given or not all(isinstance(s, str) and s for s in given):
            _checks.fail("stop_strings", "strings that are not empty", repr(strings))
        self._strings = list(given)
        if not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "__len__")):
            expected = "the model's transformers tokenizer, to find stop_strings"
            _checks.fail("tokenizer", expected, type(tokenizer).__name__)
        if len(tokenizer) > vocab_size:
            expected = f"at most {vocab_size} ids, the columns of the model's logits"
            _checks.fail("tokenizer", expected, f"{len(tokenizer)} (another model's tokenizer?)")
        self._tokenizer, self._prompts = tokenizer, prompts
        # A character may take several tokens, and the first ones of a window may be parts of one.
        self._window = 4 * max(map(len, self._strings)) + 8

    def __call__(self, request: int, text: list[int]) -> bool:
        """Whether the request ends with the last token of `text`, which begins with its prompt."""
        first = max(self._prompts[request], len(text) - self._window)
        # Decoding may drop the space that a list begins with: the one before is decoded along.
        before, tail = (self._decoded(text[first - 1 : end]) for end in (first, len(text)))
        return any(string in tail[len(before) :] for string in self._strings)

    def _decoded(self, ids: list[int]) -> str:
        """What the tokens say, where decoding may otherwise take spaces before punctuation away."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class Criteria:
    """transformers' stopping criteria, one request and one token at a time."""

    def __init__(self, criteria: Sequence[Callable[..., Any]], device: torch.device) -> None:
        for criterion in criteria:
            if type(criterion).__name__ == "ConfidenceCriteria":
                expected = "criteria that ask for no scores"
                _checks.fail("stopping_criteria", expected, type(criterion).__name__)
        self._criteria, self._device = list(criteria), device

    def __call__(self, request: int, text: list[int]) -> bool:
        """Whether one of them ends the request here; it gets no scores."""
        ids = torch.tensor([text], device=self._device)
        return any([bool(torch.as_tensor(c(ids, None)).any()) for c in self._criteria])
