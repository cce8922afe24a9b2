"""The decoding loop: draft, one pass of the model over all nodes, verify, learn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..modulation import ModulationState, commit_
from ..speculation import Draft, DraftTree, NgramTable, Verified, verify_tree
from ..speculation.inputs import per_request
from . import prompts as _prompts
from .drafts import Drafter, plant
from .passes import Model, logits_of, tree_pass
from .statistics import Clock, Statistics
from .trees import BestTree

PLAIN = DraftTree.chain(1)
TOGETHER = 8  # plain steps whose rows the table learns in one call

Stop = Callable[[int, list[int]], bool]
Emit = Callable[[int, list[int]], None]


@dataclass
class Request:
    """One text under way."""

    index: int
    text: list[int]
    prompt: int
    """Tokens of the prompt."""
    end: int
    """Tokens at most."""
    cached: int
    """Tokens whose keys and values are kept: what a stop cuts off stays among them."""
    done: bool = False


@dataclass
class Sampling:
    """How each of R requests is sampled; (R,) tensors, as `sample` takes them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def of(
        cls, requests: int, device: torch.device, *, temperature: Any, top_k: Any, top_p: Any,
        min_p: Any, seed: Tensor,
    ) -> Sampling:  # fmt: skip
        """From numbers or (R,) tensors; None = off."""

        def rows(name: str, value: Any, dtype: torch.dtype, off: float) -> Tensor:
            given = off if value is None else value
            return per_request(name, given, requests, dtype, device, "(requests,)")

        return cls(
            rows("temperature", temperature, torch.float32, 0.0),
            rows("top_k", top_k, torch.int64, 0),
            rows("top_p", top_p, torch.float32, 1.0),
            rows("min_p", min_p, torch.float32, 0.0),
            rows("seed", seed, torch.int64, 0),
        )

    def take(self, rows: Tensor) -> Sampling:
        """Those of some requests."""
        return Sampling(**{name: x[rows] for name, x in vars(self).items()})


class Run:
    """The state of one call: requests, their cache, and what drafts for them.

    Requests that are over stay as padding until half of them are; then they leave the batch.
    """

    def __init__(
        self,
        model: Model,
        requests: list[Request],
        sampling: Sampling,
        *,
        table: NgramTable | None,
        scope: Tensor,
        tree: DraftTree | None,
        drafter: Drafter | None,
        control: tuple[ModulationState, Tensor] | None,
        eos: Sequence[int],
        stop: Stop | None,
        emit: Emit | None,
        statistics: Statistics,
    ) -> None:
        self.model, self.requests, self.sampling = model, requests, sampling
        self.control = control
        self.table, self.scope, self.drafter = table, scope, drafter
        self.eos = torch.tensor(eos, dtype=torch.int64, device=model.device) if eos else None
        self._eos_ids, self.stop, self.emit = frozenset(eos), stop, emit
        self.statistics, self.clock = statistics, Clock(statistics, model.device)
        if table is None:
            tree = PLAIN  # nothing fills another one
        self.tree: DraftTree | BestTree = BestTree(model.timings) if tree is None else tree
        self._waiting: list[tuple[Tensor, ...]] = []
        self._before = self._look_ups()

    def run(self) -> None:
        """Until every request is over."""
        with self.clock.phase("prompt"):
            self.cache = _prompts.read(self.model, self.requests, self.table, self.scope)
        while self.requests:
            self._step()
            self.clock.read()
            self._drop()
        self._catch_up()
        self.clock.read(wait=True)
        found = self._look_ups()
        found.subtract(self._before)
        self.statistics.misses += found.pop(0, 0)
        self.statistics.hits.update(found)

    def _look_ups(self) -> Counter[int]:
        """In the table so far, by the order that answered; 0 = none did."""
        if self.table is None:
            return Counter()
        stats = self.table.stats()
        return Counter({**stats["hits"], 0: stats["misses"]})

    # ---- a step

    def _step(self) -> None:
        begin = time.perf_counter()
        with self.clock.phase("draft"):
            now = self._now()
            draft, tree, watched = self._drafted(now)
        out = self._verify(self._forward(draft, tree, now), draft, tree, now)
        with self.clock.phase("verify"):  # the one wait for the device
            parts = (out.length[:, None], out.tokens, out.path)
            rows = torch.cat(parts, 1).tolist()
            if watched is not None:
                self._watch(watched.tolist())
        with self.clock.phase("update"):
            paths = [row[-tree.depth - 1 :][: row[0]] for row in rows]
            moved = any(node != j for path in paths for j, node in enumerate(path))
            self.cache.commit(out.path, out.length, moved)
            if self.control is not None:
                state, slot = self.control
                commit_(
                    state, slot, out.tokens, out.length, entropy=out.entropy,
                    confidence=out.confidence,
                )  # fmt: skip
            self._learn(tree, now, out)
        self.statistics.sizes[tree.nodes] += 1
        if isinstance(self.tree, BestTree):
            self.tree.took(time.perf_counter() - begin)
        for request, row in zip(self.requests, rows, strict=True):
            request.cached += row[0]
            if not request.done:
                self._take_in(request, row[1 : 1 + row[0]])

    def _now(self) -> _Now:
        width = 1 if self.table is None else self.table.orders[0]
        count, contexts = len(self.requests), []
        for r in self.requests:
            last = [] if r.done else r.text[-width:]
            contexts += [-1] * (width - len(last)) + last
        lengths = [len(r.text) for r in self.requests]
        left = [0 if r.done else r.end - len(r.text) for r in self.requests]
        values = _sent(lengths + left + contexts, self.model.device)
        position, left, context = values.split((count, count, count * width))
        return _Now(position, left, context.view(count, width))

    def _drafted(self, now: _Now) -> tuple[Draft, DraftTree, Tensor | None]:
        """With all drafted tokens (B, more nodes), -1 = none, where a `BestTree` asks for them."""
        if self.drafter is not None:
            return *self._external(), None
        if isinstance(self.tree, DraftTree):
            return self._draft(self.tree, now), self.tree, None
        tree, filled, watched = self.tree.next(len(self.requests))
        draft = self._draft(filled, now)
        every = draft.tokens.where(draft.valid, -1) if watched else None
        if filled is not tree:
            draft = Draft(draft.tokens[:, : tree.nodes], draft.valid[:, : tree.nodes])
        return draft, tree, every

    def _watch(self, drafted: list[list[int]]) -> None:
        assert isinstance(self.tree, BestTree)
        active = [row for row, request in enumerate(self.requests) if not request.done]
        requests = [self.requests[row] for row in active]
        self.tree.drafted(requests, [drafted[row] for row in active])

    def _draft(self, tree: DraftTree, now: _Now) -> Draft:
        if tree.nodes == 1 or self.table is None:
            root = now.context[:, -1:]
            return Draft(root.clamp_min(0), root >= 0)
        self._catch_up()
        draft = self.table.draft(
            now.context, tree, temperature=self.sampling.temperature, seed=self.sampling.seed,
            position=now.position, scope=self.scope,
        )  # fmt: skip
        if self.table.vocab_size == self.model.vocab_size:
            return draft
        # A larger table may have learnt ids that the model has no row for.
        known = draft.tokens < self.model.vocab_size
        return Draft(draft.tokens.where(known, draft.tokens[:, :1]), draft.valid & known)

    def _external(self) -> tuple[Draft, DraftTree]:
        assert self.drafter is not None
        active = [r for r in self.requests if not r.done]
        found = self.drafter([r.index for r in active], [r.text for r in active])
        _checks.check_list("drafter", found, "proposals, one per request")
        if len(found) != len(active):
            _checks.fail("drafter", f"{len(active)} proposals, one per request", len(found))
        given = dict(zip([r.index for r in active], found, strict=True))
        roots = [-1 if r.done else r.text[-1] for r in self.requests]
        proposals = [given.get(r.index, ((), ())) for r in self.requests]
        return plant(proposals, roots, self.model.vocab_size, self.model.device)

    def _forward(self, draft: Draft, tree: DraftTree, now: _Now) -> Tensor:
        with self.clock.phase("forward"):
            longest = max(r.cached for r in self.requests)
            given = tree_pass(draft.tokens, tree, self.cache, longest, now.left)
            return logits_of(self.model, given)

    def _verify(self, logits: Tensor, draft: Draft, tree: DraftTree, now: _Now) -> Verified:
        """The one call in which logits become tokens; it reads the control and writes nothing."""
        s = self.sampling
        watched = self.control is not None and self.control[0].watches_statistics
        with self.clock.phase("verify"):
            return verify_tree(
                logits, draft, tree, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
                min_p=s.min_p, seed=s.seed, position=now.position, max_length=now.left,
                mode="target-only" if self.drafter is not None else "shared", eos=self.eos,
                topk=1 if self.table is None else self.table.topk, control=self.control,
                stats=watched,
            )  # fmt: skip

    def _learn(self, tree: DraftTree, now: _Now, out: Verified) -> None:
        """Rows of plain steps are collected: until the next draft nobody asks for them."""
        if self.table is None:
            return
        if tree.nodes > 1:
            self.table.update_verified(now.context, out, scope=self.scope)
            return
        rows = now.context, out.topk_ids[:, 0], out.topk_logits[:, 0], out.lse[:, 0]
        self._waiting.append((*rows, self.scope))
        if len(self._waiting) == TOGETHER:
            self._catch_up()

    def _catch_up(self) -> None:
        if self.table is None or not self._waiting:
            return
        context, ids, logits, lse, scope = (torch.cat(x) for x in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.table.update(context, ids, logits, lse=lse, scope=scope)

    def _take_in(self, request: Request, tokens: list[int]) -> None:
        if not tokens:
            raise RuntimeError(
                f"request {request.index}: the model's logits after {len(request.text)} tokens "
                "have no finite value"
            )
        kept = 0
        for token in tokens:
            request.text.append(token)
            kept += 1
            if self.stop is not None and self.stop(request.index, request.text):
                request.done = True
                break
        request.done |= token in self._eos_ids or len(request.text) == request.end
        self.statistics.accepted[kept] += 1
        if self.emit is not None:
            self.emit(request.index, request.text[-kept:])

    def _drop(self) -> None:
        keep = [row for row, r in enumerate(self.requests) if not r.done]
        if 2 * len(keep) > len(self.requests):
            return
        self.requests = [self.requests[row] for row in keep]
        if not keep:
            return
        rows = _sent(keep, self.model.device)
        self.cache.take(rows)
        self.sampling = self.sampling.take(rows)
        self.scope = self.scope[rows]
        if self.control is not None:
            self.control = self.control[0], self.control[1][rows]


def _sent(values: list[int], device: torch.device) -> Tensor:
    """On the device; a copy from pinned memory does not wait for what a GPU still computes."""
    pinned = device.type == "cuda"
    return torch.tensor(values, device="cpu", pin_memory=pinned).to(device, non_blocking=pinned)


@dataclass
class _Now:
    """Where the requests are; padding rows have a context of -1."""

    position: Tensor  # (B,) tokens so far
    left: Tensor  # (B,) tokens that may follow, 0 of a request that is over
    context: Tensor  # (B, W)
