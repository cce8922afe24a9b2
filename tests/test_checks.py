"""Argument checks: one message form, and silence while torch.compile traces."""

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import reasonkern as rk
from reasonkern import _checks

STRESS = Path(__file__).parent / "stress"
X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: _checks.check_shape("advantage", X, (2,), "(batch,)"),
            "advantage: expected shape (batch,) = (2,), got (2, 3)",
        ),
        (
            lambda: _checks.check_dtype("targets", X, torch.int32, torch.int64),
            "targets: expected dtype torch.int32 or torch.int64, got torch.float32",
        ),
        (
            lambda: _checks.check_device("weight", X.to("meta"), X, "logits"),
            "weight: expected the device of logits, cpu, got meta",
        ),
        (
            lambda: _checks.check_choice("kl", "k4", ("k1", "k2")),
            "kl: expected 'k1' or 'k2', got 'k4'",
        ),
        (
            lambda: _checks.check_choice("inplace", X, (False, True)),
            "inplace: expected False or True, got Tensor",
        ),
        (
            lambda: _checks.check_ids("eos", [1, True], 5),
            "eos: expected ids in [0, 5), got True",
        ),
        (
            lambda: _checks.check_ids("eos", [np.int64(7)], 5, ", the vocabulary"),
            "eos: expected ids in [0, 5), the vocabulary, got np.int64(7)",
        ),
        (
            lambda: _checks.check_number("temperature", 0.0, 0, exclusive=True),
            "temperature: expected a finite number > 0, got 0.0",
        ),
        (
            lambda: _checks.check_number("delta", float("nan")),
            "delta: expected a finite number, got nan",
        ),
        (
            lambda: _checks.check_number("coef", True, 0),
            "coef: expected a finite number >= 0, got True",
        ),
        (
            lambda: _checks.check_number("coef", 1e300),
            "coef: expected a finite number, got 1e+300",
        ),
        (
            lambda: _checks.check_number("share", 0.0, 0, 1, exclusive=True),
            "share: expected a number in (0, 1], got 0.0",
        ),
        (
            lambda: _checks.check_number("gamma", 1.5, 0, 1),
            "gamma: expected a number in [0, 1], got 1.5",
        ),
        (
            lambda: _checks.expanded("advantage", X[:1, :2], X, "ratio"),
            "advantage: expected a shape that broadcasts to (2, 3), got (1, 2)",
        ),
        (
            lambda: _checks.check_finite("features", X / 0, expected="finite numbers"),
            "features: expected finite numbers, got nan at (0, 0)",
        ),
        (
            lambda: _checks.check_number("count", 1 << 64, 0),
            f"count: expected a finite number >= 0, got {1 << 64}",
        ),
        (
            lambda: _checks.check_integer("k", 1.0, 1),
            "k: expected an integer >= 1, got 1.0",
        ),
        (
            lambda: _checks.check_integer("k", np.int8(4), 0, 3),
            "k: expected an integer in [0, 3], got np.int8(4)",
        ),
        (
            lambda: _checks.check_integer("k", np.bool_(True), 0, 3),
            "k: expected an integer in [0, 3], got np.True_",
        ),
        (
            lambda: _checks.check_number("x", np.float32("nan"), 0),
            "x: expected a finite number >= 0, got np.float32(nan)",
        ),
        (
            lambda: _checks.check_settings({"a": 1, "b": 2, "d": 5}, {"a": 1, "b": 3, "c": 4}),
            "state: expected settings {'b': 3, 'c': 4, 'd': None}, got {'b': 2, 'c': None, 'd': 5}",
        ),
        (
            lambda: _checks.check_settings(None, {}),
            "state['settings']: expected a mapping, as state_dict writes it, got NoneType",
        ),
        (
            lambda: _checks.check_integer("k", True, 0, 3),
            "k: expected an integer in [0, 3], got True",
        ),
        (
            lambda: _checks.check_seed("seed", 1 << 64),
            f"seed: expected an integer in [-2^63, 2^64), got {1 << 64}",
        ),
        (
            lambda: _checks.check_tensor("mask", X.to_sparse()),
            "mask: expected a dense tensor of floats, integers or bools, got torch.sparse_coo",
        ),
        (
            lambda: _checks.check_tensor("weight", X.to(torch.complex64)),
            "weight: expected a dense tensor of floats, integers or bools, got torch.complex64",
        ),
        (
            lambda: _checks.check_device("weight", 3, X, "logits"),
            "weight: expected a tensor, got int",
        ),
        (
            lambda: _checks.check_values("scores", X.to("meta")),
            "scores: expected a tensor with values, got one on device meta",
        ),
        (
            lambda: _checks.check_range("targets", torch.tensor([[0, 5], [9, 5]]), 0, 5),
            "targets: expected values in [0, 5), got 5 at (0, 1)",
        ),
    ],
)
def test_checks_name_expectation_and_value(check, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


def test_checks_accept_what_is_right():
    _checks.check_shape("x", X, (2, 3), "(batch, tokens)")
    _checks.check_dtype("x", X, torch.float32)
    _checks.check_device("x", X, X, "x")
    _checks.check_choice("kl", "k1", ("k1",))
    _checks.check_ids("eos", (0, np.int64(4)), 5)
    _checks.check_number("x", 0, 0)
    _checks.check_number("x", 1.0, 0, 1, exclusive=True)
    for number in (np.float32(0.5), np.float16(0.5), np.float64(0.5), np.int32(1)):
        _checks.check_number("x", number, 0, 1)
    _checks.check_integer("k", np.int64(3), 1, 3)
    assert type(_checks.check_seed("seed", np.uint64((1 << 64) - 1))) is int
    _checks.check_seed("seed", np.int64((1 << 63) - 1))
    for several in ([1], (1,), np.ones(1), X, {1: 2}.values(), {1: 2}.keys()):
        _checks.check_list("x", several, "numbers")
    assert _checks.expanded("x", X[:1], X, "y").shape == X.shape
    _checks.check_finite("x", X / 0, where=torch.zeros_like(X, dtype=torch.bool))
    _checks.check_seed("seed", -(1 << 63))
    _checks.check_seed("seed", (1 << 64) - 1)
    _checks.check_range("t", torch.tensor([-100, 4]), 0, 5, where=torch.tensor([False, True]))


@pytest.mark.parametrize("make", [rk.NgramTable, rk.ModulationState])
def test_a_device_that_is_not_there(make):
    for device in ("nope", 3.5, *(() if torch.cuda.is_available() else ("cuda",))):
        message = f"^device: expected a device of this machine, got '{device}' \\("
        with pytest.raises(ValueError, match=message):
            make(8, device=device)
        with pytest.raises(ValueError, match=message):
            make(8).to(device)


def test_a_table_of_numpys_numbers():
    """Saved, it holds Python's: torch loads no others."""
    sizes = {"capacity": 8, "vocab_size": 50, "topk": 2, "max_count": 9, "max_scopes": 3}
    table = rk.NgramTable(orders=(np.int64(2), 1), **{k: np.int64(n) for k, n in sizes.items()})
    settings = table.state_dict()["settings"]
    assert settings == sizes | {"orders": [2, 1], "storage": "packed"}
    assert all(type(settings[name]) is int for name in sizes)


def test_checks_do_not_break_a_graph():
    def front(x, targets, weight, temperature):
        _checks.check_shape("weight", weight, x.shape[:-1], "(tokens,)")
        _checks.check_dtype("targets", targets, torch.int64)
        _checks.check_device("weight", weight, x, "x")
        _checks.check_number("temperature", temperature, 0, exclusive=True)
        _checks.check_range("targets", targets, 0, x.shape[-1])
        return x.sum(-1) * weight / temperature

    compiled = torch.compile(front, backend="eager", fullgraph=True, dynamic=True)
    for rows_ in (2, 5):
        x, weight = torch.ones(rows_, 3), torch.ones(rows_)
        targets = torch.zeros(rows_, dtype=torch.int64)
        assert torch.equal(compiled(x, targets, weight, 0.5), front(x, targets, weight, 0.5))
    with pytest.raises(ValueError, match="weight: expected shape"):
        front(x, targets, weight[1:], 0.5)


def test_everything_public_that_checks_is_fuzzed(monkeypatch):
    """Functions have a strategy, classes that refuse something are made by one (`make stress`)."""
    monkeypatch.syspath_prepend(STRESS)
    paths = sorted(STRESS.glob("calls_*.py"))
    fuzzed = {name for path in paths for name in importlib.import_module(path.stem).CALLS}
    source = "\n".join(path.read_text() for path in paths)
    for space in (rk, rk.generation, rk.shaping, rk.scaling):
        public = {name: getattr(space, name) for name in space.__all__}
        functions = {name for name, thing in public.items() if inspect.isfunction(thing)}
        assert functions - {"info"} <= fuzzed, "info alone takes no arguments"
        classes = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
        refusing = {
            name
            for name, thing in classes.items()
            if any("Raises:" in (x.__doc__ or "") for x in (thing, *vars(thing).values()))
        }
        made = set(re.findall(r"\b(?:rk|shaping|scaling)\.(\w+)[.(,]", source))
        assert refusing - {"Parallel"} <= made, "Parallel takes process groups: parallel_checks.py"


def test_integers_of_numpy_are_pythons() -> None:
    """Generators take no other seeds, and NumPy's overflow in hashes."""
    x, mask, tied = torch.arange(1.0, 9.0), torch.ones(8), [[1.0] * 3] * 3
    group = torch.zeros(8, dtype=torch.int64)

    def results(seed: object) -> list[object]:
        out = rk.policy_loss(
            -x.expand(2, 8), torch.tensor([1, 0]), advantage=x[:2], weight=mask[:2],
            old_logprob=-x[:2], objective=rk.Objective.clip_cov(seed=seed),
        )  # fmt: skip
        return [
            out.loss,
            rk.covariance_mask(x, x.sin(), mask, seed=seed, fraction=0.5),
            rk.shaping.prioritised_sample(x, 3, seed=seed).indices,
            rk.shaping.elliptical_bonus(x.outer(x.cos()), group, project=2, seed=seed),
            rk.scaling.greedy_cluster(tied, max_members=1, seed=seed),
            rk.scaling.finish_plan([[0], [1]], 1, 1, seed=seed),
            rk.scaling.route_peers(["a", "b", "c"], 1, strategy="random", seed=seed),
        ]

    for a, b in zip(results(np.int64(7)), results(7), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    with pytest.raises(ValueError, match="seed: expected an integer in"):
        rk.Objective.clip_cov(seed=0.5)
    three = np.int64(3)
    assert rk.entropy_forks(X, X == 0, three).shape == (2, 3)
    assert rk.completion_probe(X, group[:2], [three - 1], [np.int64(0)]).tolist() == [0, 0]
    assert rk.latent_policy_gradient(X, X, 1.0, chunk_rows=three).loss.ndim == 0
