"""Every public function, on thousands of drawn calls: no crash, no hang, no silent NaN.

Half of the calls are valid and must succeed; in the others one argument is spoilt (its shape,
dtype, strides, device, values or Python type), and the function either answers or refuses with a
ValueError that names what it expected. Finite inputs give no NaN, and inputs stay as they were.

STRESS_EXAMPLES (10000) is the number of calls per family.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import Arguments, Draw, spoil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

FAMILIES = {
    path.stem.removeprefix("calls_"): importlib.import_module(path.stem).CALLS
    for path in sorted(Path(__file__).parent.glob("calls_*.py"))
}
EXAMPLES = int(os.environ.get("STRESS_EXAMPLES", "10000"))
REFUSAL = re.compile(r"[\w\s.,*'\"()\[\]+]+: expected .+", re.S)
# A size that is legal and does not fit into memory is the machine's to refuse.
MEMORY = re.compile(r"allocate memory|storage size calculation overflowed|too large", re.I)


def quietly(test: Callable[..., None], examples: int) -> Callable[..., None]:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )(test)


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in a result or an argument."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from tensors(tuple(x.values()))
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from tensors(item)
    elif isinstance(x, float):
        yield torch.tensor(x)


def has_nan(x: Any, *, or_inf: bool = False) -> bool:
    for t in tensors(x):
        t = t.detach()
        if t.device.type == "cpu" and t.layout == torch.strided and t.dtype.is_floating_point:
            t = t.float()
            if bool((~t.isfinite() if or_inf else t.isnan()).any()):
                return True
    return False


def snapshot(arguments: Arguments) -> list[Tensor]:
    return [x.detach().clone() for x in tensors(arguments) if is_plain(x)]


def is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.layout == torch.strided and x.dtype.itemsize > 1


def assert_untouched(arguments: Arguments, before: list[Tensor]) -> None:
    after = snapshot(arguments)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was changed"


def run(function: Callable[..., Any], arguments: Arguments, another_type: bool) -> Any:
    """The result, or None when the call was refused in the agreed way."""
    try:
        return function(**arguments)
    except ValueError as error:
        assert REFUSAL.fullmatch(str(error)), f"a refusal that does not say what: {error}"
    except TypeError:
        if not another_type:
            raise
    except RuntimeError as error:
        if not MEMORY.search(str(error)):
            raise
    return None


CASES = [(family, name) for family, calls in FAMILIES.items() for name in calls]


@pytest.mark.parametrize(("family", "name"), CASES, ids=[".".join(case) for case in CASES])
def test_fuzz(family: str, name: str) -> None:
    calls = FAMILIES[family]
    function, strategy = calls[name]
    answered = 0

    def one(data: st.DataObject) -> None:
        nonlocal answered
        draw = Draw(data)
        arguments, spoilt, another_type = strategy(draw), draw.flag(), False
        if spoilt:
            arguments, another_type = spoil(draw, arguments)
        before = snapshot(arguments)
        out = run(function, arguments, another_type)
        assert_untouched(arguments, before)
        if out is not None:
            answered += 1
            finite = not has_nan(arguments, or_inf=True)
            assert not (finite and has_nan(out)), "NaN from finite inputs"

    examples = math.ceil(EXAMPLES / len(calls))
    quietly(given(st.data())(one), examples)()
    assert answered > examples // 3, "most of the calls were refused: the strategy is not valid"
