"""`modulate_logits_` and `commit_`: checks, then one operator each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _checks
from ..speculation.inputs import LOGITS_DTYPES
from ..speculation.tree import MAX_NODES
from . import layout as at
from .state import ModulationState

_modulate = torch.ops.reasonkern.modulate_logits_.default
# What the overload calls, without a Python frame in between, which costs much when caches are cold.
# Dynamo traces the overload only.
_modulate_now = _modulate._op
_commit = torch.ops.reasonkern.commit_.default

NO_DRAFTS = 0  # local_pos; known by identity: False is refused, and a tensor is not compared


def modulate_logits_(
    logits: Tensor,
    state: ModulationState,
    slot: Tensor,
    local_pos: int | Tensor = NO_DRAFTS,
    draft_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    temperature: float | Tensor | None = None,
    allow_dense: bool = False,
) -> Tensor:
    """Applies each row's controls to its logits, in place, in one launch for the batch.

    To be called after penalties and before temperature, for greedy rows too. A row's controls are
    those of its request after the tokens committed and the draft tokens before the row; nothing but
    the logits is written, unseen by autograd, and what it costs does not depend on the vocabulary.
    For every row, with the progress of its request at t generated tokens::

        if a token v is due (budget spent, middle of a phrase, stopped) and z[v] > -inf:
            z[v] = 3e4; done                       # the other logits must be below 2e4
        for v in the sets of the parts:
            z[v] += sum of the parts' additions    # in double, rounded once to float32 unless
                                                   # the logits are float64
            z[v] = -inf if banned                  # unless nothing finite would be left
        if thinking must go on and z[wait] > -inf:
            z[wait] = T * log(exp(z[wait] / T) + exp(z[think_end] / T))
            z[think_end] = -inf
        z[end] += share * max(0, max(z) - margin - z[end])       # a soft budget

    Of several due tokens only the first counts: that of a stop, of a budget, of a "Wait". Otherwise
    -inf stays -inf and NaN stays NaN.

    Args:
        logits: (R, V) float32, bfloat16, float16 or float64, the last dimension contiguous. Divide
            float16 by the temperature in float32, as `sample` does: 3e4 / 0.4 overflows it.
        state: the `ModulationState`.
        slot: (R,) int64 slot of each row, -1 = padding; with ``parents`` (B,). Rows of free slots
            are left alone, too: a request without controls needs none.
        local_pos: (R,) int64: draft tokens before the row; the rows of a slot follow one another,
            0, 1, 2 …. The integer 0 = no row has any.
        draft_tokens: (R,) int64: token whose output the row is, a draft where local_pos > 0. With
            ``parents`` (B, N). -1 ends the draft. None = no drafts.
        parents: (N,) int32 or int64 parent of each node of a tree, ``parents[0] == -1``, as of
            `DraftTree`: row b·N + i is the model's output after node i of request b. None = chains.
        temperature: of sampling, >= 0, a number or (R,); needed where a request has a `MinThink`.
            None = no request has.
        allow_dense: reads whole rows for requests with a `SoftBudget`, which is refused otherwise.

    Returns:
        ``logits``.

    Raises:
        ValueError: wrong shape, dtype or device; ids of the state that are not below V; a missing
            temperature; a soft budget without ``allow_dense``; on CPU also a slot out of range and
            rows that do not follow one another as local_pos says.
    """
    # The kernel checks its arguments, too, and the checks in Python take longer than it does: they
    # are made only when it objects, to say what is wrong. With cold caches every name that is
    # looked up here counts.
    try:
        ready = state.checked_by_kernel
        if ready is not None:
            records, sets, needs_heat, needs_dense = ready
            heat = None
            if isinstance(temperature, Tensor):
                heat = temperature
            elif temperature is not None:
                _checks.check_number("temperature", temperature, 0)
            if (heat is not None or not needs_heat) and (allow_dense or not needs_dense):
                local = None if local_pos is NO_DRAFTS else local_pos
                call = _modulate if is_dynamo_compiling() else _modulate_now
                call(logits, slot, local, draft_tokens, parents, heat, records, sets, allow_dense)
                return logits
    except (RuntimeError, AttributeError, TypeError):
        pass
    if not isinstance(state, ModulationState):
        _checks.fail("state", "a ModulationState", type(state).__name__)
    rows = _checked(logits, state, slot, local_pos, draft_tokens, parents, temperature, allow_dense)
    _modulate(logits, *rows, *state.tensors, allow_dense)
    return logits


def _checked(
    logits: Tensor, state: ModulationState, slot: Tensor, local_pos: int | Tensor,
    draft_tokens: Tensor | None, parents: Tensor | None, temperature: float | Tensor | None,
    allow_dense: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What the operator takes after the logits."""
    _check_logits(logits, state)
    rows, device = logits.shape[0], state.device
    if parents is None:
        _check("slot", slot, (rows,), "(R,)", device)
        local = _chain(local_pos, draft_tokens, rows, device)
    else:
        local = None
        parents = _tree(local_pos, draft_tokens, parents, slot, rows, device)
    _checks.check_choice("allow_dense", allow_dense, (False, True))
    if state.needs_dense and not allow_dense:
        _checks.fail("allow_dense", "True for requests with a soft budget", allow_dense)
    heat = _temperature(temperature, state, rows)
    if _checks.reads_values(slot):
        _check_values(state, slot, local, parents, heat)
    return slot, local, draft_tokens, parents, heat


def _check_logits(logits: object, state: ModulationState) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        _checks.fail("logits", "a tensor (R, V)", got)
    if logits.dtype not in LOGITS_DTYPES:
        _checks.check_dtype("logits", logits, *LOGITS_DTYPES)
    _checks.check_device("logits", logits, state.tensors.records, "state")
    rows, vocab = logits.shape
    stride, inner = logits.stride()
    if inner != 1 and vocab > 1:
        _checks.fail("logits", "a contiguous last dimension", f"strides {logits.stride()}")
    if stride < vocab and rows > 1:
        _checks.fail("logits", "rows that do not overlap", f"strides {logits.stride()}")
    if state.max_id >= vocab:
        _checks.fail("logits", f"a vocabulary above the state's ids, up to {state.max_id}", vocab)


def _check(
    name: str, x: object, shape: tuple[int, ...], meaning: str, device: torch.device
) -> None:
    """A contiguous int64 tensor; the checks are spelled out only where one fails."""
    if _checks.is_contiguous(x, shape, torch.int64, device):
        return
    x = _checks.check_tensor(name, x)
    _checks.check_dtype(name, x, torch.int64)
    _checks.check_shape(name, x, shape, meaning)
    if x.device != device:
        _checks.fail(name, f"the device of state, {device}", x.device)
    _checks.fail(name, "a contiguous tensor", f"strides {x.stride()}")


def _chain(
    local_pos: int | Tensor, draft_tokens: Tensor | None, rows: int, device: torch.device
) -> Tensor | None:
    if draft_tokens is not None:
        _check("draft_tokens", draft_tokens, (rows,), "(R,)", device)
    if not isinstance(local_pos, Tensor):
        if local_pos != 0 or isinstance(local_pos, bool):
            _checks.fail("local_pos", "0 or a (R,) tensor", repr(local_pos))
        return None
    _check("local_pos", local_pos, (rows,), "(R,)", device)
    if draft_tokens is None:
        _checks.fail("draft_tokens", "a (R,) tensor beside local_pos", None)
    return local_pos


def _tree(
    local_pos: int | Tensor, draft_tokens: Tensor | None, parents: Tensor, slot: Tensor, rows: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    if isinstance(local_pos, Tensor) or local_pos != 0:
        _checks.fail("local_pos", "0 beside parents, which say it", local_pos)
    _checks.check_dtype("parents", parents, torch.int32, torch.int64)
    if parents.ndim != 1 or not 1 <= len(parents) <= MAX_NODES:
        _checks.fail("parents", f"shape (N,) with 1 to {MAX_NODES} nodes", tuple(parents.shape))
    if rows % len(parents):
        _checks.fail("logits", f"B·N rows with N = {len(parents)}", rows)
    batch = rows // len(parents)
    _check("slot", slot, (batch,), "(B,)", device)
    _check("draft_tokens", draft_tokens, (batch, len(parents)), "(B, N)", device)
    return parents.to(device, torch.int32)


def _temperature(
    temperature: float | Tensor | None, state: ModulationState, rows: int
) -> Tensor | None:
    """(R,) float32 where a request needs it."""
    if temperature is None:
        if state.needs_heat:
            _checks.fail("temperature", "a number or (R,) for requests with min_think", None)
        return None
    if isinstance(temperature, Tensor):
        _checks.check_dtype("temperature", temperature, torch.float32, torch.float64)
        _checks.check_device("temperature", temperature, state.tensors.records, "state")
        if temperature.ndim:
            _checks.check_shape("temperature", temperature, (rows,), "(R,)")
        if not state.needs_heat:
            return None
        return temperature.to(torch.float32).expand(rows).contiguous()
    _checks.check_number("temperature", temperature, 0)
    if not state.needs_heat:
        return None
    return torch.full((rows,), temperature, dtype=torch.float32, device=state.device)


def _check_values(
    state: ModulationState, slot: Tensor, local: Tensor | None, parents: Tensor | None,
    temperature: Tensor | None,
) -> None:  # fmt: skip
    _checks.check_range("slot", slot, -1, state.max_requests)
    if temperature is not None:
        right = (temperature >= 0) & temperature.isfinite()
        _checks.check_all("temperature", temperature, right, "finite values >= 0")
    if local is not None:
        follows = slot == slot.roll(1)
        follows[:1] = False
        before = torch.where(follows, local.roll(1), 0)
        right = (slot < 0) | (local == 0) | (local == before + 1)
        expected = "the number of draft tokens before each row, among rows of its slot"
        _checks.check_all("local_pos", local, right, expected)
    if parents is not None:
        node = torch.arange(len(parents), device=parents.device)
        right = torch.where(node == 0, parents == -1, (parents >= 0) & (parents < node))
        _checks.check_all("parents", parents, right, "-1, then the number of an earlier node each")


def commit_(
    state: ModulationState,
    slot: Tensor,
    tokens: Tensor,
    length: Tensor,
    *,
    entropy: Tensor | None = None,
    confidence: Tensor | None = None,
) -> None:
    """Advances requests by the tokens they have emitted: the only thing that does.

    To be called once per step with what sampling or `verify_tree` emitted; drafts that were not
    accepted leave no trace. Never synchronises.

    Args:
        state: the `ModulationState`.
        slot: (B,) int64, no slot twice, -1 = padding. Tokens of free slots are not counted.
        tokens: (B, D + 1) int64 emitted tokens, as of `Verified.tokens`; -1 ends a row.
        length: (B,) int64: how many of them.
        entropy: (B, D + 1) float32 of the row of each token; needed where a request has an
            `EntropyTrigger`. Forced rows and values that are not finite do not count. None = no
            request has.
        confidence: (B, D + 1) float32, likewise for `DeepConf`. None = no request has.

    Raises:
        ValueError: wrong shape, dtype or device; missing statistics; on CPU also a slot out of
            range or given twice, or a length outside [0, D + 1].
    """
    if not isinstance(state, ModulationState):
        _checks.fail("state", "a ModulationState", type(state).__name__)
    given = (slot, tokens, length, entropy, confidence)
    complete = (entropy is not None or not state.uses(at.TRIGGER)) and (
        confidence is not None or not state.uses(at.DEEPCONF)
    )
    if state.checked_by_kernel is not None and complete:  # as in modulate_logits_
        try:
            _commit(*given, *state.tensors)
            return
        except (RuntimeError, AttributeError, TypeError):
            pass
    _check_commit(state, *given)
    _commit(*given, *state.tensors)


def _check_commit(
    state: ModulationState, slot: Tensor, tokens: Tensor, length: Tensor, entropy: Tensor | None,
    confidence: Tensor | None,
) -> None:  # fmt: skip
    _checks.check_tensor("tokens", tokens)
    if tokens.ndim != 2:
        _checks.fail("tokens", "shape (B, D + 1)", tuple(tokens.shape))
    shape = tuple(tokens.shape)
    _check("tokens", tokens, shape, "(B, D + 1)", state.device)
    _check("slot", slot, shape[:1], "(B,)", state.device)
    _check("length", length, shape[:1], "(B,)", state.device)
    _check_statistic("entropy", entropy, shape, state, at.TRIGGER)
    _check_statistic("confidence", confidence, shape, state, at.DEEPCONF)
    if not _checks.reads_values(slot):
        return
    _checks.check_range("slot", slot, -1, state.max_requests)
    _checks.check_range("length", length, 0, shape[1] + 1)
    used = slot[slot >= 0]
    if len(used) != len(used.unique()):
        _checks.fail("slot", "no slot twice", slot.tolist())


def _check_statistic(
    name: str, x: Tensor | None, shape: tuple[int, ...], state: ModulationState, part: int
) -> None:
    if x is None:
        if state.uses(part):
            _checks.fail(name, "a (B, D + 1) tensor for requests whose spec watches it", None)
        return
    _checks.check_dtype(name, x, torch.float32)
    _checks.check_shape(name, x, shape, "(B, D + 1)")
    _checks.check_device(name, x, state.tensors.records, "state")
    if not x.is_contiguous():
        _checks.fail(name, "a contiguous tensor", f"strides {x.stride()}")
