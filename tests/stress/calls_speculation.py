"""Valid calls of the speculation family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from draws import Arguments, Draw

import reasonkern as rk

VOCAB = 40
MODES = ("shared", "target-only", "rejection")


def words(draw: Draw, *shape: int) -> Any:
    """A bitmask over VOCAB, or None."""
    return draw.maybe(lambda: draw.ids(1 << 31, *shape, (VOCAB + 31) // 32, dtype=torch.int32))


def request(draw: Draw, batch: int) -> Arguments:
    return {
        "temperature": draw.choice(0.0, 0.6, 1.0, draw.positive(batch)),
        "seed": draw.choice(0, (1 << 64) - 1, draw.ids(1 << 62, batch)),
        "position": draw.choice(0, 1 << 40, draw.ids(99, batch)),
    }


def filters(draw: Draw, batch: int) -> Arguments:
    return {
        "top_k": draw.choice(None, 3, draw.ids(50, batch)),
        "top_p": draw.choice(None, 0.9, draw.positive(batch)),
        "min_p": draw.choice(None, 0.1, draw.positive(batch) - 0.1),
    }


def tree(draw: Draw) -> rk.DraftTree:
    return rk.DraftTree([-1, *(draw.integer(0, i) for i in range(draw.integer(0, 6)))])


def sample(draw: Draw) -> Arguments:
    batch, vocab = draw.size(), draw.choice(1, 31, 32, 33, VOCAB, 300, 5000)
    mask = draw.maybe(lambda: draw.ids(1 << 31, batch, (vocab + 31) // 32, dtype=torch.int32))
    logits = {"logits": draw.logits(batch, vocab), "mask": mask}
    return logits | request(draw, batch) | filters(draw, batch)


def draft(draw: Draw, shape: rk.DraftTree, batch: int) -> rk.Draft:
    n, entry = shape.nodes, draw.choice(1, 4)
    return rk.Draft(
        draw.ids(VOCAB, batch, n),
        draw.bools(batch, n, share=0.9),
        draw.ids(VOCAB, batch, n, entry, low=-1),
        -draw.positive(batch, n, entry, high=9.0),
    )


def verify_tree(draw: Draw) -> Arguments:
    batch, shape = draw.size(), tree(draw)
    arguments = {
        "logits": draw.logits(batch, shape.nodes, VOCAB),
        "draft": draft(draw, shape, batch),
        "tree": shape,
        "mode": draw.choice(*MODES),
        "eos": draw.choice(None, 3, [1, 2], torch.tensor([5])),
        "max_length": draw.choice(None, 2, draw.ids(4, batch)),
        "topk": draw.choice(1, 12, 64),
        "node_mask": words(draw, batch, shape.nodes),
        "num_nodes": draw.choice(None, 1, shape.nodes),
    }
    return arguments | request(draw, batch) | filters(draw, batch)


def run_verify_tree(**arguments: Any) -> Any:
    out = rk.verify_tree(**arguments)
    return out._replace(topk_logits=out.topk_logits.nan_to_num(), lse=out.lse.nan_to_num())


def verify_spoilt_draft(draw: Draw) -> Arguments:
    """The parts of a draft as arguments of their own, so that they are spoilt one by one."""
    arguments = verify_tree(draw)
    return arguments | arguments.pop("draft")._asdict()


def run_verify_parts(tokens: Any, valid: Any, q_ids: Any, q_logprob: Any, **arguments: Any) -> Any:
    return run_verify_tree(draft=rk.Draft(tokens, valid, q_ids, q_logprob), **arguments)


def compact_kv_(draw: Draw) -> Arguments:
    batch, nodes, slots = draw.integer(1, 3), draw.integer(1, 4), 12
    lengths = draw.ids(slots - 2 * nodes, batch).clone()
    paged, size = draw.flag(), 4
    cache = (batch * slots // size, size, 2) if paged else (batch, 2, slots)
    table = torch.randperm(cache[0]).view(batch, -1)
    return {
        "key": torch.randn(*cache, draw.choice(1, 8), dtype=draw.choice(torch.float32, torch.half)),
        "value": torch.randn(*cache, 3),
        "lengths": lengths,
        "path": torch.arange(nodes).repeat(batch, 1),
        "accepted": draw.ids(nodes + 1, batch).clone(),
        "start": draw.choice(None, lengths + 1),
        "block_table": table if paged else None,
    }


def run_compact_kv_(key: Any, value: Any, **arguments: Any) -> Any:
    if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
        key, value = key.clone(), value.clone().to(key.dtype)
    rk.compact_kv_(key, value, **arguments)
    return key, value


def request_seeds(draw: Draw) -> Arguments:
    return {"seed": draw.choice(0, (1 << 64) - 1, torch.tensor(7)), "batch": draw.size()}


def session(draw: Draw) -> Arguments:
    """A table, two updates, a draft from it and what is learnt from its verification."""
    orders = draw.choice((2, 1), (4, 3, 2), (8,))
    batch, k, shape = draw.size(), draw.choice(1, 3), tree(draw)
    return {
        "orders": orders,
        "storage": draw.choice("packed", "exact"),
        "vocab_size": draw.choice(VOCAB, 1 << 20),
        "context": draw.ids(3, batch, orders[0], low=-1),
        "topk_ids": draw.ids(VOCAB, batch, k, low=-1),
        "topk_logits": -draw.positive(batch, k, high=9.0) - 2,
        "lse": draw.maybe(lambda: draw.positive(batch)),
        "scope": draw.choice(None, 1, draw.ids(3, batch)),
        "tree": shape,
        "mode": draw.choice(*MODES),
        "logits": draw.logits(batch, shape.nodes, VOCAB).detach().float().nan_to_num(),
        **request(draw, batch),
    }


def run_session(
    orders: Any, storage: Any, vocab_size: Any, context: Any, topk_ids: Any, topk_logits: Any,
    lse: Any, scope: Any, tree: Any, mode: Any, logits: Any, **request: Any,
) -> Any:  # fmt: skip
    table = rk.NgramTable(64, vocab_size=vocab_size, orders=orders, topk=4, storage=storage)
    for _ in range(2):
        table.update(context, topk_ids, topk_logits, lse=lse, scope=scope)
    draft = table.draft(context, tree, mode=mode, scope=scope, **request)
    out = rk.verify_tree(logits, draft, tree, mode=mode, topk=4, **request)
    table.update_verified(context, out, scope=scope)
    if isinstance(scope, int):
        table.reset(scope)
    copy = rk.NgramTable(64, vocab_size=vocab_size, orders=orders, topk=4, storage=storage)
    copy.load_state_dict(table.state_dict())
    again = copy.draft(context, tree, mode=mode, scope=scope, **request)
    return draft[:2], out[:3], again[:2], table.stats()["hit_rate"]


def foreign_state(draw: Draw) -> Arguments:
    """A saved table, whose tensors then come from anywhere."""
    table = rk.NgramTable(64, vocab_size=VOCAB, orders=(2, 1), topk=4)
    context = draw.ids(3, 4, 2)
    table.update(context, draw.ids(VOCAB, 4, 2), -draw.positive(4, 2) - 1)
    return {"context": context, **table.state_dict()}


def run_foreign_state(context: Any, **state: Any) -> Any:
    table = rk.NgramTable(64, vocab_size=VOCAB, orders=(2, 1), topk=4)
    table.load_state_dict(state)
    draft = table.draft(context, rk.DraftTree.chain(4), temperature=1.0, seed=0, position=0)
    table.update(context, draft.tokens[:, :2], torch.full((len(context), 2), -1.0))
    return draft.tokens


def draft_tree(draw: Draw) -> Arguments:
    shape = tree(draw)
    parents = draw.choice(shape.parents.tolist(), shape.parents)
    return {"parents": parents, "nodes": draw.integer(1, 9), "length": draw.ids(9, draw.size())}


def run_draft_tree(parents: Any, nodes: Any, length: Any) -> Any:
    shape = rk.DraftTree(parents)
    assert rk.DraftTree.default(nodes).nodes == rk.DraftTree.chain(nodes).nodes == nodes
    prefix = shape.prefix(min(nodes, shape.nodes))
    return prefix.attention_mask(), prefix.positions(length), shape.draw(), shape.children


def tune_tree(draw: Draw) -> Arguments:
    nodes, sequences = draw.integer(2, 6), draw.flag()
    big = rk.DraftTree.default(8)
    texts = [draw.ids(3, draw.integer(2, 9)).tolist() for _ in range(2)]
    return {
        "source": texts if sequences else draw.positive(big.nodes),
        "nodes": nodes,
        "tree": big,
        "vocab_size": 3 if sequences else None,
    }


def check_verifier(draw: Draw) -> Arguments:
    return {
        "fn": first_child,
        "vocab": draw.integer(2, 5),
        "children": draw.integer(1, 2),
        "depth": draw.integer(1, 2),
        "draws": draw.integer(1, 9),
        "seed": draw.integer(0, 9),
    }


def first_child(logits: Any, draft: Any, tree: Any, temperature: Any, seed: Any, at: Any) -> Any:
    out = rk.verify_tree(logits, draft, tree, temperature=temperature, seed=seed, position=at)
    return out.tokens, out.length


def run_check_verifier(**arguments: Any) -> Any:
    return [law.total_variation for law in rk.check_verifier(**arguments).laws]


CALLS = {
    "sample": (rk.sample, sample),
    "verify_tree": (run_verify_tree, verify_tree),
    "Draft": (run_verify_parts, verify_spoilt_draft),
    "compact_kv_": (run_compact_kv_, compact_kv_),
    "request_seeds": (rk.request_seeds, request_seeds),
    "NgramTable": (run_session, session),
    "NgramTable.load_state_dict": (run_foreign_state, foreign_state),
    "DraftTree": (run_draft_tree, draft_tree),
    "tune_tree": (rk.tune_tree, tune_tree),
    "check_verifier": (run_check_verifier, check_verifier),
}
