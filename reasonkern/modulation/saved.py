"""What a saved state may hold: anything else becomes an address, or a loop without end."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import layout as at
from .parts import ID_LIMIT

# Column of a length, the part it belongs to, its smallest and largest value; -1 without the part.
LENGTHS = (
    (at.WINDOWS, at.CYCLIC, 0, at.MAX_WINDOWS),
    (at.POINTS, at.SCHEDULE, 1, at.MAX_POINTS),
    (at.END_LENGTH, at.BUDGET, 1, at.MAX_END),
    (at.WAIT_LENGTH, at.MIN_THINK, 1, at.MAX_WAIT),
    (at.CONFIDENCE_WINDOW, at.DEEPCONF, 1, at.MAX_CONFIDENCE),
    (at.ENTROPY_WINDOW, at.TRIGGER, 1, at.MAX_ENTROPY),
)
COUNTS = (at.T, at.SPENT, at.SWITCH, at.IGNORE, at.CONFIDENCE_PUSHED, at.ENTROPY_PUSHED)


def check_saved(state: Mapping[str, Any], own: at.Storage, sets: Sized) -> None:
    """ValueError for a tensor that no state over the same sets has; reads them on the host."""
    _checks.check_saved(state, own._asdict(), "state")
    same = state["sets"].cpu() == own.sets.cpu()
    same[at.LARGEST_ID] = True  # depends on the requests
    if not same.all():
        _checks.fail("state['sets']", "those of this state", state["sets"].tolist())
    records = state["records"].cpu()
    _check_spec(records, len(sets))
    period = records.view(torch.float64)[:, at.PERIOD]
    if not (period >= 1e-6)[(records[:, at.PARTS] & at.CYCLIC) != 0].all():
        _checks.fail("state['records']", "periods of at least 1e-6", period.tolist())
    _check(records[:, at.PHASE], 0, at.CLOSED + 1)
    for column in COUNTS:
        _check(records[:, column], 0, _checks.INT64)
    _check_place(records[:, at.PHRASE], at.DONE, records[:, at.END_LENGTH])
    _check_place(records[:, at.WAIT_AT], 0, records[:, at.WAIT_LENGTH])


def _check(values: Tensor, low: int, high: int, where: Tensor | None = None) -> None:
    _checks.check_range("state['records']", values, low, high, where=where)


def _check_place(place: Tensor, low: int, length: Tensor) -> None:
    """A phrase is never complete: then its place is 0 again, or `at.DONE`."""
    _check(place, low, at.MAX_END)
    _check(place - length.clamp_min(1), -at.MAX_END - 1, 0)


def _check_spec(records: Tensor, sets: int) -> None:
    parts = records[:, at.PARTS]
    _check(parts, 0, 2 * at.TRIGGER)
    _check(parts & at.ACTIVE, 1, 2, where=parts != 0)
    for column, part, low, high in LENGTHS:
        given, used = records[:, column], (parts & part) != 0
        _check(given, -1, high + 1)
        _check(given, low, high + 1, where=used)
    place = torch.arange(at.MAX_END, device="cpu")
    inside = place < records[:, at.END_LENGTH, None]
    failure = records[:, at.FAILURE : at.ROW_WIDTH]
    _check(failure, 0, at.MAX_END, where=inside)
    _check(failure - place, -at.MAX_END, 1, where=inside)
    columns = [(at.ADDED_SETS + k, part) for k, part in enumerate(at.ADDERS)]
    for column, part in [*columns, (at.BAN_SET, at.BAN)]:
        _check(records[:, column], 0, sets, where=(parts & part) != 0)
    ids = torch.cat((records[:, [at.THINK_START, at.THINK_END, at.EOS]], _phrases(records)), 1)
    _check(ids, -1, ID_LIMIT)
    above = torch.where((parts != 0)[:, None], ids[:, 1:] - records[:, at.MAX_ID, None], 0)
    _check(above, -ID_LIMIT - 1, 1)


def _phrases(records: Tensor) -> Tensor:
    """The ids of both phrases; -1 beyond their lengths."""
    phrases = []
    for begin, length, width in (
        (at.END, at.END_LENGTH, at.MAX_END),
        (at.WAIT, at.WAIT_LENGTH, at.MAX_WAIT),
    ):
        used = torch.arange(width, device="cpu") < records[:, length, None]
        ids = records[:, begin : begin + width]
        _check(ids, 0, ID_LIMIT, where=used)  # a wait's is written without asking for its sign
        phrases.append(torch.where(used, ids, -1))
    return torch.cat(phrases, 1)
