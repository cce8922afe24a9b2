"""Generation with speculation, for any causal model: see README.md in this folder.

`reasonkern.integrations.transformers` is this loop around a transformers model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from ..modulation import ModulationState
from ..speculation import DraftTree, NgramTable, request_seeds, table_inputs
from . import prompts as _prompts
from .cache import SlotCache
from .drafts import Drafter, Proposal, chain_proposal
from .loop import Emit, Request, Run, Sampling, Stop
from .passes import Model, Pass
from .statistics import Statistics

__all__ = [
    "Drafter",
    "Generated",
    "Model",
    "Pass",
    "Proposal",
    "SlotCache",
    "Statistics",
    "chain_proposal",
    "generate",
]


@documented
class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        texts: (prompts x trajectories) new tokens of each request, the end-of-sequence id included.
        statistics: of this call, or the given one with it added.
    """

    texts: list[list[int]]
    statistics: Statistics


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float | Tensor,
    max_new_tokens: int,
    table: NgramTable | None = None,
    tree: DraftTree | str = "auto",
    drafter: Drafter | None = None,
    control: tuple[ModulationState, Tensor] | None = None,
    seed: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
    emit: Emit | None = None,
    num_trajectories: int = 1,
    scope: int | Tensor | None = None,
    statistics: Statistics | None = None,
) -> Generated:
    """Decodes prompts; the text is that of plain seeded sampling, whatever drafts.

    Request b * num_trajectories + j is trajectory j of prompt b. Token n of a text, counted with
    its prompt, is what `reasonkern.sample` draws from the model's logits at position n with the
    request's seed: it depends on no other request, no table and no tree, as long as the logits do
    not.

    Args:
        model: see `Model`.
        prompts: token ids of each prompt, at least one.
        temperature: as in `reasonkern.sample`, a number or one per request; 0 = greedy.
        max_new_tokens: at most so many per request, at least 1.
        table: learns from all logits on the way and drafts. None = no table.
        tree: the `reasonkern.DraftTree` to fill from the table, or "auto": of 1, 2, 4, 8, 16, 32 or
            80 nodes the number with the most expected tokens per second, by the times of the steps
            so far with the same model and batch size (in powers of 2); 1 is plain decoding.
        drafter: a function that proposes in the table's place, see `Drafter`. With neither table
            nor drafter this is plain seeded decoding. None = no drafter.
        control: a `reasonkern.ModulationState` and the (requests,) int64 slots of the requests in
            it, -1 = no control: a slot for each, trajectories of a prompt included, put there with
            its prompt. Afterwards a slot has seen the text of its request, what a stop cut off
            included, and serves that text alone: ``remove`` and ``add`` it for another call. Drafts
            and tables do not change what it does. None = no control.
        seed: of the run, from which those of the requests are hashed
            (`reasonkern.request_seeds`), or (requests,) int64 ones of the requests. The same one, 0
            as here, gives the same text in every call: torch's generator is not used.
        top_k: as in `reasonkern.sample`. None = off.
        top_p: as in `reasonkern.sample`. None = off.
        min_p: as in `reasonkern.sample`. None = off.
        eos: ids that end a request, at most 64.
        stop: stop(request, text) after every token, text with the prompt; True ends the request
            with this token. None = never.
        emit: emit(request, tokens) after every step of a request. None = nobody listens.
        num_trajectories: requests per prompt.
        scope: of the table, a number or one per request. None = one scope per distinct prompt,
            the same in every call.
        statistics: to add this call's to. None = new ones.

    Raises:
        ValueError: an empty prompt, an id the model has no row for, a table of a smaller vocabulary
            or on another device, a tree without a table, both a table and a drafter, a slot of
            ``control`` that is free, given twice or has seen a text of another length, an option
            out of its range.
        RuntimeError: the model's logits have no finite value.
    """
    _checks.check_integer("max_new_tokens", max_new_tokens, 1)
    _checks.check_integer("num_trajectories", num_trajectories, 1)
    max_new_tokens = int(max_new_tokens)  # sums of NumPy's may wrap
    _check_model(model)
    _check_prompts(prompts, model.vocab_size)
    for name, function in (("stop", stop), ("emit", emit)):
        if not (function is None or callable(function)):
            _checks.fail(name, "a function or None", repr(function))
    if not (statistics is None or isinstance(statistics, Statistics)):
        _checks.fail("statistics", "a Statistics or None", type(statistics).__name__)
    _checks.check_ids("eos", eos, 1 << 31)  # of the model or not: an id that never comes is legal
    shape = _check_drafts(model, table, tree, drafter, scope)
    every = [list(prompt) for prompt in prompts for _ in range(num_trajectories)]
    if temperature is None:  # other options are off with None
        _checks.fail("temperature", "a number or one per request, 0 = greedy", None)
    seeds = seed if isinstance(seed, Tensor) and seed.ndim else request_seeds(seed, len(every))
    device = model.device
    sampling = Sampling.of(
        len(every), device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        seed=_checks.check_values("seed", seeds).to(device),
    )  # fmt: skip
    requests = [
        Request(index, text, len(text), len(text) + max_new_tokens, len(text) - 1)
        for index, text in enumerate(every)
    ]
    statistics = Statistics() if statistics is None else statistics
    with torch.no_grad():
        Run(
            model, list(requests), sampling, table=table,
            scope=_scopes(scope, table, every, device), tree=shape, drafter=drafter,
            control=_control(control, every, device), eos=eos, stop=stop, emit=emit,
            statistics=statistics,
        ).run()  # fmt: skip
    return Generated([r.text[r.prompt :] for r in requests], statistics)


def _check_model(model: Model) -> None:
    if isinstance(model, type) or not callable(model):
        expected = "a Model: an object that can be called, with vocab_size, device and timings"
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        _checks.fail("model", expected, got)
    for name, kind in (("vocab_size", int), ("device", torch.device), ("timings", dict)):
        given = getattr(model, name, None)
        if not isinstance(given, kind):
            word = "torch.device" if kind is torch.device else kind.__name__
            _checks.fail(f"model.{name}", f"{'an' if kind is int else 'a'} {word}", repr(given))


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        expected = "a sequence of prompts, each a sequence of ids (ids.tolist() of a tensor)"
        _checks.fail("prompts", expected, type(prompts).__name__)
    if not prompts:
        _checks.fail("prompts", "at least one prompt", "none")
    origin = ", the model's vocabulary (another tokenizer's ids?)"
    for index, prompt in enumerate(prompts):
        _checks.check_ids(f"prompt {index}", prompt, vocab_size, origin)
        if not prompt:
            _checks.fail(f"prompt {index}", "at least one token", "none")


def _check_drafts(
    model: Model, table: NgramTable | None, tree: DraftTree | str, drafter: Drafter | None,
    scope: int | Tensor | None,
) -> DraftTree | None:  # fmt: skip
    """The tree; None = "auto"."""
    if not isinstance(tree, DraftTree):
        if tree != "auto":
            _checks.fail("tree", 'a DraftTree (DraftTree.load reads one) or "auto"', repr(tree))
    elif table is None:
        _checks.fail("tree", 'a table to fill it from, or "auto"', "no table")
    if not (drafter is None or callable(drafter)):
        _checks.fail("drafter", "a function of requests and texts", repr(drafter))
    if table is None:
        if scope is not None:
            _checks.fail("scope", "None without a table", scope)
        return None
    if not isinstance(table, NgramTable):
        _checks.fail("table", "an NgramTable", type(table).__name__)
    if drafter is not None:
        _checks.fail("drafter", "None with a table: one of them drafts", "both")
    if table.vocab_size < model.vocab_size:
        expected = f"vocab_size >= {model.vocab_size}, the columns of the model's logits"
        _checks.fail("table", expected, table.vocab_size)
    if table.device != model.device:
        expected = f"the model's device, {model.device} (table.to(…) moves it)"
        _checks.fail("table", expected, table.device)
    return None if isinstance(tree, str) else tree


def _control(
    control: object, texts: list[list[int]], device: torch.device
) -> tuple[ModulationState, Tensor] | None:
    if control is None:
        return None
    if not isinstance(control, tuple) or len(control) != 2:
        _checks.fail("control", "a tuple (ModulationState, slot)", type(control).__name__)
    state, slot = control
    if not isinstance(state, ModulationState):
        _checks.fail("control[0]", "a ModulationState", type(state).__name__)
    _checks.check_shape("control[1]", slot, (len(texts),), "(requests,)")
    _checks.check_dtype("control[1]", slot, torch.int64)
    if {state.device, slot.device} != {device}:
        expected = f"on the model's device, {device} (state.to(…) moves it)"
        _checks.fail("control", expected, f"{state.device} and {slot.device}")
    free, taken = set(state.free), set()
    for index, one in enumerate(slot.tolist()):
        if not -1 <= one < state.max_requests or one in free:
            got = f"{one}, which is free" if one in free else one
            _checks.fail(f"control[1][{index}]", "-1 or a slot in use", got)
        if one in taken:
            _checks.fail(f"control[1][{index}]", "a slot of its own", f"{one}, given before")
        taken |= {one} - {-1}
    state.check_texts("control[1]", slot.tolist(), [len(text) for text in texts])
    return state, slot.contiguous()


def _scopes(
    scope: int | Tensor | None, table: NgramTable | None, prompts: list[list[int]],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """(R,) int64."""
    if table is None:
        return torch.zeros(len(prompts), dtype=torch.int64, device=device)
    if scope is None:
        return torch.tensor(_prompts.scopes_of(prompts, table), device=device)
    rows = table_inputs.scopes(table, scope, len(prompts))
    assert rows is not None
    _checks.check_range("scope", rows, 0, table.max_scopes)
    return rows
