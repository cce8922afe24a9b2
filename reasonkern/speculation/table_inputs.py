"""What users give to `NgramTable`, as the operators take it; checks raise ValueError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .draft import Draft
from .inputs import ALL_INTEGERS, LOGITS_DTYPES, per_request
from .reference_table import ID_BITS, TOTAL_LIMIT, Storage, row_values
from .tree import DraftTree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .table import NgramTable

# context, topk_ids, topk_logits, lse, scope, as `NgramTable.update` takes them
UpdateArgs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Rows(NamedTuple):
    """Rows of one update: int64 and float32 tensors on the table's device."""

    context: Tensor
    ids: Tensor
    logits: Tensor
    lse: Tensor | None
    scope: Tensor | None


class DraftInputs(NamedTuple):
    """Per-request tensors of one draft."""

    context: Tensor
    scope: Tensor | None
    temperature: Tensor
    seed: Tensor
    position: Tensor


def _on_table(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], table: NgramTable) -> None:
    _checks.check_dtype(name, tensor, *dtypes)
    if tensor.device != table.device:
        _checks.fail(name, f"the table's device, {table.device}", tensor.device)


def _integers(name: str, tensor: Tensor, table: NgramTable) -> Tensor:
    _on_table(name, tensor, ALL_INTEGERS, table)
    return tensor.to(torch.int64)


def _floats(name: str, tensor: Tensor, table: NgramTable) -> Tensor:
    _on_table(name, tensor, LOGITS_DTYPES, table)
    return tensor.to(torch.float32).contiguous()


def contexts(table: NgramTable, context: Tensor) -> Tensor:
    """(rows, W) int64 with a contiguous last dimension."""
    context = _integers("context", context, table)
    width = table.orders[0]
    if context.ndim != 2 or context.shape[1] != width:
        _checks.fail("context", f"shape (rows, max(orders)) = (…, {width})", tuple(context.shape))
    return context if context.stride(1) == 1 else context.contiguous()


def scopes(table: NgramTable, scope: int | Tensor | None, rows: int) -> Tensor | None:
    """(rows,) int64, or None for scope 0."""
    if scope is None:
        return None
    if _checks.is_integer(scope) and not 0 <= scope < table.max_scopes:
        _checks.fail("scope", f"an integer in [0, {table.max_scopes})", scope)
    return per_request("scope", scope, rows, torch.int64, table.device, "(rows,)")


def check_known(table: NgramTable, context: Tensor, scope: Tensor | None) -> None:
    """Context ids inside the vocabulary, scopes inside the table."""
    _checks.check_range("context", context, -1, table.vocab_size)
    if scope is not None:
        _checks.check_range("scope", scope, 0, table.max_scopes)


def check_state(table: NgramTable, state: Mapping[str, Any], own: Storage) -> None:
    """The tensors of a saved table; contents that no table has would become drafted ids."""
    _checks.check_saved(state, own._asdict(), "table")
    ids, extra = state["slots"].long(), state["extra"]
    if table.storage == "packed":
        ids = ids & (1 << ID_BITS) - 1
        if extra.numel():
            ids = ids | extra.long() << ID_BITS
    else:
        _checks.check_range("state['extra']", extra, 0, TOTAL_LIMIT * table.max_count + 1)
    _checks.check_range("state['slots']", ids, 0, table.vocab_size)
    _checks.check_range("state['counts']", state["counts"], 0, table.max_count + 1)
    _checks.check_range("state['clock']", state["clock"], 0, _checks.INT64)


# ---- drafting


def draft_inputs(
    table: NgramTable,
    context: Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    scope: int | Tensor | None,
) -> DraftInputs:
    """Checks and expands the arguments of `NgramTable.draft`."""
    context = contexts(table, context)
    rows, device = context.shape[0], table.device
    return DraftInputs(
        context,
        scopes(table, scope, rows),
        per_request("temperature", temperature, rows, torch.float32, device),
        per_request("seed", seed, rows, torch.int64, device),
        per_request("position", position, rows, torch.int64, device),
    )


# ---- updating


def update_rows(
    table: NgramTable,
    context: Tensor,
    ids: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    scope: int | Tensor | None,
) -> Rows:
    """Shapes, dtypes and devices; `check_rows` looks at the values."""
    context = contexts(table, context)
    rows = context.shape[0]
    ids = _integers("topk_ids", ids, table).contiguous()
    logits = _floats("topk_logits", logits, table)
    if ids.ndim != 2 or ids.shape[0] != rows or not 1 <= ids.shape[1] <= table.topk:
        expected = f"shape (rows, k) = ({rows}, 1 to {table.topk})"
        _checks.fail("topk_ids", expected, tuple(ids.shape))
    _checks.check_shape("topk_logits", logits, ids.shape, "of topk_ids")
    if lse is not None:
        lse = _floats("lse", lse, table)
        _checks.check_shape("lse", lse, (rows,), "(rows,)")
    return Rows(context, ids, logits, lse, scopes(table, scope, rows))


def check_rows(table: NgramTable, rows: Rows) -> None:
    """What an operator calls a bad row, in words."""
    used = rows.context[:, -1] != -1
    check_known(table, rows.context, rows.scope)
    _checks.check_range("topk_ids", rows.ids, -1, table.vocab_size, used[:, None])
    bad = (used & ~row_values(rows.logits, rows.lse, rows.ids)[1]).nonzero()
    if bad.numel():
        row = int(bad[0])
        what = "logits" if rows.lse is not None else "log-probabilities (lse is None)"
        got = f"{rows.logits[row].tolist()} in row {row}"
        if rows.lse is not None:
            got += f" with lse {rows.lse[row].item()}"
        limit = f"no NaN or +inf and probabilities of at most {TOTAL_LIMIT / 2**30:.3f} together"
        _checks.fail("topk_logits", f"{what} with {limit}", got)


def sequence_rows(
    table: NgramTable,
    tokens: Tensor,
    ids: Tensor,
    logits: Tensor,
    lengths: Tensor | None,
    lse: Tensor | None,
    scope: int | Tensor | None,
) -> UpdateArgs:
    """One row per position; those beyond a sequence's length become padding."""
    tokens = _integers("tokens", tokens, table)
    if tokens.ndim != 2:
        _checks.fail("tokens", "shape (batch, length)", tuple(tokens.shape))
    batch, length = tokens.shape
    _checks.check_tensor("topk_ids", ids)
    _checks.check_tensor("topk_logits", logits)
    for name, tensor in (("topk_ids", ids), ("topk_logits", logits)):
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != (batch, length):
            expected = f"shape (batch, length, k) = ({batch}, {length}, k)"
            _checks.fail(name, expected, tuple(tensor.shape))
    if lse is not None:
        _checks.check_shape("lse", lse, (batch, length), "(batch, length)")
    width = table.orders[0]
    windows = torch.nn.functional.pad(tokens, (width - 1, 0), value=-1).unfold(1, width, 1)
    if lengths is not None:
        lengths = _integers("lengths", lengths, table)
        _checks.check_shape("lengths", lengths, (batch,), "(batch,)")
        _checks.check_range("lengths", lengths, 0, length + 1)
        inside = torch.arange(length, device=tokens.device) < lengths[:, None]
        windows = torch.where(inside[..., None], windows, -1)
    return _flat(windows, ids, logits, lse, scopes(table, scope, batch))


def verified_rows(
    table: NgramTable, context: Tensor, verified: Any, scope: int | Tensor | None
) -> UpdateArgs:
    """Row j of a request: its context and tokens[:j]."""
    context = contexts(table, context)
    batch, width = context.shape
    if not hasattr(verified, "length"):  # a Draft has tokens, too
        _checks.fail("verified", "a Verified, as verify_tree returns it", type(verified).__name__)
    tokens = _integers("verified.tokens", verified.tokens, table)
    length = _integers("verified.length", verified.length, table)
    if tokens.ndim != 2 or tokens.shape[0] != batch:
        _checks.fail("verified.tokens", f"shape ({batch}, depth + 1)", tuple(tokens.shape))
    rows = tokens.shape[1]
    windows = torch.cat((context, tokens[:, : rows - 1]), 1).unfold(1, width, 1)
    inside = torch.arange(rows, device=tokens.device) < length[:, None]
    windows = torch.where(inside[..., None], windows, -1)
    laws = verified.topk_ids, verified.topk_logits, verified.lse
    if laws[0].shape[-1] > table.topk:
        expected = f"at most {table.topk} ids a row: verify_tree(…, topk={table.topk})"
        _checks.fail("verified.topk_ids", expected, laws[0].shape[-1])
    return _flat(windows, *laws, scopes(table, scope, batch))


def node_rows(
    table: NgramTable,
    context: Tensor,
    logits: Tensor,
    draft: Draft,
    tree: DraftTree,
    scope: int | Tensor | None,
) -> UpdateArgs:
    """One row per valid node of a draft."""
    context = contexts(table, context)
    batch, width = context.shape
    if logits.ndim != 3 or tuple(logits.shape[:2]) != (batch, tree.nodes):
        expected = f"logits of shape ({batch}, {tree.nodes}, vocabulary)"
        _checks.fail("all_nodes", expected, tuple(logits.shape))
    seen = torch.cat((context, draft.tokens[:, 1:]), 1)
    windows = seen[:, tree.windows(width, context.device)]
    windows = torch.where(draft.valid[..., None], windows, -1)
    return _flat(windows, *laws_of(table, logits), scopes(table, scope, batch))


def laws_of(table: NgramTable, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, logits and lse of the (…, V) rows of a model, as `Verified` has them.

    A row with NaN, +inf or nothing finite has no ids: a text may go on without the table's help.
    """
    rows = logits.float()
    top, lse = rows.topk(min(table.topk, rows.shape[-1]), dim=-1), rows.logsumexp(-1)
    return top.indices.where(lse.isfinite().unsqueeze(-1), -1), top.values, lse


def _flat(
    windows: Tensor, ids: Tensor, logits: Tensor, lse: Tensor | None, scope: Tensor | None
) -> UpdateArgs:
    k = ids.shape[-1]
    return (
        windows.flatten(0, 1),
        ids.reshape(-1, k),
        logits.reshape(-1, k),
        None if lse is None else lse.reshape(-1),
        None if scope is None else scope.repeat_interleave(windows.shape[1]),
    )


def gather(rows: Rows, group: ProcessGroup) -> Rows:
    """The rows of all ranks, in rank order, as log-probabilities: the bits that lse would give."""
    from torch import distributed

    logits = rows.logits if rows.lse is None else rows.logits - rows.lse.unsqueeze(-1)
    scope = rows.scope if rows.scope is not None else rows.context.new_zeros(len(rows.context))
    ranks = distributed.get_world_size(group)

    def all_ranks(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    context, ids = all_ranks(rows.context.contiguous()), all_ranks(rows.ids)
    return Rows(context, ids, all_ranks(logits), None, all_ranks(scope))
