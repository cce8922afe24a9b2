# ruff: noqa
"""Random requests of the simulator's tests through the machine code: rows of trees, commits."""

import sys, struct
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), ".", "tests"]
import torch, sass
import test_modulation_cuda_sim as t
from reasonkern import _load

path, count, seed, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
fns = sass.parse(path)
state = t.requests(count, seed)
logits, drafts, heat = t.tree_rows(count, seed + 1, torch.bfloat16)
slot = torch.arange(count)
slot[count // 2] = -1
hold = []
mem = sass.Memory()


def ptr(x):
    a = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    hold.append(a)
    return mem.add(a)


def desc(records, sets):
    R, S = ptr(records), ptr(sets)
    return struct.pack("<QQQqq", R, S, S + 320, len(records), len(sets) - 40), R


rec, sets = state.tensors.records.clone(), state.tensors.sets.clone()
st, R = desc(rec, sets)
got, want = logits.clone(), logits.clone()
n = len(t.PARENTS)
parents = t.PARENTS.clone()
params = st + struct.pack(
    "<QqqqQQQQqQ?7x",
    ptr(got),
    len(got),
    t.VOCAB,
    t.VOCAB,
    ptr(slot),
    0,
    ptr(drafts),
    ptr(parents),
    n,
    ptr(heat),
    True,
)
fn = next(v for k, v in fns.items() if "modulate_kernel" in k)
cyc = [max(w.t for w in ws) for _, ws in sass.run(fn, mem, params, (count, n), threads)]
t.reference("modulate_logits_", want, slot, None, drafts, t.PARENTS, heat, *state.tensors, True)
same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
print(
    path,
    "rows",
    "equal" if same.all() else f"WRONG {(~same).nonzero()[:8].tolist()}",
    "changed",
    ((want != logits) & ~want.isnan()).any(-1).float().mean().item(),
)
if not same.all():
    r, c = (~same).nonzero()[0].tolist()
    print(logits[r], got[r], want[r])
g = torch.Generator().manual_seed(seed)
tokens = torch.randint(-1, t.VOCAB, (count, 6), generator=g)
length = torch.randint(0, 7, (count,), generator=g)
ent, conf = torch.rand(count, 6, generator=g), torch.rand(count, 6, generator=g)
params = st + struct.pack(
    "<QQQQqqQQ", R, ptr(slot), ptr(tokens), ptr(length), count, 6, ptr(ent), ptr(conf)
)
fn = next(v for k, v in fns.items() if "commit_kernel" in k)
list(sass.run(fn, mem, params, (count, 1), 32))
t.reference("commit_", slot, tokens, length, ent, conf, *state.tensors)
print(
    path,
    "commit",
    "equal"
    if torch.equal(rec, state.tensors.records)
    else f"WRONG {(rec != state.tensors.records).nonzero()[:8].tolist()}",
)
