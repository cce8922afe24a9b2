"""The GPU cases of modulation, with their inputs made on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import check, modulation_gpu
from benchmarks.case import Case
from reasonkern.modulation import layout as at


def small(case: Case) -> Case:
    batch, vocab = 5, case.shape[1] if case.op == "commit" else 1000
    assert case.input_shape is not None
    rows = batch * (case.input_shape[0] // case.shape[0])
    return dataclasses.replace(case, shape=(batch, vocab), input_shape=(rows, vocab), device="cpu")


@pytest.mark.parametrize("case", modulation_gpu.CASES, ids=lambda case: case.id)
def test_a_case_is_right_where_its_result_is_checked(case):
    case = small(case)
    step = modulation_gpu.inputs(case, 0)
    truth = modulation_gpu.truth(case, step)
    runner = modulation_gpu.OURS[case.op](case, step)
    for _ in range(2):  # later calls work on, the result stays that of the first
        outputs = runner.outputs(runner.call())
        assert max(check.compare(outputs, truth).values()) <= 1.0
    assert runner.repeat == (1 if case.label == "cold" else modulation_gpu.LAUNCHES)
    off = {"result": outputs["result"] + 1}
    assert check.compare(off, truth)["result"] > 1.0
    for name in case.providers[2:]:
        modulation_gpu.PROVIDERS[name].build[case.op](case, step).call()


def test_every_call_commits_to_the_same_requests_whose_budgets_last(monkeypatch):
    case = small(next(c for c in modulation_gpu.CASES if c.op == "commit" and c.label == "hot"))
    step = modulation_gpu.inputs(case, 0)
    begun = step.state.tensors.records.clone()
    commit, seen = modulation_gpu.rk.commit_, []

    def watched(state, *args):
        seen.append(state.tensors.records.clone())
        commit(state, *args)

    monkeypatch.setattr(modulation_gpu.rk, "commit_", watched)
    runner = modulation_gpu.OURS["commit"](case, step)
    for _ in range(2):
        runner.reset()
        runner.call()
    second = seen[-modulation_gpu.LAUNCHES :]
    assert torch.equal(second[0], begun) and not torch.equal(second[1], begun)
    assert torch.equal(step.state.tensors.records, begun)
    assert max(records[:, at.SPENT].max() for records in seen) < begun[:, at.BUDGET_TOKENS].min()


def test_every_control_acts_in_every_row():
    case = small(modulation_gpu.CASES[0])
    step = modulation_gpu.inputs(case, 0)
    got = modulation_gpu.truth(case, step).values["result"]
    before = modulation_gpu.shown(step.logits)
    columns = (got != before).all(0).nonzero().flatten().tolist()
    assert columns == [7, 10, 11, 12, 13, 14, 151, 199, *range(900, 905)]
    assert torch.equal((got < -1e29).all(0).nonzero().flatten(), torch.tensor([7, 151]))
