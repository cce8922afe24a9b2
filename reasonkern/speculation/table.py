"""`NgramTable`: next-token distributions by n-gram context, learnt from logits already computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from . import table_inputs as inputs
from . import table_op as _op  # noqa: F401  (registers the operators)
from .draft import Draft
from .reference_table import (
    EVICTIONS,
    HITS,
    ID_BITS,
    MISSES,
    NO_NOISE,
    REJECTED,
    REJECTION,
    ROWS,
    SHARED,
    Storage,
)
from .table_storage import allocate, check_settings
from .tree import DraftTree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = {"shared": SHARED, "rejection": REJECTION, "target-only": NO_NOISE, "greedy": NO_NOISE}


class NgramTable:
    """A bounded, deterministic table from n-gram contexts to next-token distributions.

    It learns the top-K probabilities that decoding computes anyway and drafts trees of tokens from
    them (STAND, arXiv 2506.04708). Entries of one context are averaged over its occurrences: with
    n earlier ones, m new ones and per-token sums S over the new ones, p becomes (n p + S) / (n + m)
    for every token of either, of which the K largest stay (ties: the lower id), not renormalised;
    n becomes min(n + m, max_count). Sums are fixed-point integers, so the order of the rows of a
    call never matters. A full set of 8 contexts evicts the one updated least recently, then the one
    with the smallest count. Everything is allocated here and never grows.

    Args:
        capacity: contexts it can hold, a multiple of 8. An entry takes 62 bytes up to a vocabulary
            of 2^18, 74 above (K = 12).
        vocab_size: ids are below it, at most 2^26; None = 2^18.
        orders: lengths of the contexts, at most 4 of them, each 1 to 8, the longest first.
        topk: candidates K kept per context, 1 to 16.
        max_count: occurrences n remembered at most, 1 to 32767: the larger, the slower an entry
            forgets.
        max_scopes: number of separate scopes; see `update`.
        storage: ``"packed"`` keeps a probability in 14 bits (relative step 2^-11 down to 6e-5;
            below 3e-8 it is dropped), ``"exact"`` in 64 bits (206 bytes per entry): the result of
            several calls is then that of one, as long as no entry exceeds K tokens or max_count.
        device: where its tensors live.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import torch, reasonkern as rk
        >>> table = rk.NgramTable(1024, vocab_size=100, orders=(2, 1))
        >>> context = torch.tensor([[5, 6]])
        >>> table.update(context, torch.tensor([[7, 8]]), torch.tensor([[0.7, 0.3]]).log())
        >>> tree = rk.DraftTree([-1, 0, 0])
        >>> table.draft(context, tree, temperature=0.0, seed=0, position=2).tokens
        tensor([[6, 7, 8]])
    """

    def __init__(
        self,
        capacity: int = 1 << 20,
        *,
        vocab_size: int | None = None,
        orders: Sequence[int] = (4, 3, 2),
        topk: int = 12,
        max_count: int = 255,
        max_scopes: int = 4096,
        storage: str = "packed",
        device: torch.device | str = "cpu",
    ) -> None:
        vocab = 1 << ID_BITS if vocab_size is None else vocab_size
        check_settings(capacity, vocab, orders, topk, max_count, max_scopes, storage)
        self.capacity, self.vocab_size = int(capacity), int(vocab)
        self.orders = tuple(int(order) for order in orders)
        self.topk, self.max_count, self.max_scopes = int(topk), int(max_count), int(max_scopes)
        self.storage = storage
        place = _checks.as_device("device", device)
        self._state = allocate(capacity, vocab, topk, max_scopes, storage, place)

    # ---- learning

    def update(
        self,
        context: Tensor,
        topk_ids: Tensor,
        topk_logits: Tensor,
        *,
        lse: Tensor | None = None,
        scope: int | Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Merges M distributions into the entries of their contexts, once per order.

        Args:
            context: (M, max(orders)) token ids, the newest last, padded on the left with -1. An
                order whose window holds a -1 is skipped; a row that ends in -1 is padding.
            topk_ids: (M, k) integers, k at most K; -1 = empty. A row without an id is padding, too.
            topk_logits: (M, k) logits of the raw model output (before temperature, penalties and
                masks), or log-probabilities where ``lse`` is None. A one-hot row (id, 0.0) records
                a token of which the logits are not known.
            lse: (M,) log-sum-exp of the whole row of logits.
            scope: the scope of each row, (M,) or one number; None = 0. Contexts of one scope are
                never found from another: an engine gives each distinct prompt its own.
            process_group: merges the rows of all ranks, in the same way on each of them. All ranks
                call it with the same M and k (pad with -1) and learn the same.

        Raises:
            ValueError: wrong shape, dtype or device; on CPU also an id outside [-1, vocab_size), a
                NaN or +inf, probabilities that add up to more than 1.001, an unknown scope. On a
                GPU, where a check of values would synchronise, such a row is ignored and counted in
                ``stats()["rejected"]``.
        """
        rows = inputs.update_rows(self, context, topk_ids, topk_logits, lse, scope)
        if process_group is not None:
            rows = inputs.gather(rows, process_group)
        try:
            self._merge(rows)
        except RuntimeError:
            inputs.check_rows(self, rows)  # says in which row and why
            raise

    def _merge(self, rows: inputs.Rows) -> None:
        s = self._state
        torch.ops.reasonkern.table_update_(
            rows.context, s.keys, s.slots, s.extra, s.counts, s.ages, s.clock, s.epochs, s.counters,
            self.orders, self.max_count, self.vocab_size, rows.ids, rows.logits, rows.lse,
            rows.scope, self._strict,
        )  # fmt: skip

    def update_from_sequence(
        self,
        tokens: Tensor,
        topk_ids: Tensor,
        topk_logits: Tensor,
        *,
        lengths: Tensor | None = None,
        lse: Tensor | None = None,
        scope: int | Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """`update` with every position of whole sequences: a prompt, or a finished trace.

        Args:
            tokens: (B, L) token ids, padded on the right.
            topk_ids: (B, L, k): [b, t] belongs to the model's output after tokens[b, : t + 1].
            topk_logits: (B, L, k).
            lengths: (B,) positions used of each sequence; None = all L.
            lse: (B, L).
            scope: (B,), one number, or None = 0.
            process_group: as in `update`.

        Raises:
            ValueError: as `update`.
        """
        rows = inputs.sequence_rows(self, tokens, topk_ids, topk_logits, lengths, lse, scope)
        self.update(*rows[:3], lse=rows[3], scope=rows[4], process_group=process_group)

    def update_verified(
        self,
        context: Tensor,
        verified: Any,
        *,
        scope: int | Tensor | None = None,
        all_nodes: tuple[Tensor, Draft, DraftTree] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """`update` with what a verification step computed; never synchronises.

        Args:
            context: (B, max(orders)) the context that was drafted from.
            verified: result of `verify_tree` with a ``topk`` of at most this table's: row j is the
                model's output after ``context + tokens[:j]``; rows at and beyond ``length`` are
                ignored.
            scope: (B,), one number, or None = 0.
            all_nodes: (logits (B, N, V), draft, tree) of the step: learns from the rows of all
                valid nodes, not only from the visited ones. That reads all the logits once more.
            process_group: as in `update`.

        Raises:
            ValueError: as `update`.
        """
        if all_nodes is None:
            rows = inputs.verified_rows(self, context, verified, scope)
        else:
            if not isinstance(all_nodes, tuple) or len(all_nodes) != 3:
                got = type(all_nodes).__name__
                _checks.fail("all_nodes", "a triple (logits, draft, tree)", got)
            rows = inputs.node_rows(self, context, *all_nodes, scope)
        self.update(*rows[:3], lse=rows[3], scope=rows[4], process_group=process_group)

    # ---- drafting

    def draft(
        self,
        context: Tensor,
        tree: DraftTree,
        *,
        temperature: float | Tensor,
        seed: int | Tensor,
        position: int | Tensor,
        mode: str = "shared",
        scope: int | Tensor | None = None,
    ) -> Draft:
        """Fills a tree from the table: the longest order that is known, node by node.

        The children of a node take, by rank, the tokens of the largest scores of its entry (ties:
        the lower id). With p the stored probability, T the temperature, g the noise of the
        contract and d the depth of the node, the score is::

            shared                log p / T + g(seed, position + d, token)   stream 0, the target's
            rejection             log p / T + g(seed, position, token)       stream 1, depth d
            target-only, greedy,
            or T = 0              log p

        Args:
            context: (B, max(orders)) token ids, the newest last, padded on the left with -1.
            tree: the shape.
            temperature: number or (B,), >= 0.
            seed: integer or (B,) int64, read as unsigned; that of `sample` or `verify_tree`. One
                integer is the same noise for every request (`request_seeds`).
            position: integer or (B,): index of the token to be emitted next, counted from 0
                without padding.
            mode: ``"shared"``, ``"target-only"``, ``"greedy"`` or ``"rejection"``; see
                `verify_tree`.
            scope: as in `update`.

        Returns:
            `Draft`. A node without an entry or a candidate is not valid and repeats the root's
            token (0 in a row that ends in -1, which is padding). On a GPU, where they are not
            checked, negative ids and those from 2^31 on count as -1; others outside the vocabulary
            are in no entry.

        Raises:
            ValueError: wrong shape, dtype, device or mode; a negative temperature; on CPU also an
                id outside [-1, vocab_size) or an unknown scope.
        """
        _checks.check_choice("mode", mode, KINDS)
        if not isinstance(tree, DraftTree):
            _checks.fail("tree", "a DraftTree", type(tree).__name__)
        call = inputs.draft_inputs(self, context, temperature, seed, position, scope)
        try:
            tokens, valid, ids, log_q = self._draft(call, tree, KINDS[mode])
        except RuntimeError:
            inputs.check_known(self, call.context, call.scope)
            raise
        return Draft(tokens, valid, *((ids, log_q) if mode == "rejection" else (None, None)))

    def _draft(self, call: inputs.DraftInputs, tree: DraftTree, kind: int) -> tuple[Tensor, ...]:
        s = self._state
        drafted: tuple[Tensor, ...] = torch.ops.reasonkern.table_draft(
            call.context, s.keys, s.slots, s.extra, s.counts, s.epochs, s.counters, self.orders,
            *tree.tensors(self.device), call.scope, call.temperature, call.seed, call.position,
            kind, self.vocab_size, self._strict,
        )  # fmt: skip
        return drafted

    # ---- state

    @property
    def _strict(self) -> bool:
        """Bad values raise where that needs no synchronisation."""
        return self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._state.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; constant."""
        return sum(t.numel() * t.element_size() for t in self._state)

    def __len__(self) -> int:
        """Contexts held, those of reset scopes included until they are evicted (synchronises)."""
        return int((self._state.keys != 0).sum())

    def reset(self, scope: int | Tensor) -> None:
        """Forgets a scope, or (S,) scopes, at once; its entries make room as they grow old.

        Raises:
            ValueError: a scope outside [0, max_scopes).
        """
        count = scope.numel() if isinstance(scope, Tensor) else 1
        index = inputs.scopes(self, scope, count)
        if index is None:
            _checks.fail("scope", "an integer or a tensor", None)
        _checks.check_range("scope", index, 0, self.max_scopes)
        self._state.epochs.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def clear(self) -> None:
        """Forgets everything, the statistics included."""
        for tensor in self._state:
            tensor.zero_()

    def stats(self) -> dict[str, Any]:
        """Counts since construction or `clear`; synchronises.

        ``entries``, ``load`` (entries / capacity), ``hits`` (per order, of drafting look-ups),
        ``misses``, ``hit_rate``, ``evictions``, ``rows`` merged, ``rejected`` rows, ``calls`` of
        update, ``nbytes``.
        """
        counters = self._state.counters.tolist()
        hits = {o: counters[HITS + k] for k, o in enumerate(self.orders)}
        found, entries = sum(hits.values()), len(self)
        return {
            "entries": entries,
            "load": entries / self.capacity,
            "hits": hits,
            "misses": counters[MISSES],
            "hit_rate": found / max(1, found + counters[MISSES]),
            "evictions": counters[EVICTIONS],
            "rows": counters[ROWS],
            "rejected": counters[REJECTED],
            "calls": int(self._state.clock),
            "nbytes": self.nbytes,
        }

    def to(self, device: torch.device | str) -> NgramTable:
        """Moves the table to a device; returns it."""
        device = _checks.as_device("device", device)
        with torch.inference_mode(False):
            self._state = Storage(*(t.to(device) for t in self._state))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Settings and tensors (the live ones, as of a module), for ``torch.save``."""
        return {"settings": self._settings(), **self._state._asdict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the contents of a table of the same settings; drafts are the same to the bit.

        Raises:
            ValueError: other settings; a tensor that is missing, of another shape or dtype, or (if
                it comes from the CPU) with contents that no table has.
        """
        if not isinstance(state, Mapping):
            _checks.fail("state", "a mapping, as state_dict returns it", type(state).__name__)
        _checks.check_settings(state.get("settings"), self._settings())
        inputs.check_state(self, state, self._state)
        for name, tensor in self._state._asdict().items():
            tensor.copy_(state[name])

    def _settings(self) -> dict[str, Any]:
        names = ("capacity", "vocab_size", "topk", "max_count", "max_scopes", "storage")
        return {name: getattr(self, name) for name in names} | {"orders": list(self.orders)}

    def __repr__(self) -> str:
        """Settings and place."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"NgramTable({settings}, device='{self.device}')"
