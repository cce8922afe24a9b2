"""The benchmark cases of shaping: right gates, a truth that refuses."""

from __future__ import annotations

import pytest

from benchmarks import check, shaping


def test_gates_and_cases():
    gates = {c.op: {g.text() for g in c.gates} for c in shaping.GATED}
    assert gates == {
        "gae": {"≥ 20 × faster than loop", "≥ 3 × faster than blocked"},
        "elliptical_bonus": {"≥ 1 × faster than rank-one"},
    }
    assert [c.shape for c in shaping.GATED] == [(256, 8192), (16, 4096)]
    cases = shaping.FAMILY.cases
    assert len({c.id for c in cases}) == len(cases)
    for case in cases:
        assert set(case.providers) <= set(shaping.FAMILY.providers)


SMALL = [
    shaping.case("gae", (3, 128), ("reasonkern", "loop", "blocked")),
    shaping.case("gae", (3, 128), ("reasonkern", "loop"), label="masked"),
    shaping.case("elliptical_bonus", (5, 30), ("reasonkern", "rank-one")),
    shaping.case("elliptical_select", (40, 9), ("reasonkern", "rank-one")),
]


def matches(outputs, truth):
    return max(check.compare(outputs, truth).values()) <= 1


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_providers_match_their_truth(case):
    batch = shaping.make_inputs(case, 0)
    truth = shaping.truth(case, batch)
    for name in case.providers:
        runner = shaping.FAMILY.providers[name].build[case.op](case, batch)
        assert matches(runner.outputs(runner.call()), truth), name
    wrong = {key: value + 1e-3 * value.abs().max() for key, value in truth.values.items()}
    assert not matches(wrong, truth)
