"""Compiles the Triton kernels of the table ahead of time, without a GPU, and asserts no spills.

The compiler cannot run in a process that interprets kernels, so this file is also a program, as
tests/test_triton_compile.py is.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton, which is Linux only")

POINTEES = {
    "slots": "i32", "counts": "i16", "epochs": "i32", "parents": "i32", "depths": "i32",
    "child_ptr": "i32", "child_index": "i32", "level_ptr": "i32", "level_nodes": "i32",
    "temperature_ptr": "fp32", "valid": "i8", "q_logprob": "fp32", "logits": "fp32", "lse": "fp32",
    "values": "i32", "ages": "i32",
}  # fmt: skip
SHAPE = {"WINDOW": 4, "ORDERS": 0b1110, "NUM_ORDERS": 3}
EXTRA = {0: "u8", 1: "u8", 2: "i64"}


def cases(storages):
    for storage in storages:
        for kind in range(3):
            yield "draft_kernel", {"KIND": kind, "STORAGE": storage, **SHAPE}
        yield "merge_kernel", {"STORAGE": storage}
    yield "keys_kernel", SHAPE


def compile_one(kernel, constants, cc):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reasonkern.speculation.triton_table import OPTIONS

    signature = {}
    for param in kernel.params:
        pointee = POINTEES.get(param.name, "i64")
        if param.name == "extra":
            pointee = EXTRA[constants["STORAGE"]]
        signature[param.name] = param.annotation_type or f"*{pointee}"
        if param.name in constants:
            signature[param.name] = "constexpr"
    options = OPTIONS | ({"num_warps": 1} if kernel.__name__ == "merge_kernel" else {})
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    used["fma"] = len(re.findall(r"^\s*(?:@\S+ )?fma\.rn\.f32", compiled.asm["ptx"], re.MULTILINE))
    return used


def compile_all(storages, architectures):
    from reasonkern.speculation import triton_table

    return [
        {"kernel": name, "cc": cc, **compile_one(getattr(triton_table, name), constants, cc)}
        for name, constants in cases(storages)
        for cc in architectures
    ]


PACKED_ON_HOPPER = [[0], [90]]
EVERYTHING = [list(EXTRA), [80, 90, 100]]


@pytest.fixture(
    scope="module", params=[PACKED_ON_HOPPER, pytest.param(EVERYTHING, marks=pytest.mark.slow)],
    ids=["core", "all"],
)  # fmt: skip
def compiled(request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(request.param[1]) * len(list(cases(request.param[0])))
    return rows


def test_no_kernel_spills(compiled):
    assert not [row for row in compiled if row["STACK"] or row["LOCAL"]]


def test_nothing_is_contracted(compiled):
    """A fused multiply-add would change bits; division by Newton steps is inside div.rn."""
    assert not [row for row in compiled if row["fma"]]


if __name__ == "__main__":
    print(json.dumps(compile_all(*json.loads(sys.argv[1]))))
