"""The benchmark cases of linear_policy_loss: right gates, right inputs, a truth that refuses."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import check, engine, linear_policy_loss, report
from benchmarks.case import Gate

SMALL = {
    "dapo": linear_policy_loss.case((64, 16, 257), tokens=16, entropy=False),
    "dapo-entropy": linear_policy_loss.case((64, 16, 257), tokens=16),
    "gspo": linear_policy_loss.case((64, 16, 257), spec=linear_policy_loss.GSPO, tokens=16),
    "bf16": linear_policy_loss.case((64, 16, 257), "bfloat16", tokens=16),
}


@pytest.fixture(params=SMALL, scope="module")
def small(request):
    case = SMALL[request.param]
    batch = linear_policy_loss.make_inputs(case, 0)
    return case, batch, linear_policy_loss.truth(case, batch)


def outputs(case, batch, name):
    runner = linear_policy_loss.FAMILY.providers[name].build[case.op](case, batch)
    return runner.outputs(runner.call())


def worst(got, truth):
    return max(check.compare(got, truth).values())


def test_gates_are_those_of_the_design():
    gates = [
        (c.label, c.shape, {g.text() for g in c.gates})
        for c in linear_policy_loss.FAMILY.cases
        if c.gates and c.device == "cpu"
    ]
    memory = {f"extra memory ≤ 100% of that of {peer}" for peer in ("trl", "liger")}
    speed = {f"≥ 1 × faster than {peer}" for peer in ("trl", "liger")}
    assert gates == [
        ("dapo", (2048, 256, 32_000), {"time ≤ 1.15 × gemms", *speed, *memory}),
        ("dapo-entropy", (16_384, 256, 32_000), {"time ≤ 1.1 × calls-of-1k"}),
    ]
    cuda = [c for c in linear_policy_loss.FAMILY.cases if c.gates and c.device == "cuda"]
    assert all(c.shape == (8192, 4096, 151_936) and c.dtype == "bfloat16" for c in cuda)
    assert all(Gate("time", 1.25, "gemms") in c.gates for c in cuda)  # 80 % of their rate


def test_case_ids_are_unique_and_gates_refer_to_providers_of_the_case():
    cases = linear_policy_loss.FAMILY.cases
    assert len({c.id for c in cases}) == len(cases)
    for case in cases:
        assert set(case.providers) <= set(linear_policy_loss.FAMILY.providers)
        assert {g.against for g in case.gates} <= set(case.providers[1:])


def test_ratios_lie_inside_and_on_both_sides_of_the_bounds(small):
    case, batch, truth = small
    log_ratio = truth.values["logprob"].view(batch.targets.shape) - batch.old_logprob
    for low, high in ((-1.0, -0.3), (-0.2, 0.2), (0.3, 1.0)):
        assert ((low < log_ratio) & (log_ratio < high)).float().mean() > 0.15
    assert ((log_ratio - 0.2469).abs() > 0.1).all() and ((log_ratio + 0.2231).abs() > 0.1).all()


@pytest.mark.parametrize("name", ["reasonkern", "calls-of-1k", "eager"])
def test_eager_and_reasonkern_match_the_truth(small, name):
    assert worst(outputs(*small[:2], name), small[2]) <= 1


@pytest.mark.peers
@pytest.mark.parametrize("name", ["trl", "liger"])
def test_peers_match_the_truth(small, name):
    if name == "liger" and small[0].spec.entropy_coef:
        pytest.skip("no entropy bonus")
    assert worst(outputs(*small[:2], name), small[2]) <= 1


@pytest.mark.parametrize("name", ["grad_hidden", "grad_head", "logprob", "entropy"])
def test_truth_rejects_damage(small, name):
    case, batch, truth = small
    got = outputs(case, batch, "reasonkern")
    assert worst({name: got[name]}, truth) <= 1
    damaged = got[name].clone()
    damaged[damaged.view(len(damaged), -1).abs().amax(1).argmax()] *= 0.5
    assert worst({name: damaged}, truth) > 1


def test_truth_rejects_a_forgotten_entropy_bonus():
    case = SMALL["dapo-entropy"]
    batch = linear_policy_loss.make_inputs(case, 0)
    without = dataclasses.replace(case, spec=SMALL["dapo"].spec)
    assert worst(outputs(without, batch, "reasonkern"), linear_policy_loss.truth(case, batch)) > 1


def test_rate_of_matrix_products_and_memory_of_a_peer():
    case = dataclasses.replace(SMALL["dapo"], providers=("reasonkern", "gemms", "eager"))
    rows = {"reasonkern": {"status": "ok"}, "gemms": {"status": "ok"}}
    times = {"gemms": ([2e-3] * 3, [1e-3] * 3)}
    engine.summarise(linear_policy_loss.FAMILY, case, rows, times)
    assert rows["gemms"]["flop_rate"] == pytest.approx(6 * 64 * 16 * 257 / 1e-3)
    assert report.rate(rows["gemms"]) == "1.58 GF" and report.rate({"flop_rate": 7e14}) == "700 TF"
    named = [{"name": n, **row} for n, row in rows.items()]
    record = engine.describe(linear_policy_loss.FAMILY, case, named)
    for peak, status in ((150, "fail"), (90, "pass"), (None, "not measured")):
        named[0]["peak_bytes"], named[1]["peak_bytes"] = peak, 100
        assert engine.judge(Gate("memory", 1.0, "gemms"), record, {})["status"] == status
    assert case.input_bytes == 257 * 16 * 4
