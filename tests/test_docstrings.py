"""Docstrings: their examples run, and the arguments and defaults they name are the real ones."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import pkgutil
import pydoc
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

import reasonkern as rk
from reasonkern import Objective
from reasonkern.modulation.layout import Storage
from reasonkern.speculation.tree import TreeTensors

# Triton kernels import Triton, the demo its extras, integrations their trainer, __main__ runs,
# libraries are no modules.
NOT_IMPORTED = ("triton", "demo", "integrations.", "__main__", "._C")
NAMESPACES = (rk, rk.generation, rk.shaping, rk.scaling)
PUBLIC = {f"{m.__name__}.{name}": getattr(m, name) for m in NAMESPACES for name in m.__all__}
FUNCTIONS = [thing for thing in PUBLIC.values() if inspect.isfunction(thing)]
CONSTRUCTORS = [name for name, member in vars(Objective).items() if isinstance(member, classmethod)]


def modules() -> Iterator[str]:
    yield "reasonkern"
    for info in pkgutil.walk_packages(rk.__path__, "reasonkern."):
        if not any(part in info.name for part in NOT_IMPORTED):
            yield info.name


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in modules():
        for test in finder.find(importlib.import_module(name), name):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failed = runner.run(EXAMPLES[name], out=report.append).failed
    assert not failed, "".join(report)


def test_the_examples_are_found() -> None:
    assert any(name.endswith("token_stats") for name in EXAMPLES)
    assert any(name.endswith("token_weights") for name in EXAMPLES)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    thing = PUBLIC[name]
    if name.rpartition(".")[2].isupper():
        return  # a constant: the comment above it
    assert thing.__doc__ and not thing.__doc__.startswith(
        f"{name.rpartition('.')[2]}("
    )  # a dataclass's own one
    if inspect.isclass(thing):
        public = [m for n, m in vars(thing).items() if not n.startswith("_") and callable(m)]
        assert all(m.__doc__ for m in public)


TUPLES_OF_USERS = [
    *(thing for thing in PUBLIC.values() if inspect.isclass(thing) and issubclass(thing, tuple)),
    TreeTensors,
    Storage,
]


@pytest.mark.parametrize("kind", TUPLES_OF_USERS, ids=lambda k: k.__name__)
def test_help_of_a_named_tuple_says_what_its_fields_are(kind: Any) -> None:
    texts = arguments(kind, "Attributes")
    assert list(texts) == list(kind._fields)
    for field, text in texts.items():
        assert getattr(kind, field).__doc__ == " ".join(text.split())
    assert "Alias for field" not in pydoc.render_doc(kind)


def arguments(thing: Callable[..., Any], section: str = "Args") -> dict[str, str]:
    """Descriptions by name in a section of a docstring."""
    text = (inspect.getdoc(thing) or "") + "\n"
    found = re.search(rf"^{section}:\n((?: {{4}}.*\n|\n)+)", text, re.M)
    if found is None:
        return {}
    parts = re.split(r"^ {4}(\w+): ", found[1], flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_argument_is_documented(function: Callable[..., Any]) -> None:
    assert list(arguments(function)) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_none_means_is_said_where_none_is_the_default(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    for name, text in arguments(function).items():
        if re.search(r"None = |[Dd]efault: ", text):
            assert parameters[name].default is None, name


def default_of(function: Callable[..., Any], name: str) -> Any:
    parameters = inspect.signature(function).parameters
    if name in parameters:
        return parameters[name].default
    return next(f.default for f in fields(Objective) if f.name == name)


def named_defaults(function: Callable[..., Any]) -> list[tuple[str, float]]:
    """``name`` (number) and name=number in a docstring; its example may choose others."""
    text = (inspect.getdoc(function) or "").partition("\nExample:")[0]
    pairs = re.findall(r"``(\w+)`` \((-?[\d.]+)\)", text)
    pairs += re.findall(r"\b(\w+)=(-?\d[\d.]*|True|False|None)\b", text)
    return [(name, float(x) if x[-1].isdigit() else eval(x)) for name, x in pairs]


TOP_LEVEL = [function for function in FUNCTIONS if function in vars(rk).values()]
DOCUMENTED = [*TOP_LEVEL, Objective, *(getattr(Objective, name) for name in CONSTRUCTORS)]
TUPLES = {"unbiased": rk.KL, "geometric_mean": rk.Importance}


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda f: f.__name__)
def test_defaults_named_in_a_docstring(function: Callable[..., Any]) -> None:
    for name, value in named_defaults(function):
        if name in TUPLES:
            assert TUPLES[name]._field_defaults[name] == value
        else:
            assert default_of(function, name) == value, name


def test_named_defaults_are_found() -> None:
    assert ("log_ratio_clamp", 20.0) in named_defaults(Objective)
    assert ("unbiased", False) in named_defaults(Objective)


# constructor: (the paper it cites, the numbers that paper or its code publishes)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("1707.06347", {"ratio_min": 0.8, "ratio_max": 1.2}),
    "grpo": ("2402.03300", {"ratio_min": 0.8, "ratio_max": 1.2}),
    "dapo": ("2503.14476", {"ratio_min": 0.8, "ratio_max": 1.28}),
    "dr_grpo": ("2503.20783", {"ratio_min": 0.8, "ratio_max": 1.2}),
    "gppo": ("2508.07629", {"ratio_min": 0.8, "ratio_max": 1.28, "low": 1.0, "high": 1.0}),
    "ce_gppo": ("2509.20712", {"ratio_min": 0.8, "ratio_max": 1.28, "low": 0.25, "high": 1.0}),
    "cispo": ("2506.13585", {"ratio_min": None, "ratio_max": 5.0}),
    "sapo": ("2511.20347", {"low": 1.0, "high": 1.05}),
    "reinforce": ("", {"ratio_min": 1.0, "ratio_max": 1.0}),
    "gpg": ("2504.02546", {"ratio_min": 1.0, "ratio_max": 1.0}),
    "rloo": ("2402.14740", {"ratio_min": 1.0, "ratio_max": 1.0}),
    "dppo_tv": ("2602.04879", {"low": 0.15, "high": 0.15, "ratio_max": 20.0}),
    "dppo_kl": ("dppo_tv", {"low": 0.05, "high": 0.05, "ratio_max": 20.0}),
    "dro": ("2405.19107", {"low": 0.1}),
    "gspo": ("2507.18071", {"ratio_min": 1 - 3e-4, "ratio_max": 1 + 4e-4}),
    "gmpo": ("2507.20673", {"ratio_min": math.exp(-0.4), "ratio_max": math.exp(0.4)}),
    "tppo": ("2506.15050", {"ratio_min": 0.8, "ratio_max": 1.28}),
    "bapo": ("2510.18927", {"ratio_min": None, "ratio_max": None}),
    "clip_cov": ("2505.22617", {"ratio_min": 0.8, "ratio_max": 1.2}),
    "kl_cov": ("2505.22617", {"ratio_min": None, "ratio_max": None}),
    "high_entropy": ("2506.01939", {"ratio_min": 0.8, "ratio_max": 1.28}),
    "gtpo": ("2508.03772", {"ratio_min": 1.0, "ratio_max": 1.0}),
    "vespo": ("2602.10693", {"vespo_shape": (2.0, 3.0, 3.0, 2.0)}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_defaults_and_their_source(name: str) -> None:
    paper, values = PUBLISHED[name]
    constructor = getattr(Objective, name)
    assert paper in constructor.__doc__
    objective = constructor()
    assert objective.name == name
    for field, value in values.items():
        assert getattr(objective, field) == pytest.approx(value), field
    plain = {"dual_clip": None, "ratio_cap": None, "kl": None, "entropy_coef": 0.0,
             "importance": None, "opsm": None, "log_ratio_clamp": 20.0}  # fmt: skip
    assert {field: getattr(objective, field) for field in plain} == plain


def test_every_constructor_is_in_the_table() -> None:
    assert set(CONSTRUCTORS) == {*PUBLISHED, "custom"}
