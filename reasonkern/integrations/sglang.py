"""SGLang's custom logit processor: reflection and thinking control.

A subclass says which tokens it controls, and a request brings it along with its parameters::

    import reasonkern as rk
    from transformers import AutoTokenizer
    from reasonkern.integrations.sglang import ModulationLogitProcessor

    tokenizer = AutoTokenizer.from_pretrained("MODEL")

    class Control(ModulationLogitProcessor):
        sets = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": ["wait", "Wait", "but", "But"]})
        vocab_size = len(tokenizer)

    spec = rk.Modulation(cyclic=rk.Cyclic(5.0, 1200), think_end=151668)
    client.completions.create(…, extra_body={
        "custom_logit_processor": Control.to_str(), "custom_params": Control.parameters(spec)})

The server needs reasonkern and ``--enable-custom-logit-processor``; the client needs both packages
for ``to_str``, which carries a class of the client's script with it, while one from a module is
looked up by the server in a module of that name. With its overlap scheduling a
processor sees the text without its last token, and counts and phrases come a token late; exact
control needs ``--disable-overlap-schedule``. Speculative decoding gives a processor no draft tokens
(or never calls it): several rows of a request are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from .. import _checks
from ..modulation import Modulation, ModulationState, TokenSets, commit_, modulate_logits_
from ..modulation.parts import ID_LIMIT
from ._peer import import_peer, require_arguments
from ._request import NAME, check_request, controlled_tokens, modulation_of, request_parameters

__all__ = ["ModulationLogitProcessor", "request_parameters"]

TESTED = "0.5"
_Base: Any = import_peer("sglang.srt.sampling.custom_logit_processor", TESTED).CustomLogitProcessor
require_arguments("sglang", TESTED, _Base.__call__, "logits", "custom_param_list")


class ModulationLogitProcessor(_Base):
    """Applies each request's `Modulation`; a subclass gives ``vocab_size`` and the named ``sets``.

    SGLang makes instances at will, so what a request has generated is kept by class and device, for
    as long as SGLang keeps the request, for at most ``max_requests`` at a time; a class without
    requests takes no memory of the device.
    """

    sets: ClassVar[TokenSets | None] = None
    vocab_size: ClassVar[int | None] = None
    max_requests: ClassVar[int] = 1024

    @classmethod
    def parameters(cls, spec: Modulation) -> dict[str, str]:
        """`request_parameters`, checked by the client; the server would fail in a step.

        Raises:
            ValueError: what `request_parameters` refuses, an unknown set, an id outside the
                vocabulary.
        """
        sent = request_parameters(spec)
        check_request(spec, *controlled_tokens(cls))
        return sent

    def __call__(
        self, logits: Tensor, custom_param_list: Sequence[dict[str, Any] | None] | None = None
    ) -> Tensor:
        """(R, V) rows, one per request, in place; a request without a `Modulation` is left alone.

        Raises:
            ValueError: no vocabulary, a `Modulation` that is refused, several rows of a request, or
                more requests than ``max_requests``.
        """
        given = [parameters or {} for parameters in custom_param_list or ()]
        requests = [_owner(parameters.get("__req__")) for parameters in given]
        known = {id(request) for request in requests if request is not None}
        if len(given) != len(logits) or len(known) < len(requests) - requests.count(None):
            expected = "one row per request: a custom processor is given no draft tokens"
            _checks.fail("logits", expected, f"{len(logits)} rows of {len(known)} requests")
        if all(parameters.get(NAME) is None for parameters in given):
            return logits
        rows = _Rows.of(type(self), logits.device)
        slots = rows.advance(requests, given)
        heat = [1.0 if s < 0 else _temperature(r) for r, s in zip(requests, slots, strict=True)]
        slot = torch.tensor(slots, device=logits.device)
        temperature = torch.tensor(heat, device=logits.device)
        modulate_logits_(
            logits, rows.state, slot, temperature=temperature, allow_dense=rows.state.needs_dense
        )
        return logits


class _Rows:
    """The requests that are being generated for, of one class on one device.

    They keep it: SGLang keeps every class that it was ever sent.
    """

    _all: ClassVar[WeakValueDictionary[tuple[type, torch.device], _Rows]] = WeakValueDictionary()

    def __init__(self, kind: type[ModulationLogitProcessor], device: torch.device) -> None:
        self.sets, self.vocab_size = controlled_tokens(kind)
        self.state = ModulationState(kind.max_requests, self.sets, device=device)
        self.free = list(range(kind.max_requests))
        self.slots: dict[int, int] = {}  # by id of the request
        self.folded: dict[int, int] = {}  # output tokens, by slot
        self.gone: list[int] = []  # ids of requests that SGLang has dropped

    @classmethod
    def of(cls, kind: type[ModulationLogitProcessor], device: torch.device) -> _Rows:
        rows = cls._all.get((kind, device))
        if rows is None:
            rows = cls._all[kind, device] = cls(kind, device)
        return rows

    def advance(self, requests: Sequence[Any], given: Sequence[dict[str, Any]]) -> list[int]:
        """The slots of the requests, with everything folded that they have generated."""
        while self.gone:  # before their ids are looked up: a new request may have the same
            slot = self.slots.pop(self.gone.pop())
            self.state.remove(slot)
            self.free.append(slot)
        slots = [self._slot(r, parameters) for r, parameters in zip(requests, given, strict=True)]
        new = {
            slot: list(request.output_ids[self.folded[slot] :])
            for request, slot in zip(requests, slots, strict=True)
            if slot >= 0
        }
        self._commit({slot: tokens for slot, tokens in new.items() if tokens})
        return slots

    def _slot(self, request: Any, parameters: dict[str, Any]) -> int:
        """-1 for a request without a `Modulation`; a new one is given a slot."""
        slot = self.slots.get(id(request))
        # SGLang may throw away what a request has generated and begin anew (one of embeddings that
        # it retracts, a prefill that it repeats).
        if slot is not None and len(request.output_ids) >= self.folded[slot]:
            return slot
        spec = modulation_of(parameters)
        if spec is None:
            return -1
        check_request(spec, self.sets, self.vocab_size)
        if request is None:
            _checks.fail("custom_params", "SGLang's request beside modulation", None)
        # Images and sounds stand in a prompt as numbers of up to 63 bits: no tokens, no markers.
        prompt = torch.tensor(list(request.origin_input_ids), dtype=torch.int64, device="cpu")
        if slot is not None:
            self.state.remove(slot)
        elif self.free:
            slot = self.free[-1]
        else:
            most = self.state.max_requests
            _checks.fail("max_requests", "more than the requests at a time", most)
        self.state.add(slot, spec, prompt.clamp_max_(ID_LIMIT - 1), request.output_ids)
        if id(request) not in self.slots:  # once there is nothing left to refuse
            self.slots[id(request)] = self.free.pop()
            finalize(request, self._drop, id(request))
        self.folded[slot] = len(request.output_ids)
        return slot

    def _drop(self, request: int) -> None:
        self.gone.append(request)

    def _commit(self, new: dict[int, list[int]]) -> None:
        if not new:
            return
        width, device = max(map(len, new.values())), self.state.device
        padded = [tokens + [-1] * (width - len(tokens)) for tokens in new.values()]
        length = [len(tokens) for tokens in new.values()]
        slot = torch.tensor(list(new), device=device)
        commit_(
            self.state,
            slot,
            torch.tensor(padded, device=device),
            torch.tensor(length, device=device),
        )
        for known, count in zip(new, length, strict=True):
            self.folded[known] += count


def _owner(request: Any) -> Any:
    """The request itself: SGLang hands a weak proxy over, whose end nobody can be told of."""
    return None if request is None else request.__init__.__self__


def _temperature(request: Any) -> float:
    """SGLang writes greedy as temperature 1 and the best token alone."""
    given = request.sampling_params
    return 0.0 if given.top_k == 1 else float(given.temperature)
