"""The verification kernels in Triton compile ahead of time for three architectures, without spills.

Compiled in a process of its own: under the interpreter there is nothing to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [("full", 80, "bf16"), ("full", 90, "fp32"), ("bare", 90, "bf16"), ("full", 100, "fp16")]
OPTIONAL = {"mask", "eos", "max_length", "num_nodes"}
POINTEES = {"valid": "i1", "mask": "i32", "child_ptr": "i32", "child_index": "i32"}
POINTEES |= {"temperature": "fp32", "top_p": "fp32", "min_p": "fp32", "topk_logits": "fp32"}
POINTEES |= {"lse": "fp32", "out_status": "i32"}  # the others hold int64


def source(kernel, variant, dtype, block):
    from triton.compiler import ASTSource

    constants = {"BLOCK": block, "WIDTH": 4}
    if variant == "bare":
        constants |= dict.fromkeys(OPTIONAL)
    signature = {}
    for param in kernel.params:
        element = dtype if param.name == "logits" else POINTEES.get(param.name, "i64")
        signature[param.name] = param.annotation_type or f"*{element}"
        if param.name in constants:
            signature[param.name] = "constexpr"
    constants = {name: value for name, value in constants.items() if name in signature}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget

    sys.path.insert(0, str(Path(__file__).parent))
    from test_triton_compile import resources

    from reasonkern.speculation import triton_verify

    rows = []
    for variant, cc, dtype in CASES:
        for name in ("sample_kernel", "verify_kernel"):
            src = source(getattr(triton_verify, name), variant, dtype, triton_verify.BLOCK)
            compiled = triton.compile(
                src, target=GPUTarget("cuda", cc, 32), options=triton_verify.OPTIONS
            )
            fused = compiled.asm["ptx"].count("fma.rn.f32")
            row = {"kernel": name, "case": [variant, cc, dtype], "fused": fused}
            rows.append(row | resources(compiled.asm["cubin"]))
    return rows


if __name__ == "__main__":
    print(json.dumps(compile_all()))
    sys.exit()


@pytest.fixture(scope="module")
def report():
    root = Path(__file__).parents[1]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(report, case):
    rows = [row for row in report if tuple(row["case"]) == case]
    assert {row["kernel"] for row in rows} == {"sample_kernel", "verify_kernel"}
    for row in rows:
        assert 0 < row["REG"] <= 255
        assert (row["LOCAL"], row["STACK"]) == (0, 0), row


def test_nothing_is_contracted(report):
    """One fused multiply-add in the noise or in z/T, and the bits differ from the CPU's."""
    # Correctly rounded division is built from fused steps; no other kernel text has any.
    divisions = {row["kernel"]: row["fused"] for row in report}
    assert all(count == 0 for count in divisions.values()), divisions
