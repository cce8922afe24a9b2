"""The Triton kernels of logit control compile ahead of time for three architectures, unspilled."""

from __future__ import annotations

import json
import sys

import pytest
from triton_programs import assert_unspilled, compiled, output_of, resources, stack_bound

pytest.importorskip("triton", reason="the Triton backend needs triton, which is Linux only")

# kernel, optional arguments that are given, dense (or with statistics), type of the logits
TREE, CHAIN = ("draft_tokens", "parents", "temperature"), ("draft_tokens", "local_pos")
CASES = [
    ("modulate_kernel", TREE, True, "bf16"),
    ("modulate_kernel", CHAIN, False, "fp16"),
    ("modulate_kernel", (), False, "fp32"),
    ("modulate_kernel", TREE, False, "fp64"),
    ("commit_kernel", ("entropy", "confidence"), False, "fp32"),
    ("commit_kernel", (), False, "fp32"),
    ("describe_kernel", ("mask", "temperature", "entropy", "confidence"), True, "bf16"),
    ("describe_kernel", ("temperature", "entropy", "confidence"), False, "fp32"),
    ("raw_statistics_kernel", (), False, "fp16"),
]
SAMPLER = ("describe_kernel", "raw_statistics_kernel")
OPTIONAL = {"local_pos", "draft_tokens", "parents", "temperature", "entropy", "confidence", "mask"}
POINTEES = {"parents": "i32", "rings": "fp32"}
POINTEES |= dict.fromkeys(("temperature", "entropy", "confidence"), "fp32")
POINTEES |= dict.fromkeys(("top_p", "min_p", "lse"), "fp32")
POINTEES |= dict.fromkeys(("logprob", "entropy_raw", "max_prob", "values"), "fp32")
POINTEES |= {"mask": "i32", "bad_out": "i1"}  # the others hold int64


def compile_one(name, given, dense, dtype, cc):
    from reasonkern.modulation import triton_modulation, triton_sampler
    from reasonkern.speculation import triton_verify

    module, options = triton_modulation, triton_modulation.OPTIONS
    rows, block = triton_modulation.config(dense)
    if name in SAMPLER:
        module, options, block = triton_sampler, triton_verify.OPTIONS, triton_verify.BLOCK
    constants = {"DENSE": dense, "STATS": dense, "ROWS": rows, "BLOCK": block}
    constants |= dict.fromkeys(OPTIONAL - set(given))
    types = {"logits": dtype, "raw": dtype, **POINTEES}
    kernel = getattr(module, name)
    return compiled(kernel, cc, lambda n: f"*{types.get(n, 'i64')}", constants, options)


def compile_all(architectures):
    return [
        {"kernel": name, "case": case, "cc": cc, **resources(compile_one(name, *case, cc))}
        for name, *case in CASES
        for cc in architectures
    ]


if __name__ == "__main__":
    print(json.dumps(compile_all(json.loads(sys.argv[1]))))
    sys.exit()


@pytest.fixture(
    scope="module", params=[[90], pytest.param([80, 90, 100], marks=pytest.mark.slow)],
    ids=["core", "all"],
)  # fmt: skip
def report(request):
    rows = output_of(__file__, request.param)
    assert len(rows) == len(CASES) * len(request.param)
    return rows


def test_no_kernel_spills(report):
    for row in report:
        if row["kernel"] == "describe_kernel":
            # ptxas keeps one word on the stack, written once a row and read twice, to stay at 64
            # registers: with maxnreg=96 it takes 80 and no stack, but then one program of 512
            # threads fits a multiprocessor instead of two.
            assert row["STACK"] <= stack_bound(8) and row["REG"] <= 64
            row = row | {"STACK": 0}
        assert_unspilled(row)
