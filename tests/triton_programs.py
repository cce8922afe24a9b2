"""Ahead-of-time compilation of Triton kernels, without a GPU.

The compiler cannot run in a process that interprets kernels (TRITON_INTERPRET=1), so a test file
that compiles is also a program: it prints what the compiler made of its kernels, and its tests
read that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def compiled(
    kernel: Any,
    cc: int,
    types: Callable[[str], Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """A kernel for one architecture; `types` of its parameters that have no annotation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, given = {}, {}
    for param in kernel.params:
        if param.name in constants:
            signature[param.name], given[param.name] = "constexpr", constants[param.name]
        else:
            signature[param.name] = param.annotation_type or types(param.name)
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(options))


# Bytes that a block may take on any GPU: those of sm_86, sm_89 and sm_120 have the least.
SHARED = 99 * 1024


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and local memory of a thread, shared memory of a block; in bytes."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used | {"SHARED": kernel.metadata.shared}


def fused_steps(kernel: Any) -> int:
    """Fused multiply-adds; those that a correctly rounded division is built from do not show."""
    return kernel.asm["ptx"].count("fma.rn.f32")


def output_of(program: str, *arguments: Any) -> Any:
    """What a test file prints as JSON, run as a program with its arguments as JSON."""
    root = Path(__file__).parents[1]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    command = [sys.executable, program, *map(json.dumps, arguments)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def stack_bound(stack: int = 0) -> int:
    """Bytes of a thread's stack: `stack` at most with Triton 3.6, which the GPUs' results are of.

    Later ones' assemblers spill a few words: 40 bytes were seen with 3.7.1, 56 with 3.9.
    """
    import triton

    return stack if triton.__version__.startswith("3.6.") else 64


def assert_unspilled(row: Mapping[str, Any]) -> None:
    """`resources` of a kernel: all in registers, and room for its block on every GPU."""
    assert 0 < row["REG"] <= 255 and row["LOCAL"] == 0 and row["STACK"] <= stack_bound(), row
    assert row["SHARED"] <= SHARED, row
