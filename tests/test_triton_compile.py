"""Compiles every Triton kernel of policy_loss and shaping ahead of time, without a GPU."""

import ast
import inspect
import json
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from triton_programs import assert_unspilled, compiled, output_of, resources

pytest.importorskip("triton", reason="the Triton backend needs triton, which is Linux only")

OF_LOGITS = ("stats_kernel", "stats_backward_kernel", "loss_kernel", "scale_rows_kernel")
SHAPING = ("gae_kernel", "select_kernel")
KERNELS = (*OF_LOGITS, "map_kernel", "conflict_kernel", *SHAPING)
# plain: aligned rows and no optional argument. full: every optional one, soft-cap, unaligned rows.
CASES = list(product(("plain", "full"), (80, 90, 100), ("fp32", "bf16", "fp16")))
# The core suite: everything on Hopper, the kernels once on the others.
CORE = [case for case in CASES if case[1] == 90] + [("full", 80, "fp32"), ("plain", 100, "fp32")]

CONSTEXPR = {"SOFTCAP", "ALIGNED", "SAME", "BLOCK"}
OPTIONAL = {
    "stats_kernel": {"mask", "row_temperature"},
    "stats_backward_kernel": {"row_temperature", "grad_entropy", "grad_lse", "grad_collision"},
    "loss_kernel": {
        "old_logprob", "entropy_weight", "importance", "ref_logprob", "row_temperature",
        "loss_scale", "hyper",
    },
    "scale_rows_kernel": set(),
    "map_kernel": {"old_logprob", "entropy_weight", "importance", "ref_logprob", "hyper"},
    "gae_kernel": {"mask", "row_decay", "row_decay_value", "bootstrap_value", "truncated"},
    "select_kernel": set(),
    "conflict_kernel": set(),
}  # fmt: skip
POINTEES = {"targets": "i64", "mask": "i1", "is_top1": "i1", "finite": "i1"}
POINTEES |= {"truncated": "i1", "picks": "i64"}
POINTEES |= dict.fromkeys(("tokens", "sign", "members", "spans", "runs"), "i64")
POINTEES |= dict.fromkeys(("gram", "score", "factor"), "fp64")


# ---- the program: compile, print


def compile_one(kernel, variant, cc, dtype):
    from reasonkern.policy_loss.triton_kernels import config
    from reasonkern.policy_loss.triton_objective import Hyper
    from reasonkern.shaping import triton_kernels as shaping_kernels

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    full = variant == "full"
    block, options = config(names[dtype], full and "SOFTCAP" in kernel.arg_names)
    if kernel.__name__ in SHAPING:
        block, options = shaping_kernels.SELECT_BLOCK, shaping_kernels.SELECT_OPTIONS
    if kernel.__name__ == "gae_kernel":
        block, options = shaping_kernels.GAE_BLOCK, shaping_kernels.GAE_OPTIONS
    constants = {"SOFTCAP": full, "ALIGNED": not full, "SAME": not full, "BLOCK": block}
    if not full:
        constants |= dict.fromkeys(OPTIONAL[kernel.__name__])

    def types(name):
        if name == "values":
            return Hyper(*["fp32"] * 9)
        return "*" + POINTEES.get(name, dtype if name in ("logits", "grad", "x") else "fp32")

    return compiled(kernel, cc, types, constants, options)


def reduction_layouts(ttgir):
    """How the lanes of a block lie in threads where they are added or compared."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ttgir, re.MULTILINE))
    used = re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>\) -> f32", ttgir)
    return sorted({layouts[name] for name in used})


def find(name):
    from reasonkern.policy_loss import triton_kernels
    from reasonkern.shaping import triton_kernels as shaping_kernels

    return getattr(shaping_kernels if name in SHAPING else triton_kernels, name)


def kernels(variant, dtype):
    """Those that a case compiles: the kernels without logits in one of their types."""
    if dtype != "fp32":
        return OF_LOGITS
    return KERNELS if variant == "plain" else (*OF_LOGITS, "map_kernel", *SHAPING)


def compile_all(cases):
    rows = []
    for variant, cc, dtype in cases:
        for name in kernels(variant, dtype):
            made = compile_one(find(name), variant, cc, dtype)
            row = {"kernel": name, "variant": variant, "cc": cc, "dtype": dtype}
            row["layouts"] = reduction_layouts(made.asm["ttgir"])
            row["wide loads"] = made.asm["ptx"].count("ld.global.v4")
            rows.append(row | resources(made))
    return rows


def call_arguments(kernel, small):
    """One of two calls that differ in sizes, alignment and numbers, in no presence or dtype."""
    numbers = {"i32": (1, 4096), "i64": (1, 2**33), "fp32": (1.0, float("inf"))}
    values = {}
    for param in kernel.params:
        if param.is_constexpr:
            values[param.name] = 0
        elif param.annotation_type:
            values[param.name] = numbers[param.annotation_type][0 if small else 1]
        elif param.name == "values":
            values[param.name] = ((1.0 if small else float("inf")),) * 9
        else:
            pointer = torch.zeros(64)  # 64-byte aligned; one element further on it is not
            values[param.name] = pointer[1:] if small else pointer
    return values


def specialisations():
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    rows = []
    for name in KERNELS:
        kernel = find(name)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys = [repr(bind(**call_arguments(kernel, small))[1]) for small in (True, False)]
        constexprs = [param.name for param in kernel.params if param.is_constexpr]
        rows.append({"kernel": name, "constexprs": constexprs, "keys": keys})
    return rows


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps({"compiled": compile_all(cases), "specialised": specialisations()}))
    sys.exit()


# ---- the tests


@pytest.fixture(
    scope="module", params=[CORE, pytest.param(CASES, marks=pytest.mark.slow)], ids=["core", "all"]
)
def report(request):
    found = output_of(__file__, request.param)
    found["cases"] = [(case, rows_of(found, *case)) for case in request.param]
    return found


def rows_of(report, variant, cc, dtype):
    """The row of each kernel that a case compiles."""
    case = {"variant": variant, "cc": cc, "dtype": dtype}
    return {row["kernel"]: row for row in report["compiled"] if case.items() <= row.items()}


def test_compiles_without_spills(report):
    for (variant, _, dtype), rows in report["cases"]:
        assert set(rows) == set(kernels(variant, dtype))
        for row in rows.values():
            assert_unspilled(row)


def test_statistics_and_loss_add_a_row_in_the_same_order(report):
    """Half of what makes logprob bitwise equal in both; the other half is no contraction."""
    for case, rows in report["cases"]:
        layouts = [rows[name]["layouts"] for name in ("stats_kernel", "loss_kernel")]
        assert len(layouts[0]) == 1 and layouts[0] == layouts[1], case


def test_gae_keeps_its_quads_in_registers(report):
    """Aligned rows: loads of whole quads, and shared memory for no more than a float per warp."""
    rows = [row for row in report["compiled"] if row["kernel"] == "gae_kernel"]
    found = [row for row in rows if row["variant"] == "plain"]
    assert len(found) > 1
    for row in found:
        assert row["wide loads"] >= 4 and row["SHARED"] <= 1024, row


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_config_depends_on_nothing_that_would_change_the_sums(dtype, softcap):
    from reasonkern.policy_loss.triton_kernels import config

    block, options = config(dtype, softcap)
    assert options["enable_fp_fusion"] is False
    assert (block, options["num_warps"]) == (config(dtype, not softcap)[0], block // 512)
    assert list(inspect.signature(config).parameters) == ["dtype", "softcap"]


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_and_hyper_parameters_do_not_recompile(report, name):
    (row,) = [row for row in report["specialised"] if row["kernel"] == name]
    assert set(row["constexprs"]) <= CONSTEXPR
    small, large = row["keys"]
    assert small == large


def launches(node, guarded=False):
    """Calls `kernel[grid](…)` below a node: their lines, and whether they are in a device_of."""
    if isinstance(node, ast.With):
        guarded |= any("torch.cuda.device_of" in ast.unparse(item) for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        yield node.lineno, guarded
    for child in ast.iter_child_nodes(node):
        yield from launches(child, guarded)


def test_launches_are_on_the_device_of_their_tensors():
    """Triton launches on the current device and its stream, wherever the tensors are."""
    package = Path(__file__).parents[1] / "reasonkern"
    found = {
        (path.name, line): guarded
        for path in package.rglob("triton_*.py")
        for line, guarded in launches(ast.parse(path.read_text()))
    }
    assert len(found) >= 14
    assert not [place for place, guarded in found.items() if not guarded]
