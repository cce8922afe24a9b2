"""A request's `Modulation` as the plain values that an engine carries with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from .. import _checks
from ..modulation import Modulation, SoftBudget, TokenSets
from ..modulation.records import check_with_sets
from ..modulation.sets import sets_or_none
from ..modulation.spec import PARTS

NAME = "modulation"


def request_parameters(spec: Modulation) -> dict[str, str]:
    """What to send with a request: ``{"modulation": "<JSON>"}``.

    Raises:
        ValueError: no `Modulation`, or one with `DeepConf` or `EntropyTrigger`, which no engine
            serves.
    """
    if not isinstance(spec, Modulation):
        _checks.fail("spec", "a Modulation", type(spec).__name__)
    check_windows(spec)
    return {NAME: json.dumps(asdict(spec), default=lambda number: number.item())}  # NumPy's


def modulation_of(parameters: Mapping[str, Any] | None) -> Modulation | None:
    """The `Modulation` among a request's parameters; None = it has none.

    As `request_parameters` writes it, or written by hand: a mapping, or JSON, of the arguments of
    `Modulation`, a part being a mapping of its own, such as
    ``{"cyclic": {"amplitude": 5, "period": 1200}, "think_end": 151668}``.

    Raises:
        ValueError: an unknown name, a missing argument, or a value that a part refuses.
    """
    values = (parameters or {}).get(NAME)
    if values is None:
        return None
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except json.JSONDecodeError as error:
            _checks.fail(NAME, "JSON", f"{values!r} ({error})")
    arguments = dict(_mapping(NAME, values))
    for part, kind in PARTS.items():
        if arguments.get(part) is not None:
            given = dict(_mapping(f"{NAME}.{part}", arguments[part]))
            if given.get("soft") is not None:
                given["soft"] = _build(f"{NAME}.{part}.soft", SoftBudget, given["soft"])
            arguments[part] = _build(f"{NAME}.{part}", kind, given)
    out: Modulation = _build(NAME, Modulation, arguments)
    return out


def check_request(spec: Modulation, sets: TokenSets, vocab_size: int) -> None:
    """Refuses what a step would trip over: windows, sets that do not fit, ids that are none."""
    check_windows(spec)
    check_with_sets(spec, sets, f"{NAME}.")
    for name, token in _ids(spec):
        if token >= vocab_size:
            _checks.fail(f"{NAME}.{name}", f"token ids in [0, {vocab_size})", token)


def check_windows(spec: Modulation) -> None:
    """Refuses parts that watch statistics of the sampler, which these engines do not give."""
    for name in ("deepconf", "entropy_trigger"):
        if getattr(spec, name) is not None:
            _checks.fail(f"{NAME}.{name}", "None: it needs sample_controlled", getattr(spec, name))


def controlled_tokens(kind: Any) -> tuple[TokenSets, int]:
    """A processor class's sets and vocabulary; refuses one that does not say them."""
    sets, vocab_size = sets_or_none(kind.sets), kind.vocab_size
    if not isinstance(vocab_size, int) or vocab_size <= max(sets.max_id, 0):
        expected = f"a subclass that sets it to the model's, above {max(sets.max_id, 0)}"
        _checks.fail("vocab_size", expected, vocab_size)
    return sets, vocab_size


def _ids(spec: Modulation) -> Iterator[tuple[str, int]]:
    """Every token id of a spec, with its name."""
    single = {"think_start": spec.think_start, "think_end": spec.think_end}
    yield from ((name, token) for name, token in single.items() if token is not None)
    if spec.budget is not None:
        yield from (("budget.end", token) for token in spec.budget.end)
    if spec.min_think is not None:
        yield from (("min_think.wait", token) for token in spec.min_think.wait)


def _build(name: str, kind: Any, values: object) -> Any:
    arguments = _mapping(name, values)
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(arguments) - set(known)):
        _checks.fail(name, f"arguments of {kind.__name__}: {', '.join(known)}", unknown)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _mapping(name: str, values: object) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        _checks.fail(name, "a mapping of arguments", repr(values))
    return values
