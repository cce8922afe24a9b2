"""A transformers `LogitsProcessor` that controls reflection and thinking, for `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks
from ..modulation import Modulation, ModulationState, TokenSets, commit_, modulate_logits_
from ..modulation.records import check_with_sets
from ..modulation.sets import sets_or_none
from ._peer import import_peer
from ._request import check_windows

TESTED = "5.24"
LogitsProcessor: type = import_peer("transformers", TESTED).LogitsProcessor


def _checked_specs(specs: Any) -> Sequence[Modulation | None]:
    listed = isinstance(specs, Sequence) and not isinstance(specs, str)
    if not listed or not all(one is None or isinstance(one, Modulation) for one in specs):
        _checks.fail("spec", "a Modulation, or a sequence of them and of None", repr(specs))
    return cast(Sequence[Modulation | None], specs)


class ModulationLogitsProcessor(LogitsProcessor):
    """Applies a `Modulation` to each sequence of one ``generate`` call.

    ::

        control = ModulationLogitsProcessor(spec, sets)
        model.generate(**inputs, logits_processor=[control])

    It runs after penalties and before temperature, where transformers calls a user's processors,
    and leaves ``output_logits`` as they were. What was generated is found from ``input_ids``: the
    tokens after the ones already folded, or everything anew where a sequence is no longer the one
    it was (beam search, rejected candidates of assisted decoding). To notice that, a call compares
    all ids: like folding anew, it takes time in proportion to the length.

    Make one per ``generate``: another call's sequences, the next turn of a chat among them, are
    refused. Whatever could be the next step of the same call is taken for it: the text so far, or
    it and one token; for a single sequence also a prefix of that text that holds the prompt, its
    last token replaced or not (assisted decoding takes candidates back).

    Args:
        spec: a `Modulation` for all sequences, or one for each; None leaves a sequence alone.
        sets: the `TokenSets` that they name. None = they name none.
        temperature: the one given to ``generate``, which `MinThink` needs; 0 for greedy decoding.
            None = no `MinThink`.
        prompt_length: tokens before the first generated one. None = those of the first call.

    Raises:
        ValueError: another type; a spec with `DeepConf` or `EntropyTrigger`, which need
            `sample_controlled`, or that contradicts the sets; in a call: another number of
            sequences than of specs, or sequences that the call before them cannot have led to.
    """

    # A continuous batch reorders rows without saying which request they are.
    supports_continuous_batching = False

    def __init__(
        self,
        spec: Modulation | Sequence[Modulation | None],
        sets: TokenSets | None = None,
        *,
        temperature: float | None = None,
        prompt_length: int | None = None,
    ) -> None:
        if temperature is not None:
            _checks.check_number("temperature", temperature, 0.0)
        if prompt_length is not None:
            _checks.check_integer("prompt_length", prompt_length, 0, or_none=" or None")
        self.spec, self.sets = spec, sets_or_none(sets)
        for one in [spec] if isinstance(spec, Modulation) else _checked_specs(spec):
            if one is not None:
                check_windows(one)
                check_with_sets(one, self.sets)
        self.temperature, self.prompt_length = temperature, prompt_length
        self.state: ModulationState | None = None
        self.folded = torch.empty(0, 0, dtype=torch.int64)  # (B, T): what the state stands for

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) and (B, V) → the modulated (B, V), a new tensor."""
        state = self._advance(input_ids)
        slot = torch.arange(len(scores), device=scores.device)
        out: Tensor = scores.clone()
        modulate_logits_(
            out, state, slot, temperature=self.temperature, allow_dense=state.needs_dense
        )
        return out

    def _advance(self, ids: Tensor) -> ModulationState:
        """The state after the tokens of `ids`."""
        if self.prompt_length is None:
            self.prompt_length = ids.shape[1]
        new = ids.shape[1] - self.folded.shape[1]
        if self.state is None:
            if ids.shape[1] < self.prompt_length:
                _checks.fail("input_ids", f"the {self.prompt_length} of the prompt", ids.shape[1])
            self.state = self._fold(ids)
        elif new not in (0, 1) or not torch.equal(ids[:, : ids.shape[1] - new], self.folded):
            self._check_follows(ids)
            self.state = self._fold(ids)
        elif new:
            slot = torch.arange(len(ids), device=ids.device)
            commit_(self.state, slot, ids[:, -1:].contiguous(), torch.ones_like(slot))
        self.folded = ids.clone()  # a loop may write its next ids over these
        return self.state

    def _check_follows(self, ids: Tensor) -> None:
        """One ``generate`` may call with `ids` after what was folded; see the class."""
        assert self.prompt_length is not None
        length, known = ids.shape[1], self.folded.shape[1]
        # Beams: a token more, of any row. A single one: candidates, one of which was another.
        fits = length == known + 1 or (len(ids) == 1 and self.prompt_length <= length <= known)
        if fits:
            prompts, given = (x[:, : self.prompt_length] for x in (self.folded, ids))
            fits = torch.equal(prompts, given)
        if not fits or not _rows(ids[:, :-1]) <= _rows(self.folded[:, : length - 1]):
            expected = (
                f"the {known} tokens of the last call and one more: another generate takes another "
                "ModulationLogitsProcessor, a processor per generate"
            )
            _checks.fail("input_ids", expected, f"other sequences, {tuple(ids.shape)}")

    def _fold(self, ids: Tensor) -> ModulationState:
        """A new state, from the prompt on."""
        specs = [self.spec] * len(ids) if isinstance(self.spec, Modulation) else list(self.spec)
        if len(specs) != len(ids):
            _checks.fail("spec", f"one Modulation, or {len(ids)} for the sequences", len(specs))
        state = ModulationState(len(ids), self.sets, device=ids.device)
        for slot, (spec, tokens) in enumerate(zip(specs, ids.cpu(), strict=True)):
            if spec is not None:
                state.add(slot, spec, *tokens.tensor_split((self.prompt_length,)))
        return state


def _rows(ids: Tensor) -> set[bytes]:
    """What compares sequences with each other, in time proportional to their length."""
    return {row.tobytes() for row in ids.cpu().numpy()}
