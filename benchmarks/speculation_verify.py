"""Cases of verification: a visited row against softmax of it, a step against sampling its rows.

On a GPU a step verifies a tree of 80 nodes. Each request visits 2 to 5, 3.5 on average, along first
children, or, in typical walks, children of each rank as often as the tree expects.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

import reasonkern as rk
from benchmarks.case import DTYPES, Case, Gate, Provider, Runner, Tolerance, Truth
from benchmarks.peers.ours import gpu_providers
from reasonkern import _load
from reasonkern.speculation.tree import RANK_RATES

VOCAB, TEMPERATURE, DEPTH = 151_936, 0.6, 3
TREE, VISITS = 80, (2, 3, 4, 5)
TYPICAL = "typical walks"  # a label ends so


@dataclass
class Step:
    """Rows (B, N, V), and drafts of which each request accepts a path from the root."""

    logits: Tensor
    draft: rk.Draft
    tree: rk.DraftTree
    seed: Tensor
    temperature: float | Tensor
    position: int | Tensor
    visited: Tensor  # (rows visited, 2): request and node
    filters: dict[str, Tensor] = field(default_factory=dict)  # off; a GPU's loop keeps them there
    walks: list[list[int]] = field(default_factory=list)  # on a GPU: the nodes that are visited

    @property
    def rows(self) -> Tensor:
        """A copy of the visited rows (R, V)."""
        return self.logits[self.visited[:, 0], self.visited[:, 1]]


def inputs(case: Case, seed: int) -> Step:
    if case.device == "cuda":
        return tree_step(case, seed)
    batch, nodes, vocab = case.shape
    g = torch.Generator().manual_seed(seed)
    logits = row_logits(case.label, (batch, nodes, vocab), g).to(DTYPES[case.dtype])
    seeds, tree = rk.request_seeds(seed, batch), rk.DraftTree.chain(nodes)
    tokens = torch.zeros(batch, nodes, dtype=torch.int64)
    for node in range(nodes - 1):
        tokens[:, node + 1] = draw(logits[:, node], seeds, node)
    draft = rk.Draft(tokens, torch.ones_like(tokens, dtype=torch.bool))
    visited = torch.cartesian_prod(torch.arange(batch), torch.arange(nodes))
    return Step(logits, draft, tree, seeds, TEMPERATURE, 0, visited)


def row_logits(label: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """peaked: nothing but the top survives pruning; flat: every token does, at first."""
    logits = torch.randn(shape, generator=g, device=g.device)
    if not label.startswith("peaked"):
        return logits.mul_(0.5)
    logits.mul_(2.0)
    logits[..., 5], logits[..., 77] = 35.0, 34.0
    return logits


def tree_step(case: Case, seed: int) -> Step:
    """Along a walk what is drawn is drafted, elsewhere token 0, which never is. Rows that no block
    reads are 0."""
    batch, nodes, vocab = case.shape
    device = torch.device(case.device)
    g = torch.Generator(device).manual_seed(seed)
    tree, seeds = rk.DraftTree.default(nodes), rk.request_seeds(seed, batch)
    path = first_children(tree, min(nodes, max(VISITS)))
    walks = walks_of(case, tree, seed)
    logits = torch.zeros(batch, nodes, vocab, dtype=DTYPES[case.dtype], device=device)
    for node in range(nodes) if case.label.endswith(TYPICAL) else path:
        for b in range(0, batch, 16):
            logits[b : b + 16, node] = row_logits(case.label, logits[b : b + 16, node].shape, g)
    logits[..., 0] = -40.0
    tokens = torch.zeros(batch, nodes, dtype=torch.int64)
    for depth in range(max(map(len, walks)) - 1):
        on = [b for b, walk in enumerate(walks) if len(walk) > depth + 1]
        rows = logits[on, [walks[b][depth] for b in on]].cpu()
        tokens[on, [walks[b][depth + 1] for b in on]] = draw(rows, seeds[on], depth)
    visited = torch.tensor([(b, node) for b, walk in enumerate(walks) for node in walk])
    visited, tokens, seeds = visited.to(device), tokens.to(device), seeds.to(device)
    draft = rk.Draft(tokens, torch.ones_like(tokens, dtype=torch.bool))
    temperature = torch.full((batch,), TEMPERATURE, device=device)
    off = {"top_k": torch.zeros_like(seeds), "top_p": torch.ones_like(temperature)}
    off["min_p"] = torch.zeros_like(temperature)
    position = torch.zeros_like(seeds)
    return Step(logits, draft, tree, seeds, temperature, position, visited, off, walks)


def walks_of(case: Case, tree: rk.DraftTree, seed: int) -> list[list[int]]:
    """The nodes that each request visits."""
    batch = range(case.shape[0])
    if case.label.endswith(TYPICAL):
        g = torch.Generator().manual_seed(seed)
        return [typical_walk(tree, g) for _ in batch]
    path = first_children(tree, min(case.shape[1], max(VISITS)))
    return [path[: VISITS[b % len(VISITS)]] for b in batch]


def typical_walk(tree: rk.DraftTree, g: torch.Generator) -> list[int]:
    """To the child of rank r with the chance that `DraftTree.default` is built for."""
    pointers, index = (t.tolist() for t in tree.children)
    limits = torch.tensor(RANK_RATES).cumsum(0)
    walk = [0]
    while True:
        children = index[pointers[walk[-1]] : pointers[walk[-1] + 1]]
        rank = int((limits <= torch.rand((), generator=g)).sum())
        if rank >= min(len(children), len(limits)):
            return walk
        walk.append(children[rank])


def draw(logits: Tensor, seeds: Tensor, position: int) -> Tensor:
    return rk.sample(logits, temperature=TEMPERATURE, seed=seeds, position=position)


def first_children(tree: rk.DraftTree, count: int) -> list[int]:
    """The root, its first child, that one's first child and so on."""
    parents, ranks = tree.parents.tolist(), tree.ranks.tolist()
    path = [0]
    while len(path) < count:
        path.append(next(i for i, p in enumerate(parents) if p == path[-1] and ranks[i] == 0))
    return path


def verify(step: Step) -> rk.Verified:
    return rk.verify_tree(
        step.logits, step.draft, step.tree, temperature=step.temperature, seed=step.seed,
        position=step.position, **step.filters,
    )  # fmt: skip


def ours(case: Case, step: Step) -> Runner:
    names = ("tokens", "length", "topk_ids")
    outputs = lambda out: {n: getattr(out, n).double() for n in names}  # noqa: E731
    rows = len(step.visited) if case.device == "cpu" else 1  # on a GPU the time of the call
    return Runner(lambda: verify(step), outputs, repeat=rows)


def ours_sample(case: Case, step: Step) -> Runner:
    rows = step.logits[:, 0]

    def call() -> Tensor:
        return rk.sample(
            rows, temperature=step.temperature, seed=step.seed, position=step.position,
            **step.filters,
        )  # fmt: skip

    return Runner(call, lambda out: {"tokens": out.double()})


def softmax(case: Case, step: Step) -> Runner:
    """Of the visited rows: one by one on a CPU, in one call on a GPU."""
    if case.device == "cuda":
        together = step.rows
        return Runner(lambda: torch.softmax(together, -1))
    rows = step.logits.flatten(0, 1).split(1)
    return Runner(lambda: [torch.softmax(row, -1) for row in rows], repeat=len(rows))


def eager(case: Case, step: Step) -> Runner:
    """How engines without a fused sampler draw a token per visited row; no Philox contract."""
    rows = step.rows

    def call() -> Tensor:
        p = torch.softmax(rows.float() / TEMPERATURE, -1)
        return torch.argmax(p / torch.empty_like(p).exponential_(), -1)

    return Runner(call)


def copy(case: Case, step: Step) -> Runner:
    """Half of the visited bytes read and half of them written: what the copy bandwidth allows."""
    rows = step.rows.flatten()
    half = rows.numel() // 2
    source, target = rows[:half], rows[half : 2 * half]
    return Runner(lambda: target.copy_(source))


def sampling(case: Case, step: Step) -> Runner:
    """`rk.sample` on the rows that the step visits, in one call."""
    rows, nodes = step.logits.flatten(0, 1), case.shape[1]
    position = torch.arange(nodes).repeat(case.shape[0])
    seed = step.seed.repeat_interleave(nodes)
    return Runner(
        lambda: rk.sample(rows, temperature=TEMPERATURE, seed=seed, position=position),
        repeat=len(rows),
    )


def truth(case: Case, step: Step) -> Truth:
    values = on_the_cpu(case, step) if case.device == "cuda" else definition(step)
    return Truth(values, dict.fromkeys(values, Tolerance(0.0, 0.0)))


def definition(step: Step) -> dict[str, Tensor]:
    """The definition in torch."""
    batch = step.logits.shape[0]
    fill = lambda x, dtype: torch.full((batch,), x, dtype=dtype)  # noqa: E731
    out = _load.implementation("verify_tree", "reference")(
        step.logits, *step.draft[:2], None, None, *step.tree.children,
        fill(TEMPERATURE, torch.float32), fill(0, torch.int64), fill(1.0, torch.float32),
        fill(0.0, torch.float32), step.seed, fill(0, torch.int64), None, None, None, None,
        step.tree.depth, step.tree.max_children, 12,
    )  # fmt: skip
    return {"tokens": out[0].double(), "length": out[1].double(), "topk_ids": out[3].double()}


def on_the_cpu(case: Case, step: Step) -> dict[str, Tensor]:
    """What the CPU's kernels give, which have the bits of the definition, on the path alone."""
    seed = step.seed.cpu()
    if case.op == "sample":
        return {"tokens": draw(step.logits[:, 0].cpu(), seed, 0).double().to(case.device)}
    nodes, tree = list(range(case.shape[1])), step.tree
    if not case.label.endswith(TYPICAL):
        nodes = max(step.walks, key=len)
        tree = rk.DraftTree.chain(len(nodes))
    tokens = step.draft.tokens[:, nodes].cpu()
    draft = rk.Draft(tokens, torch.ones_like(tokens, dtype=torch.bool))
    out = rk.verify_tree(
        step.logits[:, nodes].cpu(), draft, tree, temperature=TEMPERATURE, seed=seed, position=0
    )
    if [[nodes[i] for i in path if i >= 0] for path in out.path.tolist()] != step.walks:
        raise ValueError("walks: not those that the drafts were made for")
    more = step.tree.depth - tree.depth
    values = {
        "tokens": pad(out.tokens, (0, more), value=-1.0),
        "length": out.length,
        "topk_ids": pad(out.topk_ids, (0, 0, 0, more), value=-1.0),
    }
    return {name: value.double().to(case.device) for name, value in values.items()}


def case_of(label: str, dtype: str, shape: tuple[int, int], *gates: Gate, peer: str) -> Case:
    return Case(
        "verify_row" if peer == "softmax" else "verify_step", (*shape, VOCAB), dtype, "cpu",
        passes=1, providers=("reasonkern", peer), threads=1, label=label, gates=gates,
    )  # fmt: skip


def cuda_case(op: str, batch: int, label: str, *gates: Gate) -> Case:
    """Each call on rows of its own: those visited at a batch of 32 would stay in the L2."""
    step = op == "verify_step"
    visited = sum(VISITS[b % len(VISITS)] for b in range(batch)) if step else batch
    return Case(
        op, (batch, TREE if step else 1, VOCAB), "bfloat16", "cuda", passes=1,
        providers=("ours-cuda", "ours-triton", "copy", "eager", *(["softmax"] * step)),
        label=label, gates=gates, quick=batch == 32 and label == "peaked",
        input_shape=(visited, VOCAB), rotate=2 if batch == 256 else 8,
    )  # fmt: skip


CPU_CASES = (
    case_of("peaked", "float32", (8, 1), Gate("time", 0.5, "softmax"), peer="softmax"),
    case_of("flat", "float32", (8, 1), Gate("time", 1.5, "softmax"), peer="softmax"),
    case_of("peaked", "bfloat16", (8, 1), peer="softmax"),
    case_of("flat", "bfloat16", (8, 1), peer="softmax"),
    case_of("peaked", "float32", (4, DEPTH + 1), Gate("time", 1.1, "sample"), peer="sample"),
    case_of("flat", "float32", (4, DEPTH + 1), Gate("time", 1.1, "sample"), peer="sample"),
)
CUDA_CASES = (
    cuda_case("verify_step", 1, "peaked", Gate("microseconds", 5.0 * max(VISITS) + 5.0)),
    cuda_case("verify_step", 32, "peaked", Gate("microseconds", 5.0 * max(VISITS) + 5.0)),
    cuda_case("verify_step", 256, "peaked", Gate("time", 1.5, "copy")),
    cuda_case("verify_step", 32, f"peaked, {TYPICAL}"),
    cuda_case("verify_step", 256, f"peaked, {TYPICAL}"),
    cuda_case("verify_step", 32, "flat"),
    cuda_case("verify_step", 256, "flat"),
    *(cuda_case("sample", batch, "peaked") for batch in (1, 32, 256)),
    cuda_case("sample", 256, "flat"),
)
CASES = CPU_CASES + CUDA_CASES
OURS = {"verify_row": ours, "verify_step": ours, "sample": ours_sample}
ON_GPU = ("verify_step", "sample")
PROVIDERS = {
    "reasonkern": Provider("reasonkern", OURS),
    **gpu_providers({op: OURS[op] for op in ON_GPU}),
    "softmax": Provider("softmax", {"verify_row": softmax, "verify_step": softmax}, checked=False),
    "sample": Provider("sample", {"verify_step": sampling}, checked=False),
    "eager": Provider("eager", dict.fromkeys(ON_GPU, eager), checked=False),
    "copy": Provider("copy", dict.fromkeys(ON_GPU, copy), checked=False),
}
