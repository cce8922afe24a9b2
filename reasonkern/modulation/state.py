"""`ModulationState`: the specs and the progress of the requests in flight, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import layout as at
from . import op as _op
from .layout import Storage
from .parts import ID_LIMIT
from .records import pack, start
from .saved import check_saved
from .sets import TokenSets, sets_or_none
from .spec import Modulation


class ModulationState:
    """Slots for requests, each with its `Modulation` and what its tokens have made of it.

    Tensors only, of sizes that never change, so that steps with it can be captured in a CUDA graph:
    `modulate_logits_`, `sample_controlled` and `verify_tree` read it, `commit_` advances it. A slot
    that no request was added to, or whose request was removed, is free: on every device its rows
    are left as they are and its tokens are not counted, as those of padding.

    Args:
        max_requests: number of slots.
        sets: the `TokenSets` that specs name, shared by all slots. None = no specs name one, as
            with `Budget` and `MinThink` alone.
        device: where its tensors live. They are normal ones also where it is made under
            ``torch.inference_mode``.

    Raises:
        ValueError: an argument of another type or out of its range.

    Example:
        >>> import torch, reasonkern as rk
        >>> sets = rk.TokenSets.from_ids({"reflect": [2, 5]})
        >>> state = rk.ModulationState(4, sets)
        >>> state.add(0, rk.Modulation(constant=rk.Constant(-3.0)), prompt_tokens=[1, 7])
        >>> rk.modulate_logits_(torch.zeros(1, 6), state, torch.tensor([0]))
        tensor([[ 0.,  0., -3.,  0.,  0., -3.]])
    """

    def __init__(
        self, max_requests: int, sets: TokenSets | None = None, device: torch.device | str = "cpu"
    ) -> None:
        _checks.check_integer("max_requests", max_requests, 1, (1 << 31) - 1)
        self.max_requests = max_requests = int(max_requests)
        self.sets = sets_or_none(sets)
        self.tensors = _allocate(max_requests, self.sets, _checks.as_device("device", device))
        self._parts, self._ids = [0] * max_requests, [-1] * max_requests
        self._prompts: list[int | None] = [None] * max_requests
        self._refresh()

    # ---- requests

    def add(
        self,
        slot: int,
        spec: Modulation,
        prompt_tokens: Sequence[int] | Tensor,
        generated_tokens: Sequence[int] | Tensor = (),
    ) -> None:
        """Puts a request into a free slot.

        With ``generated_tokens`` a request that was taken out goes on where it was: all but the
        windows of `DeepConf` and `EntropyTrigger`, which begin anew, and a stop that came of them,
        follows from its tokens.

        Args:
            slot: a free one.
            spec: what to do to its logits. An id that the vocabulary lacks is refused only with
                the logits, and those of all requests are: look at ids of strangers beforehand.
            prompt_tokens: ids; only the markers of thinking are looked for.
            generated_tokens: ids generated so far.

        Raises:
            ValueError: the slot is not free, a set has no such name, parts and sets contradict each
                other, or something is no token id.
        """
        self._check_slot(slot, used=False)
        if not isinstance(spec, Modulation):
            _checks.fail("spec", "a Modulation", type(spec).__name__)
        prompt = _as_ids("prompt_tokens", prompt_tokens)
        generated = _as_ids("generated_tokens", generated_tokens)
        record = pack(spec, self.sets)
        record[: at.PROGRESS_WIDTH] = start(spec, prompt)
        record = [int(column) for column in record]  # NumPy's narrow ones, too
        self.tensors.records[slot, : at.ROW_WIDTH].copy_(torch.tensor(record, device="cpu"))
        self._parts[slot], self._ids[slot] = record[at.PARTS], record[at.MAX_ID]
        self._prompts[slot] = len(prompt)
        self._refresh()
        if len(generated):
            self._fold(slot, generated)

    def _fold(self, slot: int, generated: Tensor) -> None:
        device = self.device
        tokens = generated.to(device).unsqueeze(0)
        length = torch.tensor([tokens.shape[1]], device=device)
        where = torch.tensor([slot], device=device)
        torch.ops.reasonkern.commit_(where, tokens, length, None, None, *self.tensors)

    def remove(self, slot: int) -> None:
        """Frees a slot.

        Raises:
            ValueError: it is free already.
        """
        self._check_slot(slot, used=True)
        self.tensors.records[slot, at.PARTS] = 0
        self._parts[slot], self._ids[slot] = 0, -1
        self._refresh()

    def _check_slot(self, slot: int, used: bool) -> None:
        if not _checks.is_integer(slot) or not 0 <= slot < self.max_requests:
            _checks.fail("slot", f"an integer in [0, {self.max_requests})", repr(slot))
        if bool(self._parts[slot]) != used:
            _checks.fail("slot", f"a slot {'in use' if used else 'that is free'}", slot)

    # ---- what the fronts ask

    def _refresh(self) -> None:
        """Sums up the slots on the host: fronts ask without a synchronisation."""
        uses = 0  # self._uses is never half of it: another thread may be at a step
        for parts in self._parts:
            uses |= parts
        self._uses = uses
        self.max_id = max(self.sets.max_id, *self._ids)
        self.tensors.sets[at.LARGEST_ID] = self.max_id
        self.needs_heat, self.needs_dense = self.uses(at.MIN_THINK), self.uses(at.SOFT)
        # All that `modulate_logits_` asks of a state whose kernels check, to be looked up at once.
        self.checked_by_kernel = None
        if self.device.type == "cpu" and _op.has_cpu_kernels():
            self.checked_by_kernel = (*self.tensors, self.needs_heat, self.needs_dense)

    def uses(self, part: int) -> bool:
        """Whether a slot has a part, given as a bit of ``layout``."""
        return bool(self._uses & part)

    @property
    def watches_statistics(self) -> bool:
        """Whether a request has a `DeepConf` or an `EntropyTrigger`, which `commit_` feeds."""
        return self.uses(at.DEEPCONF | at.TRIGGER)

    @property
    def free(self) -> list[int]:
        """Slots without a request, which `add` takes."""
        return [slot for slot, parts in enumerate(self._parts) if not parts]

    def check_texts(self, name: str, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Refuses slots whose prompt and tokens since do not make texts of these lengths.

        A slot of -1 is none, and what the slots of a loaded state have seen is not known. A slot
        that was added without its prompt must have seen less than the text. Waits for the device.

        Raises:
            ValueError: ``name[index]`` of the first such slot.
        """
        counts = self.tensors.progress[:, at.T].tolist()
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if slot < 0 or (prompt := self._prompts[slot]) is None:
                continue
            seen = counts[slot]
            if not (prompt + seen == length if prompt else seen < length):
                expected = f"a slot that has seen the {length} tokens of its prompt and no more"
                got = f"{slot}, which has seen {prompt} + {seen}"
                remedy = "remove and add it for every call, with its prompt without padding"
                _checks.fail(f"{name}[{index}]", expected, f"{got} ({remedy})")

    @property
    def stopped(self) -> Tensor:
        """(max_requests,) bool: requests that `DeepConf` has stopped."""
        records = self.tensors.records
        return (records[:, at.STOPPED] != 0) & (records[:, at.PARTS] != 0)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors.records.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; constant."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    # ---- moving and saving

    def to(self, device: torch.device | str) -> ModulationState:
        """Moves the state to a device; returns it."""
        device = _checks.as_device("device", device)
        with torch.inference_mode(False):
            self.tensors = Storage(*(t.to(device) for t in self.tensors))
        self._refresh()
        return self

    def state_dict(self) -> dict[str, Any]:
        """Settings and tensors (the live ones, as of a module), for ``torch.save``."""
        return {"settings": self._settings(), **self.tensors._asdict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the requests of a state with the same number of slots and the same sets.

        Raises:
            ValueError: other settings; a tensor that is missing, of another shape or dtype, or
                with contents that no state has.
        """
        if not isinstance(state, Mapping):
            _checks.fail("state", "a mapping, as state_dict returns it", type(state).__name__)
        _checks.check_settings(state.get("settings"), self._settings())
        check_saved(state, self.tensors, self.sets)
        for name, tensor in self.tensors._asdict().items():
            tensor.copy_(state[name])
        self._parts, ids = self.tensors.records[:, [at.PARTS, at.MAX_ID]].T.tolist()
        self._ids = [i if parts else -1 for parts, i in zip(self._parts, ids, strict=True)]
        self._prompts = [None] * self.max_requests
        self._refresh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, perhaps on another device, or where other kernels serve its tensors."""
        vars(self).update(state)
        self._refresh()

    def _settings(self) -> dict[str, Any]:
        return {
            "layout": at.LAYOUT, "max_requests": self.max_requests, "sets": dict(self.sets)
        }  # fmt: skip

    def __repr__(self) -> str:
        """Slots, sets and place."""
        used = sum(parts != 0 for parts in self._parts)
        return (
            f"ModulationState({used} of {self.max_requests} slots in use, {self.sets}, "
            f"device='{self.device}')"
        )


@torch.inference_mode(False)  # else they could not be written to after it
def _allocate(slots: int, sets: TokenSets, device: torch.device) -> Storage:
    records = torch.zeros(slots, at.RECORD_WIDTH, dtype=torch.int64, device=device)
    return Storage(records, sets.tensor().to(device))


def _as_ids(name: str, tokens: Sequence[int] | Tensor) -> Tensor:
    """1-dim int64 on the CPU."""
    ids = tokens
    if not isinstance(ids, Tensor):
        try:
            dtype = None if len(ids) else torch.int64
            ids = torch.tensor(ids, dtype=dtype, device="cpu")
        except (RuntimeError, TypeError, ValueError):
            _checks.fail(name, "a sequence of token ids", repr(tokens))
    _checks.check_values(name, ids)
    _checks.check_dtype(name, ids, torch.int64, torch.int32)
    if ids.ndim != 1:
        _checks.fail(name, "one dimension", tuple(ids.shape))
    ids = ids.to("cpu", torch.int64).contiguous()
    _checks.check_range(name, ids, 0, ID_LIMIT)
    return ids
