"""Inputs of the table's tests: tables, rows, and calls of the operators by backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation.tree import TreeTensors

Op = Callable[..., Any]  # called as op("table_update_", *arguments)

TOPK = 4
# A tree: node 1, a first child, is a leaf; chains start at 2, 3, 5 and 8.
SPARSE = [-1, 0, 0, 0, 2, 2, 4, 3, 3, 5, 8, 6, 10, 11]
STORED = {
    "packed": {"vocab_size": 50},
    "wide": {"vocab_size": 1 << 26},
    "exact": {"vocab_size": 1 << 26, "storage": "exact"},
}


@dataclass
class Batch:
    """Arguments of one update, as the operator takes them."""

    context: Tensor
    ids: Tensor
    logits: Tensor
    lse: Tensor | None = None
    scope: Tensor | None = None

    def take(self, index: Any) -> Batch:
        fields = (self.context, self.ids, self.logits, self.lse, self.scope)
        return Batch(*(None if f is None else f[index] for f in fields))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(
    seed: int, rows: int = 40, window: int = 3, vocab: int = 50, topk: int = 4, *,
    tokens: int = 3, scopes: int = 3, with_lse: bool = True,
) -> Batch:  # fmt: skip
    """Few distinct contexts, so that rows share them; short ones, padding, -inf and ties."""
    g = generator(seed)
    context = torch.randint(0, tokens, (rows, window), generator=g)
    context[::7, : window - 1] = -1
    context[::11] = -1
    logits = 3 * torch.randn(rows, vocab, generator=g)
    logits[1::4, : vocab // 2] = logits[1::4, :1]
    logits[2::5, 3:] = -torch.inf
    top = logits.topk(topk, -1)
    ids = top.indices.clone()
    ids[::5, -1] = -1
    lse = logits.logsumexp(-1)
    scope = torch.randint(0, scopes, (rows,), generator=g)
    if with_lse:
        return Batch(context, ids, top.values, lse, scope)
    return Batch(context, ids, top.values - lse[:, None], None, scope)


def state_tensors(table: NgramTable) -> dict[str, Tensor]:
    state = table.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def run_update(op: Op, table: NgramTable, batch: Batch, strict: bool = False) -> None:
    s = state_tensors(table)
    names = ("keys", "slots", "extra", "counts", "ages", "clock", "epochs", "counters")
    op(
        "table_update_", batch.context, *(s[name] for name in names), list(table.orders),
        table.max_count, table.vocab_size, batch.ids, batch.logits, batch.lse, batch.scope, strict,
    )  # fmt: skip


@dataclass
class Requests:
    """Arguments of one draft."""

    context: Tensor
    temperature: Tensor
    seed: Tensor
    position: Tensor
    scope: Tensor | None = None
    orders: Sequence[int] = field(default=())


def random_requests(seed: int, batch: int = 9, window: int = 3, tokens: int = 3) -> Requests:
    """Short contexts, a padding row, temperature 0, positions and seeds of more than 32 bits."""
    g = generator(seed)
    context = torch.randint(0, tokens, (batch, window), generator=g)
    context[3 % batch, : window - 1] = -1
    if batch > 5:
        context[5] = -1
    temperature = torch.tensor([0.0, 0.6, 1.0, 0.3, 2.0]).repeat(batch)[:batch]
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    position = torch.arange(batch) * 2**31
    return Requests(
        context, temperature, seeds, position, torch.randint(0, 4, (batch,), generator=g)
    )


def renumbered(tree: DraftTree, names: Sequence[int]) -> TreeTensors:
    """The tree with node i called names[i]; names[0] is 0."""
    t, new = tree.tensors(), torch.tensor(names)
    old = new.argsort()
    children = [new[t.child_index[t.child_ptr[i] : t.child_ptr[i + 1]].long()] for i in old]
    arrays = TreeTensors(
        parents=torch.cat((new, torch.tensor([-1])))[t.parents[old].long()],
        ranks=t.ranks[old],
        depths=t.depths[old],
        child_ptr=torch.tensor([0] + [len(c) for c in children]).cumsum(0),
        child_index=torch.cat(children),
        level_ptr=t.level_ptr,
        level_nodes=new[t.level_nodes.long()],
    )
    return TreeTensors(*(a.int() for a in arrays))


def run_draft(
    op: Op, table: NgramTable, tree: DraftTree | TreeTensors, requests: Requests, kind: int
) -> tuple[Tensor, ...]:
    s = state_tensors(table)
    if isinstance(tree, DraftTree):
        tree = tree.tensors()
    names = ("keys", "slots", "extra", "counts", "epochs", "counters")
    r = requests
    return op(
        "table_draft", r.context, *(s[name] for name in names), list(table.orders),
        *(x.to(r.context.device) for x in tree), r.scope, r.temperature, r.seed, r.position, kind,
        table.vocab_size, False,
    )  # fmt: skip


def entries(table: NgramTable) -> dict[int, tuple[Any, ...]]:
    """Contents by key, wherever they lie: slots, extra, count."""
    s = state_tensors(table)
    keys, width = s["keys"].flatten(), s["slots"].shape[1]
    found = {}
    for entry in keys.nonzero().flatten().tolist():
        extra = s["extra"][entry].tolist() if s["extra"].numel() else [0] * width
        slots = s["slots"][entry].tolist()
        found[int(keys[entry])] = (slots, extra, int(s["counts"][entry]))
    return found


# ---- small tables of every storage


def small(kind: str = "packed", capacity: int = 64, **more: Any) -> NgramTable:
    options = {"orders": (3, 2, 1), "topk": TOPK, "max_count": 5, "max_scopes": 4}
    return NgramTable(capacity, **(options | STORED[kind] | more))


def define(op: str, *args: Any) -> Any:
    return _load.implementation(op, "reference")(*args)


def assert_same_table(got: NgramTable, expected: NgramTable) -> None:
    for name, tensor in state_tensors(expected).items():
        assert torch.equal(state_tensors(got)[name].cpu(), tensor.cpu()), name


def filled(kind: str = "packed", seed: int = 0, calls: int = 6, **more: Any) -> NgramTable:
    table = small(kind, **more)
    for call in range(calls):
        run_update(define, table, spread(random_batch(100 * seed + call), table))
    return table


def spread(batch: Batch, table: NgramTable) -> Batch:
    """Ids over the whole vocabulary, the upper bits of a wide id included."""
    factor = table.vocab_size // 50
    batch.ids = torch.where(batch.ids >= 0, batch.ids * factor, batch.ids)
    return batch
