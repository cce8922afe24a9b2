"""The GPU cases of modulation, with their inputs made on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import check, modulation_gpu
from benchmarks.case import Case


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


def test_every_control_acts_in_every_row():
    case = small(modulation_gpu.CASES[0])
    step = modulation_gpu.inputs(case, 0)
    got = modulation_gpu.truth(case, step).values["result"]
    before = modulation_gpu.shown(step.logits)
    columns = (got != before).all(0).nonzero().flatten().tolist()
    assert columns == [7, 10, 11, 12, 13, 14, 151, 199, *range(900, 905)]
    assert torch.equal((got < -1e29).all(0).nonzero().flatten(), torch.tensor([7, 151]))
