"""The benchmarks of modulation: providers match the truth, gates are those of the design."""

from __future__ import annotations

import pytest

from benchmarks import check, modulation
from benchmarks import modulation_rows as rows

SHAPE = (3, 16_000)
CASES = [
    rows.sparse_case(SHAPE, "every-control"),
    rows.sparse_case(SHAPE, "every-control", op="modulate_after_matmul"),
    rows.sparse_case(SHAPE, "every-control", dtype="bfloat16"),
    rows.sparse_case(SHAPE, "cyclic", "loop"),
    rows.sparse_case(SHAPE, "ban", "SuppressTokens"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_providers_match_the_truth(case):
    step = rows.inputs(case, 0)
    truth = rows.truth(case, step)
    changed = truth.values["logits"] != step.logits.double()
    # Every part writes to its ids in every row; a wave is 0 at multiples of half a period.
    assert changed[:, step.touched].float().mean() > 0.9
    assert changed.sum() == changed[:, step.touched].sum()
    for name in case.providers:
        if name == "SuppressTokens":
            pytest.importorskip("transformers")
        runner = modulation.FAMILY.providers[name].build[case.op](case, step)
        for _ in range(2):  # the second call works on what `reset` restores
            runner.reset()
            worst = check.compare(runner.outputs(runner.call()), truth)["logits"]
            assert worst <= 1.0, name


def test_a_wrong_result_is_found():
    case = CASES[0]
    step = rows.inputs(case, 0)
    truth = rows.truth(case, step)
    off = rows.shown(truth.values["logits"].float())["logits"]
    off[1, int(step.touched[0])] += 1e-3
    assert check.compare({"logits": off}, truth)["logits"] > 1.0


def test_gates_are_those_of_the_design():
    gates = {c.id: [g.text() for g in c.gates] for c in rows.GATED}
    sparse, cold, loop, ban = gates.values()
    assert sparse == ["≤ 30 µs per item", "time ≤ 1.5 × V=32,000"]
    assert cold == ["time ≤ 1.3 × index_add_"]
    assert loop == ["≥ 100 × faster than loop"] and ban == ["≥ 200 × faster than SuppressTokens"]
    assert {c.shape for c in rows.GATED} == {(64, 151_936)}
    assert all(c.threads == 1 for c in rows.GATED)
    assert len({c.id for c in modulation.FAMILY.cases}) == len(modulation.FAMILY.cases)
    for case in modulation.FAMILY.cases:
        assert set(case.providers) <= set(modulation.FAMILY.providers)
        assert case.op in modulation.FAMILY.providers[case.providers[0]].build
