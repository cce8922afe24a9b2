"""The Triton kernels of logit control compile ahead of time for three architectures, unspilled.

Compiled in a process of its own: under the interpreter there is nothing to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
POINTEES = {"numbers": "fp64", "confidence_sum": "fp64", "parents": "i32"}
POINTEES |= dict.fromkeys(("set_offsets", "set_ids"), "i32")
POINTEES |= dict.fromkeys(("temperature", "entropy", "confidence"), "fp32")
POINTEES |= dict.fromkeys(("confidence_ring", "entropy_ring", "top_p", "min_p", "lse"), "fp32")
POINTEES |= dict.fromkeys(("logprob", "entropy_raw", "max_prob", "values"), "fp32")
POINTEES |= {"mask": "i32", "bad_out": "i1"}  # the others hold int64


def source(kernel, given, dense, dtype):
    from triton.compiler import ASTSource

    from reasonkern.modulation.triton_modulation import config

    rows, block = config(dense)
    constants = {"DENSE": dense, "STATS": dense, "ROWS": rows, "BLOCK": block}
    if kernel.__name__ in SAMPLER:
        constants["BLOCK"] = 2048
    constants |= dict.fromkeys(OPTIONAL - set(given))
    signature = {}
    for param in kernel.params:
        element = dtype if param.name in ("logits", "raw") else POINTEES.get(param.name, "i64")
        signature[param.name] = param.annotation_type or f"*{element}"
        if param.name in constants:
            signature[param.name] = "constexpr"
    constants = {name: value for name, value in constants.items() if name in signature}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


def compile_all(architectures):
    import triton
    from triton.backends.compiler import GPUTarget

    sys.path.insert(0, str(Path(__file__).parent))
    from test_triton_compile import resources

    from reasonkern.modulation import triton_modulation, triton_sampler
    from reasonkern.speculation import triton_verify

    rows = []
    for name, *case in CASES:
        for cc in architectures:
            module, options = triton_modulation, triton_modulation.OPTIONS
            if name in SAMPLER:
                module, options = triton_sampler, triton_verify.OPTIONS
            src = source(getattr(module, name), *case)
            target = GPUTarget("cuda", cc, 32)
            compiled = triton.compile(src, target=target, options=options)
            used = resources(compiled.asm["cubin"])
            rows.append({"kernel": name, "case": case, "cc": cc} | used)
    return rows


if __name__ == "__main__":
    print(json.dumps(compile_all(json.loads(sys.argv[1]))))
    sys.exit()


@pytest.fixture(
    scope="module", params=[[90], pytest.param([80, 90, 100], marks=pytest.mark.slow)],
    ids=["core", "all"],
)  # fmt: skip
def report(request):
    root = Path(__file__).parents[1]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    command = [sys.executable, __file__, json.dumps(request.param)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) == len(CASES) * len(request.param)
    return rows


def test_no_kernel_spills(report):
    for row in report:
        assert 0 < row["REG"] <= 255
        # A word of describe_kernel stays on the stack, at 64 registers as at 80.
        stack = 8 if row["kernel"] == "describe_kernel" else 0
        assert row["LOCAL"] == 0 and row["STACK"] <= stack, row
