"""The verification kernels in Triton compile ahead of time for three architectures, unspilled."""

from __future__ import annotations

import json
import sys

import pytest
from triton_programs import assert_unspilled, compiled, fused_steps, output_of, resources

pytest.importorskip("triton", reason="the Triton backend needs triton, which is Linux only")

CASES = [("full", 80, "bf16"), ("full", 90, "fp32"), ("bare", 90, "bf16"), ("full", 100, "fp16")]
OPTIONAL = {"mask", "eos", "max_length", "num_nodes"}
POINTEES = {"valid": "i1", "mask": "i32", "child_ptr": "i32", "child_index": "i32"}
POINTEES |= {"temperature": "fp32", "top_p": "fp32", "min_p": "fp32", "topk_logits": "fp32"}
POINTEES |= {"lse": "fp32", "out_status": "i32"}  # the others hold int64


def compile_all():
    from reasonkern.speculation import triton_verify

    rows = []
    for variant, cc, dtype in CASES:
        constants = {"BLOCK": triton_verify.BLOCK, "WIDTH": 4}
        if variant == "bare":
            constants |= dict.fromkeys(OPTIONAL)
        types = {"logits": dtype, **POINTEES}
        for name in ("sample_kernel", "verify_kernel"):
            made = compiled(
                getattr(triton_verify, name), cc, lambda n, t=types: f"*{t.get(n, 'i64')}",
                constants, triton_verify.OPTIONS,
            )  # fmt: skip
            row = {"kernel": name, "case": [variant, cc, dtype], "fused": fused_steps(made)}
            rows.append(row | resources(made))
    return rows


if __name__ == "__main__":
    print(json.dumps(compile_all()))
    sys.exit()


@pytest.fixture(scope="module")
def report():
    return output_of(__file__)


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(report, case):
    rows = [row for row in report if tuple(row["case"]) == case]
    assert {row["kernel"] for row in rows} == {"sample_kernel", "verify_kernel"}
    for row in rows:
        assert_unspilled(row)


def test_nothing_is_contracted(report):
    """One fused multiply-add in the noise or in z/T, and the bits differ from the CPU's."""
    assert not [row for row in report if row["fused"]]
