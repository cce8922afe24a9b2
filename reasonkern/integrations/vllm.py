"""vLLM's V2 logits processor: reflection and thinking control, exact under speculative decoding.

A module that the server can import says which tokens it controls::

    # my_control.py
    import reasonkern as rk
    from transformers import AutoTokenizer
    from reasonkern.integrations.vllm import ModulationLogitsProcessor

    tokenizer = AutoTokenizer.from_pretrained("MODEL")

    class Control(ModulationLogitsProcessor):
        sets = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": ["wait", "Wait", "but", "But"]})
        vocab_size = len(tokenizer)

vLLM loads it by name::

    PYTHONPATH=. vllm serve MODEL --logits-processors my_control:Control

and a request says what to do with them, in Python or over HTTP::

    spec = rk.Modulation(cyclic=rk.Cyclic(5.0, 1200), think_end=151668)
    SamplingParams(…, extra_args=request_parameters(spec))
    client.completions.create(…, extra_body={"vllm_xargs": request_parameters(spec)})

A client without vLLM writes ``{"modulation": '{"cyclic": {"amplitude": 5, "period": 1200}, …}'}``
itself: the arguments of `reasonkern.Modulation` as JSON. The processor has the interface of the V2
model runner, not that of V1 (``VLLM_USE_V2_MODEL_RUNNER=0``). Not to be installed under the entry
point ``vllm.logits_processors``, which the V1 runner reads too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..modulation import Modulation, ModulationState, TokenSets, commit_, modulate_logits_
from ._peer import import_peer, require_arguments
from ._request import check_request, controlled_tokens, modulation_of, request_parameters

__all__ = ["ModulationLogitsProcessor", "request_parameters"]

TESTED = "0.33"
_interface = import_peer("vllm.v1.worker.gpu.sample.logits_processor", TESTED)
_Base: Any = _interface.LogitsProcessor
require_arguments("vllm", TESTED, _Base.__init__, "vllm_config", "req_states")
require_arguments("vllm", TESTED, _Base.add_request, "req_idx", "sampling_params")
require_arguments("vllm", TESTED, _Base.apply, "logits", "ctx")


class ModulationLogitsProcessor(_Base):
    """Applies each request's `Modulation`; a subclass gives ``vocab_size`` and the named ``sets``.

    A row sees the committed tokens, which vLLM keeps on the device, and the draft tokens before it,
    so a draft row gets the control that it would get without speculation. A step is two launches
    and a gather, without a synchronisation; a request with ``think_start``, or one that comes back
    from preemption, has its tokens read back when it comes in.

    Raises:
        ValueError: no vocabulary, or sets or a vocabulary beyond the model's.
    """

    sets: ClassVar[TokenSets | None] = None
    vocab_size: ClassVar[int | None] = None

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        sets, vocab_size = controlled_tokens(type(self))
        if vocab_size > req_states.vocab_size:
            _checks.fail("vocab_size", f"at most the model's {req_states.vocab_size}", vocab_size)
        slots, device = req_states.max_num_reqs, req_states.device
        speculative = vllm_config.speculative_config
        self.requests = req_states
        self.state = ModulationState(slots, sets, device=device)
        self.controlled = np.zeros(slots, dtype=bool)
        self.used: set[int] = set()  # slots of the state
        self.staged: dict[int, tuple[Modulation | None, float]] = {}
        self.temperature = torch.zeros(slots, device=device)
        # Tokens that the state has seen, the prompt included.
        self.folded = torch.zeros(slots, dtype=torch.int64, device=device)
        drafts = speculative.num_speculative_tokens if speculative else 0
        self.step = torch.arange(1 + drafts, device=device)  # of tokens that a step may commit

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request's `Modulation` before it reaches the model.

        Raises:
            ValueError: no `Modulation`'s arguments, an unknown set, an id outside the vocabulary.
        """
        spec = modulation_of(sampling_params.extra_args)
        if spec is not None:
            check_request(spec, *controlled_tokens(cls))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Notes the request's `Modulation`; its tokens are not on the device yet."""
        spec = modulation_of(sampling_params.extra_args)
        self.staged[req_idx] = spec, sampling_params.temperature
        self.controlled[req_idx] = spec is not None
        return spec is not None

    def apply_staged_writes(self) -> None:
        """Folds the prompts of the requests that came in, and what preempted ones had generated."""
        for slot, (spec, temperature) in self.staged.items():
            if slot in self.used:
                self.state.remove(slot)
                self.used.remove(slot)
            if spec is not None:
                self._add(slot, spec)
                self.temperature[slot] = temperature
        self.staged.clear()

    def _add(self, slot: int, spec: Modulation) -> None:
        prompt = int(self.requests.prompt_len.np[slot])
        length = int(self.requests.prefill_len.np[slot])
        tokens: list[int] = []
        # Reading back waits for the device: only where the tokens say something.
        if spec.think_start is not None or length > prompt:
            tokens = self.requests.all_token_ids.gpu[slot, :length].tolist()
        self.state.add(slot, spec, tokens[:prompt], tokens[prompt:])
        self.used.add(slot)
        self.folded[slot] = length

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """(R, V) rows of the step's requests, in place."""
        if not self.controlled[ctx.idx_mapping_np].any():
            return logits
        self._commit(ctx.idx_mapping.long())
        slot = ctx.expanded_idx_mapping.long()
        modulate_logits_(
            logits, self.state, slot, local_pos=ctx.expanded_local_pos.long(),
            draft_tokens=ctx.input_ids.long(), temperature=self.temperature[slot],
            allow_dense=self.state.needs_dense,
        )  # fmt: skip
        return logits

    def _commit(self, slot: Tensor) -> None:
        """Folds the tokens that were committed since the last step."""
        ids, known = self.requests.all_token_ids.gpu, self.folded[slot]
        new = (self.requests.total_len.gpu[slot] - known).clamp(0, len(self.step))
        place = known.unsqueeze(1) + self.step
        tokens = ids[slot.unsqueeze(1), place.clamp_max(ids.shape[1] - 1)].long()
        commit_(self.state, slot, tokens, new)
        self.folded[slot] = known + new
