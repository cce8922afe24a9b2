"""Compiles the Triton kernels of the table ahead of time, without a GPU, and asserts no spills."""

import json
import sys

import pytest
from triton_programs import assert_unspilled, compiled, fused_steps, output_of, resources

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
    from reasonkern.speculation.triton_table import OPTIONS

    types = POINTEES | {"extra": EXTRA[constants.get("STORAGE", 0)]}
    options = OPTIONS | ({"num_warps": 1} if kernel.__name__ == "merge_kernel" else {})
    made = compiled(kernel, cc, lambda n: f"*{types.get(n, 'i64')}", constants, options)
    return resources(made) | {"fused": fused_steps(made)}


def compile_all(storages, architectures):
    from reasonkern.speculation import triton_table

    return [
        {"kernel": name, "cc": cc, **compile_one(getattr(triton_table, name), constants, cc)}
        for name, constants in cases(storages)
        for cc in architectures
    ]


if __name__ == "__main__":
    print(json.dumps(compile_all(*map(json.loads, sys.argv[1:]))))
    sys.exit()


PACKED_ON_HOPPER = [[0], [90]]
EVERYTHING = [list(EXTRA), [80, 90, 100]]


@pytest.fixture(
    scope="module", params=[PACKED_ON_HOPPER, pytest.param(EVERYTHING, marks=pytest.mark.slow)],
    ids=["core", "all"],
)  # fmt: skip
def report(request):
    rows = output_of(__file__, *request.param)
    assert len(rows) == len(request.param[1]) * len(list(cases(request.param[0])))
    return rows


def test_no_kernel_spills(report):
    for row in report:
        assert_unspilled(row)


def test_nothing_is_contracted(report):
    """A fused multiply-add would change bits; division by Newton steps is inside div.rn."""
    assert not [row for row in report if row["fused"]]
