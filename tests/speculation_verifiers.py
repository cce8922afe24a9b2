"""Verifiers for `check_verifier`: recursive rejection done right, and five mistakes.

Each comes in two forms: over draws and coins (enumerated), and over a batch of steps (drawn).
"""

from __future__ import annotations

import torch
from torch import Tensor

MISTAKES = ("order", "pruned", "not renormalised", "sample per path", "reused noise")


# ---- over draws and coins


def sequential(draws, coins, mistake: str | None = None) -> list[int]:
    tokens: list[int] = []
    while True:
        token, accepted = _node(draws, coins, tuple(tokens), mistake)
        tokens.append(token)
        if not accepted:
            return tokens


def _node(draws, coins, prefix, mistake):
    r, s = list(draws.target(prefix)), list(draws.draft(prefix))
    children = list(draws.children(prefix))
    if mistake == "order":
        children.sort(key=lambda x: -s[x])
    if mistake == "pruned":
        children = [x for x in children if s[x] > 0.15]
    for x in children:
        if s[x] > 0 and coins.below(r[x] / s[x]):
            return x, True
        left = [max(a - b, 0.0) for a, b in zip(r, s, strict=True)]
        if sum(left) <= 0:
            return coins.choice(draws.target(prefix)), False
        r = [a / sum(left) for a in left]
        s[x] = 0.0
        if sum(s) <= 0:
            break
        if mistake != "not renormalised":
            s = [b / sum(s) for b in s]
    if mistake == "reused noise" and children:
        # The residual's noise ranks tokens as the drafter's did: what was drawn last comes first.
        return max(
            range(len(r)), key=lambda x: (r[x] > 0) * (1 + (x == children[-1]) + r[x])
        ), False
    return coins.choice(r), False


def per_path(draws, coins) -> list[int]:
    """An independent sample of the target along every drafted path; the longest match is taken."""
    best: list[int] = []
    for path in _paths(draws, ()):
        matched: list[int] = []
        for x in path:
            if coins.choice(draws.target(tuple(matched))) != x:
                break
            matched.append(x)
        if len(matched) > len(best):
            best = matched
    return [*best, coins.choice(draws.target(tuple(best)))]


def _paths(draws, prefix) -> list[tuple[int, ...]]:
    children = draws.children(prefix)
    if not children:
        return [()]
    return [(x, *rest) for x in children for rest in _paths(draws, (*prefix, x))]


def enumerated(mistake: str | None):
    if mistake == "sample per path":
        return per_path
    return lambda draws, coins: sequential(draws, coins, mistake)


# ---- over a batch


def batched(mistake: str | None):
    def verify(logits, draft, tree, temperature, seed, position):
        g = torch.Generator().manual_seed(int(seed[0]) % 2**62)
        if mistake == "sample per path":
            return _batched_per_path(logits, draft, tree, g)
        return _batched_rejection(logits, draft, tree, g, mistake, seed)

    return verify


def _dense_law(draft, node: Tensor, vocab: int) -> Tensor:
    b = torch.arange(len(node))
    ids, logprob = draft.q_ids[b, node], draft.q_logprob[b, node]
    q = torch.zeros(len(node), vocab + 1, dtype=torch.float64)
    q.scatter_(1, torch.where(ids < 0, vocab, ids), logprob.double().exp())
    return q[:, :-1] / q[:, :-1].sum(-1, keepdim=True).clamp_min(1e-300)


def _child_table(tree) -> Tensor:
    pointers, index = (t.tolist() for t in tree.children)
    rows = [index[a:b] for a, b in zip(pointers, pointers[1:], strict=False)]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _batched_rejection(logits, draft, tree, g, mistake, seed):
    batch, _, vocab = logits.shape
    b, table = torch.arange(batch), _child_table(tree)
    node, alive = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.bool)
    tokens = torch.full((batch, tree.depth + 1), -1)
    for d in range(tree.depth + 1):
        p = logits[b, node].double().softmax(-1)
        r, s = p, _dense_law(draft, node, vocab)
        children = table[node]
        drawn = draft.tokens.gather(1, children.clamp_min(0))
        mass = s.gather(1, drawn)
        usable = children >= 0
        if mistake == "order":
            order = mass.argsort(-1, descending=True)
            children, drawn = children.gather(1, order), drawn.gather(1, order)
        if mistake == "pruned":
            usable &= mass > 0.15
        token = torch.full((batch,), -1)
        entered = torch.full((batch,), -1)
        for k in range(children.shape[1]):
            x = drawn[:, k : k + 1]
            testing = usable[:, k] & (token < 0) & (s.sum(-1) > 0)
            coin = torch.rand(batch, generator=g, dtype=torch.float64)
            s_x, r_x = s.gather(1, x)[:, 0], r.gather(1, x)[:, 0]
            hit = testing & (coin * s_x < r_x)
            token = torch.where(hit, x[:, 0], token)
            entered = torch.where(hit, children[:, k], entered)
            moved = (testing & ~hit).unsqueeze(-1)
            left = (r - s).clamp_min(0)
            r = torch.where(moved & (left.sum(-1, keepdim=True) > 0), left, r)
            r = r / r.sum(-1, keepdim=True)
            s = torch.where(moved, s.scatter(1, x, 0.0), s)
            if mistake != "not renormalised":
                s = s / s.sum(-1, keepdim=True).clamp_min(1e-300)
        drawn_from_r = torch.multinomial(r, 1, generator=g)[:, 0]
        if mistake == "reused noise" and d < tree.depth:
            from reasonkern.speculation import noise

            words = noise.row_words(seed, torch.zeros_like(seed), vocab, noise.DRAFT, d)
            drawn_from_r = (r.log() + noise.gumbel(words)).argmax(-1)
        token = torch.where(token < 0, drawn_from_r, token)
        tokens[:, d] = torch.where(alive, token, -1)
        alive = alive & (entered >= 0)
        node = torch.where(alive, entered, node)
        if not alive.any():
            break
    return tokens, (tokens >= 0).sum(-1)


def _batched_per_path(logits, draft, tree, g):
    batch, nodes, vocab = logits.shape
    b, parents = torch.arange(batch), tree.parents.tolist()
    leaves = [i for i in range(nodes) if i not in parents]
    best = torch.zeros(batch, dtype=torch.int64)
    ends = torch.zeros(batch, dtype=torch.int64)
    law = logits.double().softmax(-1)
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        alive = torch.ones(batch, dtype=torch.bool)
        matched = torch.zeros(batch, dtype=torch.int64)
        for above, below in zip(path, path[1:], strict=False):
            drawn = torch.multinomial(law[:, above], 1, generator=g)[:, 0]
            alive &= drawn == draft.tokens[:, below]
            matched += alive
        better = matched > best
        best = torch.where(better, matched, best)
        ends = torch.where(better, torch.tensor(path)[matched.clamp_max(len(path) - 1)], ends)
    tokens = torch.full((batch, tree.depth + 1), -1)
    node = ends
    for _ in range(tree.depth):
        depth = tree.depths.long()[node]
        inside = depth > 0
        at = (depth - 1).clamp_min(0)
        tokens[b[inside], at[inside]] = draft.tokens[b, node][inside]
        node = torch.where(inside, torch.tensor(parents).clamp_min(0)[node], node)
    tokens[b, best] = torch.multinomial(law[b, ends], 1, generator=g)[:, 0]
    return tokens, best + 1
