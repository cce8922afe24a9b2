"""Triton's kernels as they are compiled, in the simulator of PTX; what the simulator refuses."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import assert_same_bits
from speculation_cases import Step, random_logits, random_mask, random_tree, rows

pytest.importorskip("triton", reason="the Triton backend needs triton, which is Linux only")
if shutil.which(os.environ.get("CXX", "g++")) is None:
    pytest.skip("the simulator is compiled", allow_module_level=True)

from ptx_sim.program import Program, Simulator  # noqa: E402

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
INF, NAN = float("inf"), float("nan")

MODULE = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 k_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [k_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 8;
	add.s64 	%rd2, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r4, %r2, 128;
	xor.b32 	%r5, %r2, 4;
	mov.b64 	%rd3, {a};
	mov.b64 	%rd4, {b};
{body}
	ret;
}}
"""


@pytest.fixture(scope="module")
def simulator():
    return Simulator()


def run(simulator, body: str, warps: int = 1, a: int = 0, b: int = 0) -> list[int]:
    """What each thread stores at %rd2; %r2 is 4 times the thread, %rd3 and %rd4 are a and b."""
    text = MODULE.format(body=body, threads=32 * warps, a=a, b=b)
    out = torch.zeros(32 * warps, dtype=torch.int64)
    tensors = [(out.data_ptr(), out.data_ptr() + out.nbytes)]
    simulator.launch(
        Program(text, simulator.functions), 1024, (1, 1, 1), [out.data_ptr(), 0], tensors
    )
    return out.tolist()


# ---- what the simulator refuses

STORE, LOAD = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r3, [%r2];"
OTHER = "ld.shared.b32 %r3, [%r4];"  # another warp's
NEXT = "ld.shared.b32 %r3, [%r5];"  # another lane's
FIRST = "setp.lt.u32 %p1, %r1, 32;"  # warp
WRONG = {
    "an address outside the tensors": (1, "st.global.b64 [%rd2+8], %rd1;"),
    "a misaligned address": (1, "st.global.b32 [%rd2+2], %r1;"),
    "an address outside the shared": (1, "st.shared.b32 [%r2+1024], %r1;"),
    "a misaligned address of shared": (1, "ld.shared.b32 %r3, [%r2+2];"),
    "shared memory that nothing wrote": (1, LOAD),
    "a race: another thread wrote": (2, FIRST + "@%p1 " + STORE + "@!%p1 " + OTHER),
    "a race: another thread wrote this": (1, STORE + NEXT),
    "a race: another warp reads": (
        2, FIRST + STORE + "bar.sync 0; @%p1 " + OTHER + "@!%p1 " + STORE),
    "not all lanes of the warp": (
        1, "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;"),
    "a barrier that warps have ended before": (
        2, "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L; bar.sync 0; $L:"),
    "ptx_sim knows no tanh": (1, "tanh.approx.f32 %r3, %r1;"),
    "ptx_sim knows no bar.sync": (1, "bar.sync 1, 32;"),
    "an exchange among some lanes": (1, "shfl.sync.bfly.b32 %r3, %r1, 1, 31, 1;"),
    "would round twice": (1, "cvt.rn.f16.f64 %rs1, %rd3;"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_ends_the_launch(simulator, message):
    warps, body = WRONG[message]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        run(simulator, body, warps)


@pytest.mark.parametrize(
    ("warps", "body"), [(1, STORE + "bar.warp.sync -1;" + NEXT), (2, STORE + "bar.sync 0;" + OTHER)]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_ordered_is_no_race(simulator, monkeypatch, warps, body, backwards):
    monkeypatch.setattr(simulator, "backwards", backwards)
    got = run(simulator, body + "cvt.u64.u32 %rd5, %r3; st.global.b64 [%rd2], %rd5;", warps)
    assert got == [k ^ (1 if warps == 1 else 32) for k in range(32 * warps)]


# ---- numbers


def word(x: float | int, kind: str) -> int:
    return int.from_bytes(struct.pack(kind, x), "little")


F32, F64 = "<f", "<d"
NEGATIVE_ZERO, GPU_NAN = word(-0.0, F32), 0x7FFFFFFF
VALUES = [
    ("min.f32", F32, (0.0, -0.0), NEGATIVE_ZERO),
    ("max.f32", F32, (-0.0, 0.0), 0),
    ("max.f32", F32, (NAN, 1.0), word(1.0, F32)),
    ("max.f32", F32, (NAN, NAN), GPU_NAN),
    ("sub.rn.f32", F32, (INF, INF), GPU_NAN),
    ("mul.rn.f32", F32, (2.0**-75, 2.0**-74), 1),  # not flushed
    ("shl.b32", "<I", (1, 32), 0),
    ("shr.s32", "<i", (-5, 99), 0xFFFFFFFF),
    ("mul.hi.s32", "<i", (-1, 1), 0xFFFFFFFF),
    ("mul.hi.u32", "<I", (2**32 - 1, 2**32 - 1), 2**32 - 2),
    ("cvt.rzi.s32.f32", F32, (NAN,), 0),
    ("cvt.rzi.s32.f32", F32, (3e9,), 2**31 - 1),
    ("cvt.rzi.s32.f32", F32, (-1.9,), 2**32 - 1),
    ("cvt.rmi.f32.f32", F32, (-1.5,), word(-2.0, F32)),
    ("cvt.rn.f32.s32", "<i", (2**24 + 1,), word(2.0**24, F32)),
]


@pytest.mark.parametrize(("op", "kind", "given", "expected"), VALUES)
def test_values(simulator, op, kind, given, expected):
    a, b = (word(x, kind) for x in (*given, 0)[:2])
    second = ", %r6" if len(given) > 1 else ""
    body = f"cvt.u32.u64 %r5, %rd3; cvt.u32.u64 %r6, %rd4; {op} %r7, %r5{second};"
    body += "cvt.u64.u32 %rd5, %r7; st.global.b64 [%rd2], %rd5;"
    assert run(simulator, body, a=a, b=b) == [expected] * 32


def test_a_fused_multiply_add_rounds_once(simulator):
    x, square = 1 + 2.0**-30, "mul.rn.f64 %rd6, %rd3, %rd3; sub.rn.f64 %rd5, %rd6, %rd4;"
    fused = "neg.f64 %rd6, %rd4; fma.rn.f64 %rd5, %rd3, %rd3, %rd6;"
    a, b = word(x, F64), word(1 + 2.0**-29, F64)
    for body, expected in ((square, 0.0), (fused, 2.0**-60)):
        got = run(simulator, body + "st.global.b64 [%rd2], %rd5;", a=a, b=b)
        assert got == [word(expected, F64)] * 32


def test_lanes_that_part_meet_again(simulator):
    body = """
    mov.b32 %r3, 0;
    $LOOP:
    add.s32 %r3, %r3, 1;
    setp.lt.u32 %p1, %r3, %r1;
    @%p1 bra $LOOP;
    shfl.sync.idx.b32 %r4, %r3, 31, 31, -1;
    add.s32 %r4, %r4, %r3;
    cvt.u64.u32 %rd5, %r4; st.global.b64 [%rd2], %rd5;"""
    assert run(simulator, body) == [31 + max(k, 1) for k in range(32)]


# ---- the kernels: this file and others again, in a process whose Triton compiles

COMPILED = "ptx_sim.plugin" in sys.modules
RUNS = [
    ("test_ptx_sim.py", "compiled"),
    ("test_speculation_sample.py", "triton"),
    ("test_speculation_verify.py", "triton"),
    ("test_modulation_sampler.py", "triton and (walk or overflow or take_the_top)"),
]


@pytest.mark.skipif(COMPILED, reason="this is that process")
@pytest.mark.parametrize(("file", "chosen"), RUNS)
def test_in_a_process_that_compiles(file, chosen):
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(HERE)
    command = [sys.executable, "-m", "pytest", "-p", "ptx_sim.plugin", "-p", "no:cacheprovider"]
    command += ["-m", "", "-k", chosen, "-rN", str(HERE / file)]
    run = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 2


def call(op: str, backend: str, *args: object) -> Sequence[torch.Tensor]:
    from reasonkern import _load

    return _load.implementation(op, backend)(*args)


@pytest.mark.skipif(not COMPILED, reason="for test_in_a_process_that_compiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_compiled_samplers_agree(monkeypatch, seed, dtype):
    """Four operators that draw the same tokens, those that the CPU draws."""
    monkeypatch.setattr("ptx_sim.driver.SIMULATOR.backwards", seed % 2 == 1)
    batch, nodes = 6, 4
    vocab = (1, 2047, 5000, 6151, 130, 2049)[seed]
    logits = random_logits((batch, vocab), seed, dtype)
    logits[1, ::7] = -INF
    logits[2, vocab // 2] = (INF, NAN)[seed % 2]
    logits[3] = torch.where(torch.rand(vocab) < 0.5, 0.0, -0.0)
    logits[4] = (-INF, NAN, 1.0)[seed % 3]
    mask = random_mask(logits.shape, seed) | random_mask(logits.shape, seed + 1)
    mask = mask if seed % 2 else None
    r = rows(batch, vocab, seed, "mixed")
    token = call("sample", "triton", logits, mask, *r.args())
    assert_same_bits(token, call("sample", "cpu", logits, mask, *r.args()))
    controlled = call("sample_controlled", "triton", logits, mask, *r.args(), None, [])
    assert_same_bits(controlled[0], token)

    tree = random_tree(nodes, seed)
    drafts = torch.randint(vocab, (batch, nodes))
    drafts[:, 1] = token.clamp_min(0)
    step = Step(
        logits[:, None].expand(-1, nodes, -1), drafts, torch.ones(batch, nodes).bool(), tree, r,
        node_mask=None if mask is None else mask[:, None].expand(-1, nodes, -1),
    )  # fmt: skip
    out = call("verify_tree", "triton", *step.args())
    assert_same_bits(out[0][:, 0], token)
    following = call("sample", "triton", logits, mask, *r.args()[:5], r.position + 1)
    twice = out[1] > 1
    assert_same_bits(out[0][twice, 1], following[twice])
    expected = call("verify_tree", "cpu", *step.args())
    torch.testing.assert_close(out[5], expected[5], rtol=2e-7, atol=2e-7)  # the log-sum-exp
    assert_same_bits([*out[:5], out[6]], [*expected[:5], expected[6]])
    both = call("verify_controlled", "triton", *step.args(), None, [], bool(seed % 2))
    assert_same_bits(list(both[: len(out)]), list(out))


@pytest.mark.skipif(not COMPILED, reason="for test_in_a_process_that_compiles")
def test_compiled_rows_of_a_whole_vocabulary():
    vocab = 151_936
    logits, r = random_logits((4, vocab), 1, torch.bfloat16), rows(4, vocab, 1, "mixed")
    token = call("sample", "triton", logits, None, *r.args())
    assert_same_bits(token, call("sample", "cpu", logits, None, *r.args()))


@pytest.mark.skipif(not COMPILED, reason="for test_in_a_process_that_compiles")
def test_compiled_barriers_are_all_needed(monkeypatch):
    """Each that is taken away is missed: so the simulator sees a race, and so none was there."""
    from ptx_sim.driver import SIMULATOR

    from reasonkern.speculation.triton_verify import sample_kernel

    sample_kernel.device_caches.clear()
    r = replace(rows(2, 5000, 1), temperature=torch.tensor([0.7, 1.3]))
    args = (random_logits((2, 5000), 1), None, *r.args())
    call("sample", "triton", *args)
    (kernel,) = sample_kernel.device_caches[0][0].values()
    text = kernel.asm["ptx"]
    barriers = list(re.finditer(r"bar\.sync\s+0;", text))
    assert len(barriers) > 20
    for found in barriers:
        without = Program(text[: found.start()] + text[found.end() :], SIMULATOR.functions)
        monkeypatch.setattr(kernel, "function", without)
        with pytest.raises(RuntimeError, match="a race|nothing wrote"):
            call("sample", "triton", *args)
