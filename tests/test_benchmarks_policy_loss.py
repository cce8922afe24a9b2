"""The benchmark cases of policy_loss: right gates, right inputs, a truth that refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import check, policy_loss
from benchmarks.case import Gate, Runner
from benchmarks.peers import eager, ours


def test_cpu_gates_are_those_of_the_design():
    gates = {
        (c.op, c.label, c.dtype, c.threads): {g.text() for g in c.gates}
        for c in policy_loss.CPU_GATED
    }
    loss = ("policy_loss", "dapo-entropy-inplace")
    assert gates == {
        (*loss, "float32", 1): {"time ≤ 2.2 × copy"},
        (*loss, "float32", 2): {
            "≥ 18 × faster than eager",
            "≥ 9 × faster than compile",
            "extra memory ≤ 1% of the input",
        },
        (*loss, "bfloat16", 2): {"≥ 18 × faster than eager"},
        ("token_stats", "", "float32", 2): {"≥ 5 × faster than logsumexp"},
    }
    assert all(c.shape == (256, 151_936) for c in policy_loss.CPU_GATED)
    assert policy_loss.CPU_GATED[0].gates[0] == Gate("time", 2.2, "copy", 25, "avx512")


def test_case_ids_are_unique_and_gates_refer_to_providers_of_the_case():
    cases = policy_loss.FAMILY.cases
    assert len({c.id for c in cases}) == len(cases)
    for case in cases:
        assert set(case.providers) <= set(policy_loss.FAMILY.providers)
        assert {g.against for g in case.gates} - {""} <= set(case.providers[1:])
    assert {c.shape[1] for c in cases if c.device == "cpu"} == set(policy_loss.VOCABULARIES)


SMALL = {
    "dapo": policy_loss.loss_case((64, 257), inplace=False),
    "dapo-plain": policy_loss.loss_case((64, 257), entropy=False, inplace=False),
    "gspo": policy_loss.loss_case((64, 257), spec=policy_loss.GSPO, inplace=False),
    "bf16": policy_loss.loss_case((64, 257), "bfloat16", inplace=False),
}


@pytest.fixture(params=SMALL, scope="module")
def small(request):
    case = SMALL[request.param]
    batch = policy_loss.make_inputs(case, 0)
    return case, batch, policy_loss.truth(case, batch)


def matches(outputs, truth):
    return max(check.compare(outputs, truth).values()) <= 1


def test_inputs_take_every_branch(small):
    case, batch, truth = small
    logprob = truth.values["logprob"].view(batch.targets.shape)
    log_ratio = logprob - batch.old_logprob
    if case.spec.sequence_level:
        log_ratio = log_ratio.mean(1, keepdim=True).expand_as(log_ratio)
    ratio, positive = log_ratio.exp(), (batch.advantage > 0).unsqueeze(1)
    low, high = ratio < case.spec.ratio_min, ratio > case.spec.ratio_max
    assert (high & positive).any() and (low & ~positive).any(), "no clipped token"
    assert (~(high & positive) & ~(low & ~positive)).any(), "no unclipped token"
    assert float(truth.values["logprob"].max()) > -0.1, "no dominant token"


def test_plain_torch_and_reasonkern_match_the_truth(small):
    case, batch, truth = small
    for build in (eager.policy_loss_runner, ours.policy_loss_runner):
        runner = build(case, batch)
        runner.reset()
        outputs = runner.outputs(runner.call())
        assert {"loss", "grad", "logprob"} <= set(outputs) and matches(outputs, truth)


def test_in_place_input_is_refilled(small):
    case, batch, truth = small
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, inplace=True))
    runner = ours.policy_loss_runner(case, batch)
    for _ in range(2):
        runner.reset()
        assert matches(runner.outputs(runner.call()), truth)


def damaged(grad, batch, how):
    grad = grad.clone()
    target = batch.targets.flatten().unsqueeze(1)
    if how == "target entry only":
        return torch.zeros_like(grad).scatter_(1, target, grad.gather(1, target))
    if how == "one entry off by a tenth":
        grad[:, 0] *= 1.1
        return grad
    if how == "a row left out":
        grad[grad.abs().sum(1).argmax()] = 0
        return grad
    return grad * 1.05


@pytest.mark.parametrize(
    "how", ["target entry only", "one entry off by a tenth", "a row left out", "scaled"]
)
def test_truth_rejects_a_damaged_gradient(small, how):
    _, batch, truth = small
    good = truth.values["grad"].to(batch.logits.dtype)
    assert matches({"grad": good}, truth)
    assert not matches({"grad": damaged(good, batch, how)}, truth)


def test_truth_rejects_a_forgotten_entropy_bonus():
    case = SMALL["dapo"]
    batch = policy_loss.make_inputs(case, 0)
    without = dataclasses.replace(case, spec=dataclasses.replace(case.spec, entropy_coef=0.0))
    runner = eager.policy_loss_runner(without, batch)
    found = check.compare(runner.outputs(runner.call()), policy_loss.truth(case, batch))
    assert found["grad"] > 1 and found["loss"] > 1 and found["logprob"] <= 1


def test_forced_backend_serves_every_op_and_is_noted():
    from reasonkern import _load

    def build(case, inputs):
        return Runner(lambda: _load.choose_cuda_backend("token_stats"))

    runner = ours.on_gpu("triton", build)(SMALL["dapo"], None)
    assert runner.call() == "triton"
    assert runner.about == {"backend": "triton", "ops": ["token_stats"]}


@pytest.mark.peers
@pytest.mark.parametrize(("name", "package"), [("trl", "trl"), ("liger", "liger_kernel")])
def test_peers_match_the_truth(small, name, package):
    pytest.importorskip(package)
    case, batch, truth = small
    if (case.dtype, name) == ("bfloat16", "trl"):
        pytest.skip("TRL computes in bfloat16 on CPU")
    runner = policy_loss.FAMILY.providers[name].build["policy_loss"](case, batch)
    outputs = runner.outputs(runner.call())
    assert {"loss", "grad"} <= set(outputs) and matches(outputs, truth)
