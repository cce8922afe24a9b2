"""Every ValueError of the public functions: argument, expectation, what was given."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policy_loss_literal import LENGTHS, T, V, batch, make_batch, spread
from torch.testing import assert_close

from reasonkern import KL, Objective, policy_loss, token_stats

B, N = len(LENGTHS), sum(LENGTHS)
NAN, INF = float("nan"), float("inf")
META = {"device": "meta"}
F = torch.zeros(B, T)
IDS = torch.zeros(B, T, dtype=torch.int64)
ROWS = ("old_logprob", "weight", "entropy_weight", "ref_logprob", "rollout_logprob")
NOT_LONG = "targets: expected dtype torch.int64 or torch.int32, got torch.float32"
CISPO_ORDER = " (cispo takes ratio_max first, then ratio_min)"
DTYPES = "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64"
SEQUENCE_LEVEL = (Objective.gspo(), Objective.gmpo(), Objective.vespo())
BY_SEQUENCE = (
    *SEQUENCE_LEVEL,
    Objective.gtpo(),
    Objective.ppo(opsm=0.1),
    Objective.ppo(importance=("sequence", "truncate", None, 2.0)),
)


def call(form: str = "padded", **changes: Any) -> Any:
    b = batch(form).to(torch.float32)
    given: dict[str, Any] = {"logits": b.logits, "targets": b.targets, "objective": Objective.ppo()}
    given |= b.given() | changes
    return policy_loss(given.pop("logits"), given.pop("targets"), **given)


PADDED: list[tuple[dict[str, Any], str]] = [
    ({"logits": [1.0]}, "logits: expected a tensor, got list"),
    ({"targets": None}, "targets: expected a tensor, got NoneType"),
    ({"advantage": 1.0}, "advantage: expected a tensor, got float"),
    ({"loss_scale": 2.0}, "loss_scale: expected a tensor, got float"),
    (
        {"objective": "ppo"},
        "objective: expected an Objective, such as Objective.dapo(), or a function, got 'ppo'",
    ),
    (
        {"objective": Objective.gppo},
        "objective: expected an Objective, Objective.gppo(), got its constructor, Objective.gppo",
    ),
    (
        {"objective": Objective},
        "objective: expected an Objective, such as Objective.dapo(), got a class",
    ),
    ({"inplace_grad": "no"}, "inplace_grad: expected False or True, got 'no'"),
    ({"logits": F[..., None].long()}, f"logits: expected dtype {DTYPES}, got torch.int64"),
    ({"logits": F[0]}, "logits: expected shape (N, V) or (B, T, V), got (6,)"),
    ({"logits": F[None, None]}, "logits: expected shape (N, V) or (B, T, V), got (1, 1, 4, 6)"),
    (
        {"logits": F[..., None][..., :0]},
        "logits: expected a vocabulary of at least 1, got (4, 6, 0)",
    ),
    (
        {"logits": torch.zeros(B, V, T).mT},
        "logits: expected the last dimension contiguous (logits.contiguous() copies them), "
        "got strides (78, 1, 6)",
    ),
    (
        {"logits": torch.zeros(V).expand(B, T, V), "inplace_grad": True},
        "logits: expected rows that do not share memory for inplace_grad, got (0, 0, 1)",
    ),
    ({"targets": IDS[:, 1:]}, "targets: expected shape logits.shape[:-1] = (4, 6), got (4, 5)"),
    ({"targets": F}, NOT_LONG),
    ({"targets": IDS.to("meta")}, "targets: expected the device of logits, cpu, got meta"),
    *(({name: 1.0}, f"{name}: expected a tensor, got float") for name in ROWS),
    *(
        (
            {name: F.to(dtype)},
            f"{name}: expected mask x normaliser in floats, from token_weights, got a tensor of "
            f"{dtype}",
        )
        for name in ("weight", "entropy_weight")
        for dtype in (torch.bool, torch.uint8, torch.int64)
    ),
    *(
        ({name: F.to("meta")}, f"{name}: expected the device of logits, cpu, got meta")
        for name in (*ROWS, "advantage", "temperature")
    ),
    *(
        (
            {name: 1 + F[:, 1:]},
            f"{name}: expected one value per token, (4, 6){of_sequences}, got shape (4, 5)",
        )
        for names, of_sequences in (
            (ROWS, ""),
            (("advantage", "temperature"), ", or one per sequence, (4,)"),
        )
        for name in names
    ),
    (
        {"advantage": torch.ones(B + 1)},
        "advantage: expected one value per token, (4, 6), or one per sequence, (4,), "
        "got shape (5,)",
    ),
    ({"loss_scale": F}, "loss_scale: expected a 0-dim tensor, got shape (4, 6)"),
    ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": -1}, "temperature: expected a finite number > 0, got -1"),
    ({"temperature": NAN}, "temperature: expected a finite number > 0, got nan"),
    (
        {"temperature": torch.tensor([1.0, 0.0, 1, 1])},
        "temperature: expected finite positive values, got 0.0 at (1,)",
    ),
    (
        {"temperature": torch.tensor(INF)},
        "temperature: expected finite positive values, got inf at (0, 0)",
    ),
    ({"softcap": 0.0}, "softcap: expected a finite number > 0, got 0.0"),
    ({"softcap": -30.0}, "softcap: expected a finite number > 0, got -30.0"),
    ({"weight": F + NAN}, "weight: expected finite values, got nan at (0, 0)"),
    ({"entropy_weight": F - INF}, "entropy_weight: expected finite values, got -inf at (0, 0)"),
    (
        {"advantage": torch.tensor([0, 0, NAN, 0])},
        "advantage: expected finite values, got nan at (2,)",
    ),
    ({"advantage": F + INF}, "advantage: expected finite values, got inf at (0, 0)"),
    (
        {"targets": IDS + V},
        "targets: expected values in [0, 13) in rows with a weight (of a mask such as targets != "
        "-100), got 13 at (0, 0)",
    ),
    (
        {"targets": IDS - 100},
        "targets: expected values in [0, 13) in rows with a weight (of a mask such as targets != "
        "-100), got -100 at (0, 0)",
    ),
    (
        {"segments": torch.tensor([0, 4])},
        "segments: expected None for padded (B, T) tokens (packed ones of shape (1, N) take "
        "squeeze(0)), got cu_seqlens",
    ),
    (
        {"objective": Objective.ppo(kl=("k3", 0.1))},
        "ref_logprob: expected a tensor for objective ppo with kl, got None",
    ),
    *(
        (
            {"objective": o, "rollout_logprob": None},
            "rollout_logprob: expected a tensor for importance or opsm, got None",
        )
        for o in (*BY_SEQUENCE[-2:], Objective.ppo(importance=("token", "mask", 0.5, 2.0)))
    ),
    *(
        (
            {"objective": o, "advantage": F},
            f"advantage: expected one value per sequence, (4,), for objective {o.name}, "
            "got shape (4, 6)",
        )
        for o in SEQUENCE_LEVEL
    ),
    (
        {"objective": Objective.bapo(), "rollout_logprob": None},
        "rollout_logprob: expected a tensor for bapo as in the paper (old_logprob, if that "
        "policy sampled), got None",
    ),
    (
        {"objective": lambda logp, entropy, ctx: logp[0]},
        "objective: expected a token_loss of shape (4, 6), got (6,)",
    ),
    (
        {"objective": lambda logp, entropy, ctx: 1.0},
        "objective: expected a token_loss of shape (4, 6), got float",
    ),
    *(
        (
            {"objective": Objective.ppo(**{name: torch.ones(shape)})},
            f"objective {name}: expected a float, a 0-dim tensor or one value per row (4, 6), "
            f"got shape {shape}",
        )
        for name, shape in (("ratio_max", (T, B)), ("entropy_coef", (B,)), ("dual_clip", (T,)))
    ),
]
PACKED: list[tuple[dict[str, Any], str]] = [
    (
        {"advantage": torch.ones(B + 1)},
        "advantage: expected one value per segment, (4,), got shape (5,)",
    ),
    (
        {"advantage": torch.tensor([1, 1, INF, 1])},
        "advantage: expected finite values, got inf at (2,)",
    ),
    (
        {"temperature": torch.tensor([1, 1, NAN, 1])},
        "temperature: expected finite positive values, got nan at (2,)",
    ),
    (
        {"temperature": torch.ones(3)},
        "temperature: expected one value per segment, (4,), got shape (3,)",
    ),
    (
        {"objective": Objective.gspo(), "advantage": torch.ones(N)},
        "advantage: expected one value per segment, (4,), got shape (10,)",
    ),
    *(
        (
            {"segments": None, name: torch.ones(B)},
            f"{name}: expected one value per token, (10,) (for one per sequence, packed logits "
            "need segments=cu_seqlens), got shape (4,)",
        )
        for name in ("advantage", "temperature")
    ),
    ({"segments": [0, N]}, "segments: expected a tensor, got list"),
    (
        {"segments": torch.tensor([0.0, N])},
        "segments: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    (
        {"segments": torch.tensor([0])},
        "segments: expected cu_seqlens of shape (S + 1,), S >= 1, got (1,)",
    ),
    (
        {"segments": torch.tensor([[0, N]])},
        "segments: expected cu_seqlens of shape (S + 1,), S >= 1, got (1, 2)",
    ),
    (
        {"segments": torch.tensor([0, N], **META)},
        "segments: expected the device of targets, cpu, got meta",
    ),
    *(
        (
            {"segments": torch.tensor(ends)},
            "segments: expected non-decreasing offsets from 0 to 10 (padding is a segment, too), "
            f"got {ends}",
        )
        for ends in ([0, 9], [1, 10], [0, 6, 4, 10], [0, 11])
    ),
    *(
        (
            {
                "objective": o,
                "segments": None,
                "advantage": torch.ones(N),
                "rollout_logprob": torch.zeros(N),
            },
            f"segments: expected cu_seqlens for packed tokens with objective {o.name}, got None",
        )
        for o in BY_SEQUENCE
    ),
]
# constructor, keywords, message after "objective "
OBJECTIVES: list[tuple[str, dict[str, Any], str]] = [
    ("ppo", {"ratio_cap": 1.2}, "ratio_cap: expected more than ratio_max = 1.2, got 1.2"),
    (
        "ppo",
        {"ratio_max": None, "ratio_cap": 2.0},
        "ratio_cap: expected more than ratio_max = None, got 2.0",
    ),
    ("ppo", {"dual_clip": 1.0}, "dual_clip: expected a ratio > 1 or None, got 1.0"),
    *(
        (
            "ppo",
            {"ratio_min": lo},
            f"ratio_min: expected a ratio in [0, 1], not an epsilon, or None, got {lo}",
        )
        for lo in (-0.2, 1.1)
    ),
    *(
        (
            name,
            {"ratio_max": 0.28},
            "ratio_max: expected a ratio >= 1, not an epsilon, or None, got 0.28",
        )
        for name in ("dapo", "gspo")
    ),
    *(
        (
            name,
            {"ratio_min": 0.2, "ratio_max": 0.28},
            "ratio_max: expected a ratio >= 1, not an epsilon, or None (ratio_min=0.8, "
            f"ratio_max=1.28 for the epsilons 0.2 and 0.28){order}, got 0.28",
        )
        for name, order in (("dapo", ""), ("cispo", CISPO_ORDER))
    ),
    (
        "gspo",
        {"ratio_min": 3e-4, "ratio_max": 4e-4},
        "ratio_max: expected a ratio >= 1, not an epsilon, or None (ratio_min=0.9997, "
        "ratio_max=1.0004 for the epsilons 0.0003 and 0.0004), got 0.0004",
    ),
    (
        "cispo",
        {"ratio_min": 5, "ratio_max": 0.2},  # cispo(0.2, 5)
        f"ratio_min: expected a ratio in [0, 1], not an epsilon, or None{CISPO_ORDER}, got 5",
    ),
    ("ppo", {"selection": 0.5}, "selection: expected a tensor, got float"),
    *(
        ("ppo", {name: NAN}, f"{name}: expected a number, got nan")
        for name in ("ratio_min", "ratio_max", "dual_clip", "ratio_cap", "entropy_coef",
                     "log_ratio_clamp", "opsm")
    ),
    ("ppo", {"ratio_min": "0.8"}, "ratio_min: expected a number, got '0.8'"),
    ("ppo", {"entropy_coef": True}, "entropy_coef: expected a number, got True"),
    ("ppo", {"kl": ("k3", True)}, "kl: expected a finite coefficient >= 0, got True"),
    ("ppo", {"entropy_coef": None}, "entropy_coef: expected a number, got None"),
    ("ppo", {"entropy_coef": INF}, "entropy_coef: expected a finite number, got inf"),
    ("ppo", {"log_ratio_clamp": 0.0}, "log_ratio_clamp: expected a number > 0 or None, got 0.0"),
    ("sapo", {"tau_positive": 0.0}, "tau_positive: expected a finite number > 0, got 0.0"),
    ("sapo", {"tau_negative": NAN}, "tau_negative: expected a number, got nan"),
    ("sapo", {"tau_negative": None}, "tau_negative: expected a number, got None"),
    ("dppo_tv", {"threshold_low": -0.1}, "threshold_low: expected a finite number > 0, got -0.1"),
    ("dppo_kl", {"threshold_high": 0.0}, "threshold_high: expected a finite number > 0, got 0.0"),
    ("dro", {"beta": 0.0}, "beta: expected a finite number > 0, got 0.0"),
    ("gppo", {"beta_low": -1.0}, "beta_low: expected a finite number >= 0, got -1.0"),
    (
        "vespo",
        {"k_positive": 0.0},
        "vespo: expected finite k, lambda > 0, got (0.0, 3.0, 3.0, 2.0)",
    ),
    (
        "vespo",
        {"lambda_negative": float("inf")},
        "vespo: expected finite k, lambda > 0, got (2.0, 3.0, 3.0, inf)",
    ),
    ("cispo", {"dual_clip": 3.0}, "dual_clip: expected None for cispo, got 3.0"),
    ("gppo", {"ratio_cap": 3.0}, "ratio_cap: expected None for gppo, got 3.0"),
    ("gmpo", {"dual_clip": 3.0}, "dual_clip: expected None for gmpo, got 3.0"),
    ("ppo", {"kl": ("k4", 0.1)}, "kl: expected estimator k1, k2 or k3, got k4"),
    ("ppo", {"kl": ("k3", NAN)}, "kl: expected a finite coefficient >= 0, got nan"),
    ("ppo", {"kl": ("k3", -0.1)}, "kl: expected a finite coefficient >= 0, got -0.1"),
    (
        "ppo",
        {"kl": ("k3",)},
        "kl: expected KL(estimator, coef, unbiased) or such a tuple, got ('k3',)",
    ),
    ("ppo", {"kl": 0.1}, "kl: expected KL(estimator, coef, unbiased) or such a tuple, got 0.1"),
    (
        "ppo",
        {"importance": ("token", "mask")},
        "importance: expected Importance(level, mode, lo, hi, geometric_mean) or such a tuple, "
        "got ('token', 'mask')",
    ),
    (
        "ppo",
        {"importance": ("batch", "mask", 0.5, 2.0)},
        "importance: expected level token or sequence, got batch",
    ),
    (
        "ppo",
        {"importance": ("token", "clip", 0.5, 2.0)},
        "importance: expected mode truncate or mask, got clip",
    ),
    *(
        (
            "ppo",
            {"importance": ("token", "mask", lo, hi)},
            f"importance: expected 0 <= lo <= hi, got ({lo}, {hi})",
        )
        for lo, hi in ((2.0, 0.5), (-1.0, None), (None, -1.0), (NAN, 2.0), (None, NAN))
    ),
]  # fmt: skip
STATS: list[tuple[dict[str, Any], str]] = [
    ({"mask": F + 2}, "mask: expected bool or 0/1 values, got 2.0 at (0, 0)"),
    ({"mask": F[:1].bool()}, "mask: expected shape targets.shape = (4, 6), got (1, 6)"),
    ({"mask": F.bool().to("meta")}, "mask: expected the device of logits, cpu, got meta"),
    ({"mask": [True]}, "mask: expected a tensor, got list"),
    (
        {"targets": IDS - 100},
        "targets: expected values in [0, 13) in rows that mask= keeps (such as targets != -100), "
        "got -100 at (0, 0)",
    ),
    ({"targets": F}, NOT_LONG),
    ({"temperature": -0.5}, "temperature: expected a finite number > 0, got -0.5"),
    ({"softcap": NAN}, "softcap: expected a finite number > 0, got nan"),
]


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def cases(table: list[Any]) -> Any:
    return {"argvalues": table, "ids": [row[-1][:50] for row in table]}


@pytest.mark.parametrize(("changes", "message"), **cases(PADDED))
def test_error_with_padded_rows(changes: dict[str, Any], message: str) -> None:
    with raises(message):
        call(**changes)


@pytest.mark.parametrize(("changes", "message"), **cases(PACKED))
def test_error_with_packed_rows(changes: dict[str, Any], message: str) -> None:
    with raises(message):
        call("packed", **changes)


@pytest.mark.parametrize(("constructor", "keywords", "message"), **cases(OBJECTIVES))
def test_error_of_an_objective(constructor: str, keywords: dict[str, Any], message: str) -> None:
    with raises("objective " + message):
        getattr(Objective, constructor)(**keywords)


def test_numpys_numbers_are_taken_for_pythons() -> None:
    """Their bounds are checked, too."""
    half, two = np.float32(0.5), np.int64(2)
    terms = {"kl": ("k3", half), "importance": ("token", "mask", half, two), "opsm": half}
    o = Objective.ppo(half, two, entropy_coef=half, **terms)
    expected = Objective.ppo(0.5, 2.0, kl=("k3", 0.5), entropy_coef=0.5)
    assert o.numbers() == expected.numbers() and all(type(x) is float for x in o.numbers())
    assert o.importance == ("token", "mask", 0.5, 2.0, False) and o.opsm == 0.5
    for wrong in (half, np.float32("nan"), np.bool_(True)):
        with pytest.raises(ValueError, match=r"^objective ratio_max: expected a "):
            Objective.ppo(ratio_max=wrong)


def test_gtpo_names_its_own_argument():
    with pytest.raises(ValueError, match="conflict_weights: expected a tensor or None, got 0.2"):
        Objective.gtpo(0.2)


def test_a_custom_objective_is_a_function():
    with raises(
        "objective custom: expected a function (logprob, entropy, ctx) -> token_loss, got 3"
    ):
        Objective.custom(3)


def test_the_class_itself_is_no_objective() -> None:
    """A name alone would clip nothing, and a misspelt argument would be lost."""
    constructor = "Objective: expected a constructor, Objective.dapo(), got Objective"
    for given in ((), ("dapo",)):
        with pytest.raises(TypeError, match=re.escape(constructor)):
            Objective(*given)
    expected = r"^Objective.ppo: expected ratio_min, ratio_max, kl, .*, ratio_cap, got clip_ratio$"
    with pytest.raises(TypeError, match=expected):
        Objective.ppo(clip_ratio=0.2)


@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        ("dapo", "low"),
        ("bapo", "ratio_min"),
        ("gpg", "ratio_max"),
        ("gtpo", "selection"),
        ("gspo", "log_ratio_penalty"),
    ],
)
def test_a_constructor_takes_its_own_arguments(constructor: str, name: str) -> None:
    """Not those of another one, which would change nothing."""
    with pytest.raises(TypeError, match=rf"^Objective.{constructor}: expected .*, got {name}$"):
        getattr(Objective, constructor)(**{name: 0.9})


def test_a_penalty_that_would_change_nothing_is_refused() -> None:
    """No constructor takes one, but `dataclasses.replace` does."""
    with raises("objective log_ratio_penalty: expected 0 unless level is token, got 0.1"):
        replace(Objective.gspo(), log_ratio_penalty=0.1)


@pytest.mark.parametrize(("name", "epsilon"), [("ppo", 0.2), ("dapo", 0.28), ("gspo", 3e-4)])
def test_an_epsilon_alone_is_a_bound_and_warned_of(name: str, epsilon: float) -> None:
    """It would clip nothing below: 0.2 is a legal lower bound, and ratio_max has a default."""
    meant = f"ratio_min: expected a ratio, {1 - epsilon:.4g} for an epsilon of {epsilon:g}"
    with pytest.warns(UserWarning, match=re.escape(meant)) as found:
        o = getattr(Objective, name)(epsilon)
    assert o.ratio_min == epsilon and found[0].filename == __file__


def test_unusual_bounds_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for constructor in {row[0] for row in OBJECTIVES}:
            getattr(Objective, constructor)()
        Objective.ppo(0.5), Objective.ppo(0, 1.2), Objective.ppo(None, 1.2)
        Objective.ppo(0.2, 3.0), Objective.reinforce(0.1, 10.0), Objective.dppo_tv(0.1)


@pytest.mark.parametrize(("changes", "message"), **cases(STATS))
def test_error_of_token_stats(changes: dict[str, Any], message: str) -> None:
    given = {"targets": IDS} | changes
    with raises(message):
        token_stats(torch.zeros(B, T, V), given.pop("targets"), **given)


def test_the_unchanged_calls_are_accepted() -> None:
    assert torch.isfinite(call().loss) and torch.isfinite(call("packed").loss)
    assert torch.isfinite(token_stats(torch.zeros(B, T, V), IDS).entropy).all()
    for constructor in {row[0] for row in OBJECTIVES}:
        getattr(Objective, constructor)()


def test_what_masked_rows_may_hold() -> None:
    """-100, NaN log-probabilities, advantages and logits of weight 0 are never looked at."""
    b = make_batch(torch.float32)
    assert (b.targets[~b.mask] == -100).all() and b.old_logprob[~b.mask].isnan().all()
    dirty = torch.where(b.mask[..., None], b.logits, NAN)
    advantage = torch.where(b.mask, spread(b, b.advantage), NAN)
    names = {name: getattr(b, name) for name in ("ref_logprob", "rollout_logprob")}
    o = Objective.ppo(kl=("k2", 0.1), importance=("token", "truncate", None, 2.0))
    expected = call(objective=o, **names)
    out = call(logits=dirty, advantage=advantage, objective=o, **names)
    assert math.isfinite(out.loss) and torch.equal(out.loss, expected.loss)
    assert_close(out.metrics.compute(), expected.metrics.compute())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("k4", 0.1), "kl: expected estimator k1, k2 or k3, got k4"),
        (("k3", -0.1), "kl: expected a finite coefficient >= 0, got -0.1"),
    ],
)
def test_a_kl_term_without_meaning(given: Any, message: str) -> None:
    """Where it is made, before an objective has it."""
    with pytest.raises(ValueError, match=message):
        KL(*given)
