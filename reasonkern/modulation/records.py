"""A `Modulation` as the columns of its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import layout as at
from .sets import TokenSets, check_set
from .spec import Modulation

BITS = {
    "cyclic": at.CYCLIC,
    "tip": at.TIP,
    "constant": at.CONSTANT,
    "schedule": at.SCHEDULE,
    "ban": at.BAN,
    "budget": at.BUDGET,
    "min_think": at.MIN_THINK,
    "deepconf": at.DEEPCONF,
    "entropy_trigger": at.TRIGGER,
}


def start(spec: Modulation, prompt: Tensor) -> list[int]:
    """Progress after the prompt."""
    row = [0] * at.PROGRESS_WIDTH
    row[at.IGNORE] = 0 if spec.min_think is None else spec.min_think.ignore
    row[at.PHASE] = at.THINKING
    if spec.think_start is None:
        return row
    after = 0 if spec.think_end is None else _after_last(prompt, spec.think_end)
    opened = (prompt[after:] == spec.think_start).nonzero()
    if len(opened):
        row[at.SPENT] = len(prompt) - after - int(opened[0]) - 1
    else:
        row[at.PHASE] = at.BEFORE
    return row


def _after_last(prompt: Tensor, token: int) -> int:
    found = (prompt == token).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def pack(spec: Modulation, sets: TokenSets) -> list[int]:
    """The columns up to ROW_WIDTH, those of the progress left out."""
    check_with_sets(spec, sets)
    row = [-1] * at.ROW_WIDTH
    row[at.PARTS] = at.ACTIVE + sum(BITS[name] for name in spec.parts)
    row[at.MAX_ID] = _largest_id(spec)
    row[at.THINK_START] = -1 if spec.think_start is None else spec.think_start
    row[at.THINK_END] = -1 if spec.think_end is None else spec.think_end
    _put(row, at.AMPLITUDE, _bits([0.0] * (at.WAIT - at.AMPLITUDE)))
    _pack_added(spec, sets, row)
    _pack_budget(spec, row)
    if spec.min_think is not None:
        row[at.MIN_TOKENS], row[at.WAIT_LENGTH] = spec.min_think.tokens, len(spec.min_think.wait)
        _put(row, at.WAIT, spec.min_think.wait)
    if (deepconf := spec.deepconf) is not None:
        row[at.CONFIDENCE_WINDOW] = deepconf.window
        row[at.EOS] = -1 if deepconf.eos is None else deepconf.eos
        _put(row, at.CONFIDENCE_THRESHOLD, _bits([deepconf.threshold]))
    if (trigger := spec.entropy_trigger) is not None:
        row[at.ENTROPY_WINDOW] = trigger.window
        values = (trigger.k, trigger.floor, trigger.min_std, trigger.first)
        _put(row, at.ENTROPY_FACTOR, _bits(values))
    return row


def _largest_id(spec: Modulation) -> int:
    ids = [-1 if spec.think_end is None else spec.think_end]
    if spec.budget is not None:
        ids += spec.budget.end
    if spec.min_think is not None:
        ids += spec.min_think.wait
    if spec.deepconf is not None and spec.deepconf.eos is not None:
        ids.append(spec.deepconf.eos)
    return max(ids)


def _bits(values: Sequence[float]) -> list[int]:
    """Doubles as columns hold them."""
    doubles = torch.tensor(values, dtype=torch.float64, device="cpu")
    bits: list[int] = doubles.view(torch.int64).tolist()
    return bits


def check_with_sets(spec: Modulation, sets: TokenSets, prefix: str = "") -> None:
    """Refuses unknown sets, and a ban that contradicts other parts; names begin with `prefix`."""
    for name, part in spec.parts.items():
        if hasattr(part, "set"):
            check_set(f"{prefix}{name}.set", part.set, sets)
    if spec.ban is None:
        return
    banned = sets[spec.ban.set]
    if spec.min_think is not None and spec.min_think.wait[0] in banned:
        expected = "a first id that ban leaves"
        _checks.fail(f"{prefix}min_think.wait", expected, spec.min_think.wait[0])
    if spec.budget is not None and spec.budget.soft is not None:
        for token in spec.budget.end:
            if token in banned:
                expected = "ids that ban leaves, to be raised by soft"
                _checks.fail(f"{prefix}budget.end", expected, token)


def _pack_added(spec: Modulation, sets: TokenSets, row: list[int]) -> None:
    for k, part in enumerate((spec.cyclic, spec.tip, spec.constant, spec.schedule)):
        if part is not None:
            row[at.ADDED_SETS + k] = sets.index(part.set)
    if (cyclic := spec.cyclic) is not None:
        windows = [bound for pair in cyclic.windows or () for bound in pair]
        row[at.WINDOWS] = len(windows) // 2
        _put(row, at.WINDOW, windows)
        # A fraction of 1 that rounding may leave is as good as 0.
        _put(row, at.AMPLITUDE, _bits([cyclic.amplitude, cyclic.period, cyclic.shift % 1.0]))
    if spec.tip is not None:
        row[at.TIP_SPAN] = spec.tip.beta
        _put(row, at.ALPHA, _bits([spec.tip.alpha]))
    if spec.constant is not None:
        _put(row, at.BIAS, _bits([spec.constant.bias]))
    if (schedule := spec.schedule) is not None:
        row[at.POINTS] = len(schedule.points)
        times, values = zip(*schedule.points, strict=True)
        pairs = zip(times, _bits(values), strict=True)
        _put(row, at.POINT, [column for pair in pairs for column in pair])
    if spec.ban is not None:
        row[at.BAN_SET] = sets.index(spec.ban.set)


def _pack_budget(spec: Modulation, row: list[int]) -> None:
    if (budget := spec.budget) is None:
        return
    tokens = int(budget.tokens)  # -x of one of NumPy may wrap
    start = tokens if budget.soft is None else float(budget.soft.start) * tokens
    row[at.BUDGET_TOKENS], row[at.END_LENGTH] = tokens, len(budget.end)
    row[at.TRACK_FROM] = -int(-start // 1)  # rounded up
    _put(row, at.END, budget.end)
    _put(row, at.FAILURE, failure(budget.end))
    if budget.soft is not None:
        row[at.PARTS] += at.SOFT
        _put(row, at.SOFT_FROM, _bits([start, budget.soft.margin]))


def failure(phrase: Sequence[int]) -> list[int]:
    """[q]: the longest proper beginning of ``phrase[: q + 1]`` that is also its end."""
    out = [0]
    for token in phrase[1:]:
        q = out[-1]
        while q and phrase[q] != token:
            q = out[q - 1]
        out.append(q + (phrase[q] == token))
    return out


def _put(row: list[Any], column: int, values: Sequence[Any]) -> None:
    row[column : column + len(values)] = values
