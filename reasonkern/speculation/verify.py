"""`sample`, `verify_tree`, `compact_kv_` and `request_seeds`: checks, then one operator each."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from . import noise
from . import verify_op as _verify_op  # noqa: F401  (defines the operators)
from .draft import Draft
from .inputs import (
    as_int64,
    cache_layers,
    check_draft,
    check_logits,
    check_mask,
    check_path,
    check_slots,
    row_parameters,
    step_limits,
)
from .tree import DraftTree

if TYPE_CHECKING:
    from ..modulation.state import ModulationState

MODES = ("shared", "target-only", "greedy", "rejection")
MAX_TOPK = 64
_compact = torch.ops.reasonkern.compact_kv_.default
SEED_TAG = 0xFFFFFFFF  # stream word of `request_seeds`, which no other noise uses


class Status(IntFlag):
    """Bits of `Verified.status`.

    Attributes:
        EOS: an end-of-sequence id was emitted; the step ends with it.
        BAD_ROW: a row on the path had NaN, +inf or nothing finite among its allowed logits.
        CAPPED: all of ``max_length`` is used.
    """

    EOS = 1
    BAD_ROW = 2
    CAPPED = 4


@documented
class Verified(NamedTuple):
    """What a verification step emits; D is the tree's depth. Rows from ``length`` on are empty.

    Attributes:
        tokens: (B, D + 1) int64 emitted tokens, -1 beyond ``length``.
        length: (B,) int64 number of emitted tokens, the bonus token included.
        path: (B, D + 1) int64 node whose row emitted each token, -1 when empty; but ``path[:, 0]``
            is the root, 0, also where nothing was emitted.
        topk_ids: (B, D + 1, topk) int64 ids of the largest raw logits of each row on the path, -1 =
            empty: all of a row with NaN or +inf, from which a table learns nothing.
        topk_logits: (B, D + 1, topk) float32 those logits, before temperature, mask and filters;
            -inf = empty.
        lse: (B, D + 1) float32 log-sum-exp of the raw row; -inf = empty.
        status: (B,) int32 bits, see `Status`.
        logprob: (B, D + 1) float32, with ``stats=True`` alone, as all that follow: see
            `reasonkern.Sampled`. -inf = empty, or of a bad row.
        entropy: (B, D + 1) float32.
        entropy_raw: (B, D + 1) float32.
        confidence: (B, D + 1) float32.
        max_prob: (B, D + 1) float32.
        trigger: (B, D + 1) bool; False = empty.
    """

    tokens: Tensor
    length: Tensor
    path: Tensor
    topk_ids: Tensor
    topk_logits: Tensor
    lse: Tensor
    status: Tensor
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    entropy_raw: Tensor | None = None
    confidence: Tensor | None = None
    max_prob: Tensor | None = None
    trigger: Tensor | None = None


def request_seeds(
    seed: int | Tensor, batch: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Independent 64-bit seeds for the requests of a run, a Philox hash of (seed, index).

    Neighbouring seeds would be no worse, but a run seeded ``seed + 1`` would share all but one
    request's noise with this one; hashed seeds share none. Two requests with the same seed get the
    same noise at the same position.

    Args:
        seed: an integer below 2^64 (2^63 where ``torch.compile`` sees it change), or a 0-dim int64
            tensor read as uint64.
        batch: number of seeds B.
        device: of the result; None = that of ``seed``, or the CPU.

    Returns:
        (B,) int64, to be read as uint64.

    Raises:
        ValueError: seed out of range or not an integer, batch negative.

    Example:
        >>> import reasonkern as rk
        >>> rk.request_seeds(0, 3).tolist()[:2] == rk.request_seeds(0, 2).tolist()
        True
    """
    _checks.check_integer("batch", batch, 0)
    if isinstance(seed, Tensor):
        _checks.check_dtype("seed", seed, torch.int64)
        _checks.check_shape("seed", seed, (), "0-dim")
        key = seed if device is None else seed.to(device)
    else:
        number = as_int64("seed", seed)
        key = torch.full((), number, dtype=torch.int64, device=device or "cpu")
    index = torch.arange(batch, device=key.device)
    tag = torch.full_like(index, SEED_TAG)
    low, high, *_ = noise.philox((index, index * 0, index * 0, tag), key)
    return high << 32 | low


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    position: int | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Seeded sampling: a token per row as a pure function of (logits, filters, seed, position).

    ``argmax_v z_v / T + g(seed, position, v)`` over the filtered vocabulary, with the Gumbel noise
    of the family's contract: the same bits on every backend, for any batch and row. Equivalent to::

        z = logits.float().masked_fill(~mask, -inf) / temperature
        z = min_p(top_p(top_k(z)))
        p = z.softmax(-1)
        token = (p.log() + gumbel_noise(seed, position)).argmax(-1)

    Filters apply in this order: mask; temperature; top-k (exactly k tokens, ties go to the lower
    id); top-p (a token stays while the mass of those before it, larger or equal with a lower id, is
    below P); min-p (z / T at least the maximum plus ln m). With temperature 0 the result is the
    arg-max of the masked logits, ties to the lower id, and the other filters do not matter.

    Args:
        logits: (B, V) float32, bfloat16, float16 or float64 (read as float32), the last dimension
            contiguous.
        temperature: >= 0, a number or (B,).
        top_k: tokens kept, a number or (B,); off at <= 0 or >= V. None = off.
        top_p: probability kept, > 0, a number or (B,); off at >= 1. None = off.
        min_p: smallest probability relative to the largest, <= 1, a number or (B,); off at <= 0.
            None = off.
        seed: of each request: an integer below 2^64 (2^63 where ``torch.compile`` sees it change),
            or (B,) int64 read as uint64. One integer is the same noise in every row: several
            samples of one prompt take `request_seeds`.
        position: index of the token to be drawn, padding not counted: a number or (B,) int64.
        mask: (B, ceil(V / 32)) int32: bit v % 32 of word v // 32 allows token v (xgrammar's
            bitmask). None = every token.

    Returns:
        (B,) int64. A row with NaN, +inf or nothing finite (after the mask) gives the arg-max of its
        finite logits, or -1 where there is none.

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also a parameter out of its range.

    Example:
        >>> import torch, reasonkern as rk
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> rk.sample(logits, temperature=0.0, seed=1, position=0).tolist()
        [1]
    """
    check_logits(logits, 2, "(B, V)")
    rows = row_parameters(logits, temperature, top_k, top_p, min_p, seed, position)
    mask = check_mask("mask", mask, logits)
    with torch.no_grad():
        return cast(Tensor, torch.ops.reasonkern.sample(logits, mask, *rows))


def verify_tree(
    logits: Tensor,
    draft: Draft,
    tree: DraftTree,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    position: int | Tensor,
    mode: str = "shared",
    eos: int | Sequence[int] | Tensor | None = None,
    max_length: int | Tensor | None = None,
    topk: int = 12,
    node_mask: Tensor | None = None,
    num_nodes: int | Tensor | None = None,
    control: tuple[ModulationState, Tensor] | None = None,
    stats: bool = False,
) -> Verified:
    """Walks the draft tree, emits 1 to D + 1 tokens per request, without loss.

    In the equality modes the token at a visited node is the one `sample` would draw from that
    node's row at that position; the walk enters the child that holds it and stops where there is
    none. The text is therefore bit for bit that of plain seeded sampling, whatever was drafted. In
    rejection mode children were drawn without replacement from ``draft.q_ids`` with independent
    noise and are accepted by the ratio of the two laws (recursive rejection sampling, Jeon et al.,
    arXiv 2402.14160); the law of the text is that of plain sampling. Equivalent, for one request in
    an equality mode, to::

        node, tokens = 0, []
        while node is not None:
            tokens += [sample(logits[node], position=position + len(tokens), ...)]
            node = next((c for c in children(node) if draft.tokens[c] == tokens[-1]), None)

    Args:
        logits: (B, N, V): row i is the model's output after node i. float32, bfloat16, float16 or
            float64 (read as float32), the last dimension contiguous. Only the rows on the path
            matter.
        draft: a `Draft` for ``tree``. A request whose root is not valid is padding: length 0.
        tree: the `DraftTree` of N nodes.
        temperature: as in `sample`; requests with temperature 0 are greedy in every mode.
        top_k: as in `sample`. None = off.
        top_p: as in `sample`. None = off.
        min_p: as in `sample`. None = off.
        seed: as in `sample`; one integer is the same noise for every request (`request_seeds`).
        position: index of the first token to be emitted, padding not counted; the row at depth d
            emits the token at ``position + d``.
        mode: "shared" or "target-only" (equality; the drafts may depend on anything), "greedy"
            (equality at temperature 0) or "rejection".
        eos: ids, at most 64, that end any request: the step is cut after the first one. A tensor
            (E,) is taken as it is; of a list each id is a launch on a GPU. None = no id.
        max_length: most tokens a request may emit in this step, a number or (B,). None = no bound.
        topk: how many of the largest raw logits of the rows on the path to return, 1 to 64.
        node_mask: (B, N, ceil(V / 32)) int32 bitmask of the tokens allowed after each node. None =
            every token.
        num_nodes: nodes in use, a number or (B,): those from there on are not entered. Parents and
            lower-ranked siblings come first, so any number in [1, N] leaves a tree. None = N.
        control: a `ModulationState` and the (B,) int64 slots of the requests (-1 = none): a visited
            row is controlled as `sample_controlled` does it, after the tokens on its path.
            ``topk_logits`` and ``lse`` are those of the raw row. The state is read, not written;
            `reasonkern.commit_` writes it. None = no control.
        stats: also describe the rows on the path; needed where a request has a `DeepConf` or an
            `EntropyTrigger`, whose windows move along the path.

    Returns:
        `Verified`. A row with NaN, +inf or nothing finite (after the mask) emits the arg-max of its
        finite logits, or ends the step before it, and sets a status bit.

    Raises:
        ValueError: wrong shape, dtype or device, rejection without ``q_ids``, greedy with a
            temperature; on CPU also a parameter out of its range.

    Example:
        >>> import torch, reasonkern as rk
        >>> tree = rk.DraftTree.chain(3)
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[4, 1, 2]]), 5).float()
        >>> draft = rk.Draft(torch.tensor([[0, 4, 3]]), torch.ones(1, 3, dtype=torch.bool))
        >>> out = rk.verify_tree(logits, draft, tree, temperature=0, seed=0, position=0)
        >>> out.tokens.tolist(), out.length.tolist(), out.path.tolist()
        ([[4, 1, -1]], [2], [[0, 1, -1]])
    """
    check_logits(logits, 3, "(B, N, V)")
    _checks.check_choice("mode", mode, MODES)
    if mode == "greedy" and (isinstance(temperature, Tensor) or temperature != 0):
        _checks.fail("temperature", 'the number 0 with mode="greedy"', temperature)
    _checks.check_integer("topk", topk, 1, MAX_TOPK)
    drafted = check_draft(draft, tree, logits, mode == "rejection")
    rows = row_parameters(logits, temperature, top_k, top_p, min_p, seed, position)
    node_mask = check_mask("node_mask", node_mask, logits)
    limits = step_limits(logits, tree, eos, max_length, num_nodes)
    shape = tree.tensors(logits.device)
    args = (
        logits, *drafted, *(None,) * (4 - len(drafted)), shape.child_ptr, shape.child_index,
        *rows, limits[0], limits[1], node_mask, limits[2], tree.depth, tree.max_children, topk,
    )  # fmt: skip
    with torch.no_grad():
        if control is None and not stats:
            return Verified(*torch.ops.reasonkern.verify_tree(*args))
        slot, state = _control_arguments(control, logits, stats)
        out = torch.ops.reasonkern.verify_controlled(*args, slot, state, stats)
    return Verified(*out) if stats else Verified(*out[:7])


def _control_arguments(
    control: object, logits: Tensor, stats: bool
) -> tuple[Tensor | None, list[Tensor]]:
    from ..modulation.sampler import check_statistics, control_arguments  # imports this package

    if control is None:
        return None, []
    if not isinstance(control, tuple) or len(control) != 2:
        _checks.fail("control", "a tuple (ModulationState, slot)", type(control).__name__)
    arguments = control_arguments(*control, logits)
    check_statistics(control[0], stats)
    return arguments


def compact_kv_(
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    accepted: Tensor,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Moves the cache entries of the accepted nodes behind those of the committed tokens, in place.

    Node i of request b lies in slot ``start[b] + i``; node ``path[b, j]`` moves to ``lengths[b] +
    j`` for each j below ``accepted[b]``. The new length is ``lengths + accepted``; the last emitted
    token has no entry yet. Equivalent, for each request and dense caches, to::

        for j in range(accepted[b]):
            key[b, :, lengths[b] + j] = key[b, :, start[b] + path[b, j]]

    A list of layers is moved layer by layer, but checked together, which is most of the time of a
    call. Layers that are one tensor (L, B, H, S, D) take a single launch each for keys and values:
    a call of ``flatten(0, 1)``, the other arguments repeated L times.

    Args:
        key: (B, H, S, D), or (blocks, block_size, H, D) with a block table; the last dimension
            contiguous, rows that do not overlap. Any dtype, 8-bit ones too. Or a list of them, one
            per layer, which may differ in H, D, dtype and strides.
        value: laid out like ``key``; its D may differ. ``key[..., :0]`` where keys and values are
            one tensor, as in MLA. A list where ``key`` is one.
        lengths: (B,) int64 committed tokens in the cache, the root's slot excluded.
        path: (B, P) int64, `Verified.path`.
        accepted: (B,) int64, `Verified.length`; 0 moves nothing, whatever the other arguments say.
        start: (B,) int64 slot of the root, >= lengths. None = lengths.
        block_table: (B, max_blocks) int32 or int64: block of each run of block_size slots. With
            ``row[:, None]`` and a cache (R, S, H, D) request b has row ``row[b]`` of it. None =
            dense, row b.

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also a slot outside the cache.

    Example:
        >>> import torch, reasonkern as rk
        >>> key = torch.arange(6.0).view(1, 1, 6, 1)
        >>> length, path = torch.tensor([2]), torch.tensor([[0, 2, -1]])
        >>> rk.compact_kv_(key, key.clone(), length, path, torch.tensor([2]))
        >>> key.flatten().tolist()
        [0.0, 1.0, 2.0, 4.0, 4.0, 5.0]
    """
    layers = cache_layers(key, value, block_table is not None)
    first = layers[0][0]
    slots = check_path(first, lengths, path, block_table)
    begin = lengths if start is None else start
    for name, x in (("lengths", lengths), ("path", path), ("accepted", accepted), ("start", begin)):
        _checks.check_dtype(name, x, torch.int64)
        _checks.check_device(name, x, first, "key")
        if name != "path":
            _checks.check_shape(name, x, lengths.shape, "(B,)")
    check_slots(lengths, path, accepted, begin, slots, block_table, *first.shape[:2])
    moves = (
        lengths.contiguous(), path.contiguous(), accepted.contiguous(), begin.contiguous(),
        None if block_table is None else block_table.long().contiguous(),
    )  # fmt: skip
    with torch.no_grad():
        for k, v in layers:
            _compact(k, v, *moves)
