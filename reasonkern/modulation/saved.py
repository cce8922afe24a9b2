"""What a saved state may hold: anything else becomes an address, or a loop without end."""

from __future__ import annotations

from collections.abc import Mapping
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
    (at.WAIT_LENGTH, at.MIN_THINK, 0, at.MAX_WAIT),
    (at.CONFIDENCE_WINDOW, at.DEEPCONF, 1, at.MAX_CONFIDENCE),
    (at.ENTROPY_WINDOW, at.TRIGGER, 1, at.MAX_ENTROPY),
)
PROGRESS = {at.PHASE: at.CLOSED + 1, at.WAIT_AT: at.MAX_WAIT + 1}
COUNTS = (at.T, at.SPENT, at.SWITCH, at.IGNORE, at.CONFIDENCE_PUSHED, at.ENTROPY_PUSHED)


def check_saved(state: Mapping[str, Any], own: at.Storage) -> None:
    """ValueError for a tensor that no state over the same sets has; reads them on the host."""
    _checks.check_saved(state, own._asdict(), "state")
    for name in ("set_offsets", "set_ids", "set_member"):
        if not torch.equal(state[name].cpu(), getattr(own, name).cpu()):
            _checks.fail(f"state[{name!r}]", "that of this state's sets", state[name].tolist())
    spec = state["spec"].cpu()
    _check_spec(spec, len(own.set_offsets) - 1)
    period = state["numbers"].cpu()[:, at.PERIOD]
    if not (period > 0)[(spec[:, at.PARTS] & at.CYCLIC) != 0].all():
        _checks.fail("state['numbers']", "periods above 0", period.tolist())
    progress = state["progress"].cpu()
    for column, end in PROGRESS.items():
        _checks.check_range("state['progress']", progress[:, column], 0, end)
    for column in COUNTS:
        _checks.check_range("state['progress']", progress[:, column], 0, _checks.INT64)
    _checks.check_range("state['progress']", progress[:, at.PHRASE], at.DONE, at.MAX_END + 1)


def _check_spec(spec: Tensor, sets: int) -> None:
    parts = spec[:, at.PARTS]
    _checks.check_range("state['spec']", parts, 0, 2 * at.TRIGGER)
    for column, part, low, high in LENGTHS:
        given, used = spec[:, column], (parts & part) != 0
        _checks.check_range("state['spec']", given, -1, high + 1)
        _checks.check_range("state['spec']", given, low, high + 1, where=used)
    place = torch.arange(at.MAX_END)
    inside = place < spec[:, at.END_LENGTH, None]
    failure = spec[:, at.FAILURE : at.WAIT]
    _checks.check_range("state['spec']", failure, 0, at.MAX_END, where=inside)
    _checks.check_range("state['spec']", failure - place, -at.MAX_END, 1, where=inside)
    columns = [(at.ADDED_SETS + k, part) for k, part in enumerate(at.ADDERS)]
    for column, part in [*columns, (at.BAN_SET, at.BAN)]:
        _checks.check_range("state['spec']", spec[:, column], 0, sets, where=(parts & part) != 0)
    ids = torch.cat((spec[:, [at.THINK_START, at.THINK_END, at.EOS]], _phrases(spec)), 1)
    _checks.check_range("state['spec']", ids, -1, ID_LIMIT)
    above = torch.where((parts != 0)[:, None], ids[:, 1:] - spec[:, at.MAX_ID, None], 0)
    _checks.check_range("state['spec']", above, -ID_LIMIT - 1, 1)


def _phrases(spec: Tensor) -> Tensor:
    """The ids of both phrases; -1 beyond their lengths."""
    phrases = []
    for begin, length, width in (
        (at.END, at.END_LENGTH, at.MAX_END),
        (at.WAIT, at.WAIT_LENGTH, at.MAX_WAIT),
    ):
        used = torch.arange(width) < spec[:, length, None]
        phrases.append(torch.where(used, spec[:, begin : begin + width], -1))
    return torch.cat(phrases, 1)
