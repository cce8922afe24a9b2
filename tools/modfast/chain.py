# ruff: noqa
"""Executes the machine code of a variant on the benchmark's requests: bits, and cycles of its chain.

nvcc -cubin -O3 -arch=sm_90a --expt-relaxed-constexpr -lineinfo -DCOMMIT_SHARED=CommitShared -Icsrc tools/modfast/variant.cu -o v.cubin
nvdisasm -hex -c -g v.cubin > v.sass     (triton's wheel has an nvdisasm)
python tools/modfast/chain.py v.sass rows|tree|commit|cyclic|padding [B=64] [--late] [--all] [--show]
"""

import sys, struct, statistics
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), "."]
import numpy as np, torch
import sass
import reasonkern as rk
from reasonkern import _load
from benchmarks import modulation_gpu as mg
from copy import deepcopy

path, what = sys.argv[1], sys.argv[2]
show = "--show" in sys.argv
B, N, V = int(next((a[2:] for a in sys.argv if a.startswith("B=")), 4)), 8, 2000
torch.manual_seed(0)
spec = (
    mg.every_control()
    if what != "cyclic"
    else rk.Modulation(cyclic=rk.Cyclic(5.0, 1200), think_end=151)
)
sets = rk.TokenSets.from_ids({"reflect": range(900, 905), "other": range(10, 15), "ban": [7]})
state = rk.ModulationState(B, sets)
for s in range(B):
    state.add(s, spec, [], [s % 7] * (s + 3))
if "--late" in sys.argv:
    state.tensors.records[:, 0] += 9000
    state.tensors.records[:, 1] += 9000
rows = B * N if what == "tree" else B
logits = (3 * torch.randn(rows, V)).bfloat16()
slot = torch.randperm(B) if what != "padding" else torch.full((B,), -1)
drafts = torch.randint(200, (B, N))
parents = rk.DraftTree.default(N).parents.int()
heat = torch.full((rows,), 0.6)
fns = sass.parse(path)
mem = sass.Memory()
hold = []


def ptr(t):
    if t is None:
        return 0
    a = t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
    hold.append(a)
    return mem.add(a)


records, ts = state.tensors.records.clone(), state.tensors.sets.clone()
R, S = ptr(records), ptr(ts)
entries = len(ts) - 40
st = struct.pack("<QQQqq", R, S, S + 40 * 8, B, entries)
got, want = logits.clone(), logits.clone()
if what == "commit":
    tok = drafts[:, :4].contiguous()
    length = torch.full((B,), 4)
    fn = next(v for k, v in fns.items() if "commit_kernel" in k)
    params = st + struct.pack("<QQQQqqQQ", R, ptr(slot), ptr(tok), ptr(length), B, 4, 0, 0)
    grid, threads = (B, 1), 32
else:
    tree = what == "tree"
    fn = next(v for k, v in fns.items() if "modulate_kernel" in k)
    params = st + struct.pack(
        "<QqqqQQQQqQ?7x",
        ptr(got),
        rows,
        V,
        V,
        ptr(slot),
        0,
        ptr(drafts) if tree else 0,
        ptr(parents) if tree else 0,
        N if tree else 1,
        ptr(heat),
        False,
    )
    grid, threads = (
        (B, N if tree else 1),
        int(next((a[2:] for a in sys.argv if a.startswith("T=")), 32)),
    )
cycles, counts, lines, last = [], [], [], None
for xy, warps in sass.run(fn, mem, params, grid, threads, trace=show):
    cycles.append(max(w.t for w in warps))
    counts.append(max(w.count for w in warps))
    lines.append(len(set().union(*[w.lines for w in warps])))
    last = warps
ref = deepcopy(state)
if what == "commit":
    _load.implementation("commit_", "reference")(slot, tok, length, None, None, *ref.tensors)
    ok = torch.equal(ref.tensors.records, records)
else:
    _load.implementation("modulate_logits_", "reference")(
        want,
        slot,
        None,
        drafts if what == "tree" else None,
        parents if what == "tree" else None,
        heat,
        *ref.tensors,
        False,
    )
    ok = torch.equal(got.view(torch.int16), want.view(torch.int16))
if "--all" in sys.argv:
    print(sorted(int(c) for c in cycles))
print(
    f"{path} {what}: {'bits equal' if ok else 'WRONG'}; cycles {statistics.median(cycles):.0f} ({min(cycles):.0f}-{max(cycles):.0f}), instructions {statistics.median(counts):.0f}, lines of 128 B {statistics.median(lines):.0f}, loads {last[0].loads}"
)
if show:
    for start, waited, n, ins, *val in last[0].log:
        print(
            f"{start:7.0f} {waited:5.0f} {n:3d} {ins.adr:05x} {ins.text:60s} {ins.stall:2d} w{ins.wb} r{ins.rb} m{ins.wait:02x} {ins.line} {val}"
        )
if not ok:
    d = (
        (got.view(torch.int16) != want.view(torch.int16)).nonzero().tolist()[:20]
        if what != "commit"
        else (ref.tensors.records != records).nonzero().tolist()[:20]
    )
    for r, c in d:
        print("differs", r, c, logits[r, c].item(), got[r, c].item(), want[r, c].item())
