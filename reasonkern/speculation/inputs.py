"""From what a caller holds to what the operators take: per-request tensors, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .draft import Draft
from .tree import DraftTree

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ENTRY = 64  # tokens of a draft law
MAX_EOS = 64
INTEGERS = (torch.int64, torch.int32)
ALL_INTEGERS = (*INTEGERS, torch.int16, torch.int8, torch.uint8)
CONTIGUOUS = torch.contiguous_format


class _Range(NamedTuple):
    expected: str
    low: float
    high: float
    open_low: bool = False

    def holds(self, x: Any) -> Any:
        """Of a number or, element by element, of a tensor."""
        above = x > self.low if self.open_low else x >= self.low
        return above & (x <= self.high)


# Values beyond the bound of "off" are legal: the row functions read them as no filter.
_RANGES = {
    "temperature": _Range("finite values >= 0", 0, torch.finfo(torch.float32).max),
    "top_p": _Range("values > 0", 0, math.inf, open_low=True),
    "min_p": _Range("values <= 1", -math.inf, 1),
    "max_length": _Range("values >= 0", 0, math.inf),
    "position": _Range("values >= 0", 0, math.inf),
}


def as_int64(name: str, value: object) -> int:
    """An integer in [-2^63, 2^64) as the int64 with the same bits."""
    return _checks.signed(_checks.check_seed(name, value))


def per_request(
    name: str, x: object, batch: int, dtype: torch.dtype, device: torch.device,
    shape: str = "(B,)",
) -> Tensor:  # fmt: skip
    """A number, or a 0-dim or (B,) tensor, as contiguous (B,) of `dtype`; its range is checked.

    `shape` is what messages call (B,).
    """
    rule = _RANGES.get(name)
    if isinstance(x, Tensor):
        rows = x
        if not _checks.is_contiguous(x, (batch,), dtype, device):
            rows = _as_rows(name, x, batch, dtype, device, shape)
        if rule is None or not _checks.reads_values(rows):
            return rows
        if not all(map(rule.holds, _checks.extremes(rows))):
            _checks.check_all(name, rows, rule.holds(rows), rule.expected)
        return rows
    if dtype == torch.int64:
        if not _checks.is_integer(x):
            _checks.fail(name, f"an integer or a {shape} tensor", repr(x))
        x = as_int64(name, x)
    elif not _checks.is_number(x):
        _checks.fail(name, f"a number or a {shape} tensor", repr(x))
    if rule is not None and not rule.holds(x):
        _checks.fail(name, rule.expected, x)
    if dtype == torch.float32:  # what is larger means "off", and float32 cannot hold it
        x = max(-_checks.LARGEST, min(float(x), _checks.LARGEST))
    return torch.full((batch,), x, dtype=dtype, device=device)


def _as_rows(
    name: str, x: Tensor, batch: int, dtype: torch.dtype, device: torch.device, shape: str
) -> Tensor:
    allowed = ALL_INTEGERS if dtype == torch.int64 else (*LOGITS_DTYPES, *ALL_INTEGERS)
    _checks.check_dtype(name, x, *allowed)
    if x.device != device:
        _checks.fail(name, f"device {device}", x.device)
    if x.ndim:
        _checks.check_shape(name, x, (batch,), shape)
    return x.detach().to(dtype).expand(batch).contiguous()


def row_parameters(
    logits: Tensor, temperature: object, top_k: object, top_p: object, min_p: object,
    seed: object, position: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, device = logits.shape[0], logits.device
    real, whole = torch.float32, torch.int64
    if top_k is None and min_p is None:  # one launch for both: 0 is off, of either dtype
        largest = torch.zeros(batch, dtype=whole, device=device)
        least = largest.view(real)[:batch]
    else:
        largest = per_request("top_k", 0 if top_k is None else top_k, batch, whole, device)
        least = per_request("min_p", 0.0 if min_p is None else min_p, batch, real, device)
    return (
        per_request("temperature", temperature, batch, real, device),
        largest,
        per_request("top_p", 1.0 if top_p is None else top_p, batch, real, device),
        least,
        per_request("seed", seed, batch, whole, device),
        per_request("position", position, batch, whole, device),
    )


def check_logits(logits: Tensor, ndim: int, shape: str) -> None:
    _checks.check_dtype("logits", logits, *LOGITS_DTYPES)
    if logits.ndim != ndim:
        _checks.fail("logits", f"shape {shape}", tuple(logits.shape))
    if not 0 < logits.shape[-1] < 1 << 22:
        _checks.fail("logits", "a vocabulary of 1 to 2^22 - 1", tuple(logits.shape))
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        _checks.fail("logits", "the last dimension contiguous", f"strides {logits.stride()}")


def check_mask(name: str, mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """The bitmask with a contiguous last dimension."""
    if mask is None:
        return None
    _checks.check_dtype(name, mask, torch.int32)
    _checks.check_device(name, mask, logits, "logits")
    words = (logits.shape[-1] + 31) // 32
    _checks.check_shape(name, mask, (*logits.shape[:-1], words), "(…, ceil(V / 32))")
    return mask if words == 1 or mask.stride(-1) == 1 else mask.clone(memory_format=CONTIGUOUS)


def check_draft(draft: Draft, tree: DraftTree, logits: Tensor, rejection: bool) -> list[Tensor]:
    """tokens, valid and, for rejection, the law of each node's children; all contiguous."""
    if not isinstance(tree, DraftTree):
        _checks.fail("tree", "a DraftTree", type(tree).__name__)
    if not isinstance(draft, Draft):
        _checks.fail("draft", "a Draft", type(draft).__name__)
    shape = logits.shape[:2]
    if shape[1] != tree.nodes:
        _checks.fail("logits", f"one row per node, (B, {tree.nodes}, V)", tuple(logits.shape))
    tokens, valid = draft.tokens, draft.valid
    for name, x, dtype in (
        ("draft.tokens", tokens, torch.int64),
        ("draft.valid", valid, torch.bool),
    ):
        if not _checks.is_contiguous(x, shape, dtype, logits.device):
            _checks.check_device(name, x, logits, "logits")
            _checks.check_shape(name, x, shape, "(B, N)")
            _checks.check_dtype(name, x, dtype)
    if not rejection:
        return [tokens.contiguous(), valid.contiguous()]
    if draft.q_ids is None or draft.q_logprob is None:
        _checks.fail("draft", 'q_ids and q_logprob with mode="rejection"', None)
    q_ids, q_logprob = check_tensor("draft.q_ids", draft.q_ids), draft.q_logprob
    if q_ids.ndim != 3 or not 0 < q_ids.shape[-1] <= MAX_ENTRY:
        _checks.fail("draft.q_ids", f"shape (B, N, K), K <= {MAX_ENTRY}", tuple(q_ids.shape))
    for name, x in (("draft.q_ids", q_ids), ("draft.q_logprob", q_logprob)):
        _checks.check_device(name, x, logits, "logits")
        _checks.check_shape(name, x, (*shape, q_ids.shape[-1]), "(B, N, K)")
    _checks.check_dtype("draft.q_ids", q_ids, torch.int64)
    _checks.check_dtype("draft.q_logprob", q_logprob, torch.float32)
    if _checks.reads_values(q_logprob):
        bad = ~(q_logprob <= 1e-3)
        if bad.any():
            _checks.fail("draft.q_logprob", "log-probabilities <= 0", q_logprob[bad][0].item())
    return [t.contiguous() for t in (draft.tokens, draft.valid, q_ids, q_logprob)]


def step_limits(
    logits: Tensor,
    tree: DraftTree,
    eos: int | Sequence[int] | Tensor | None,
    max_length: object,
    num_nodes: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, device = logits.shape[0], logits.device
    ids = None
    if isinstance(eos, Tensor):
        _checks.check_dtype("eos", eos, *INTEGERS)
        _checks.check_device("eos", eos, logits, "logits")
        if eos.ndim > 1:
            expected = "shape (E,), of ids that end any request"
            _checks.fail("eos", expected, tuple(eos.shape))
        ids = eos.reshape(-1).to(torch.int64).contiguous()
    elif eos is not None:
        given = eos if isinstance(eos, (list, tuple)) else [eos]
        for token in given:
            if not _checks.is_integer(token):
                _checks.fail("eos", "an id, a list of ids or a tensor", repr(eos))
        ids = _checks.filled([as_int64("eos", x) for x in given], device)
    if ids is not None and ids.numel() > MAX_EOS:
        _checks.fail("eos", f"at most {MAX_EOS} ids", ids.numel())
    cap = used = None
    if max_length is not None:
        cap = per_request("max_length", max_length, batch, torch.int64, device)
    if num_nodes is not None:
        used = per_request("num_nodes", num_nodes, batch, torch.int64, device)
        _checks.check_range("num_nodes", used, 1, tree.nodes + 1)
    return ids, cap, used


def cache_layers(key: Any, value: Any, paged: bool) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, a checked pair per layer; 8-bit floats as the bytes that they are."""
    if not isinstance(key, (list, tuple)):
        layers = [_checked_layer(key, value, "", paged)]
        _check_apart(layers, listed=False)
        return layers
    if not isinstance(value, (list, tuple)) or not 0 < len(key) == len(value):
        got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
        _checks.fail("value", f"a list of {len(key)} tensors, one for each of key (>= 1)", got)
    layers = []
    kinds: tuple[object, object] = (None, None)
    for k, v in zip(key, value, strict=True):
        if _is_of(k, kinds[0]) and _is_of(v, kinds[1]):
            small = k.dtype is not layers[-1][0].dtype
            layers.append((k.view(torch.uint8), v.view(torch.uint8)) if small else (k, v))
            continue
        at = f"[{len(layers)}]"
        layers.append(_checked_layer(k, v, at, paged))
        _check_same_slots(k, key[0], at, paged)
        kinds = _kind(k), _kind(v)
    _check_apart(layers, listed=True)
    return layers


def _kind(x: Tensor) -> tuple[object, ...]:
    """All that the checks of a layer look at."""
    return x.dtype, x.shape, x.stride(), x.device


def _is_of(x: object, kind: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and _kind(x) == kind


def _checked_layer(key: Tensor, value: Tensor, at: str, paged: bool) -> tuple[Tensor, Tensor]:
    """`at` follows the names in messages: the layer's index."""
    if isinstance(key, Tensor) and isinstance(value, Tensor) and key.dtype != value.dtype:
        _checks.fail(f"value{at}", f"dtype {key.dtype}, that of key{at}", value.dtype)
    if _is_small(key) and _is_small(value):
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    caches = ((f"key{at}", key), (f"value{at}", value))
    for name, x in caches:
        check_tensor(name, x)
        if x.ndim != 4:
            layout = "(blocks, block_size, H, D)" if paged else "(B, H, S, D)"
            _checks.fail(name, f"shape {layout}", tuple(x.shape))
    _checks.check_device(f"value{at}", value, key, f"key{at}")
    shape = (*key.shape[:3], value.shape[3])
    _checks.check_shape(f"value{at}", value, shape, f"that of key{at} up to D")
    for name, x in caches:
        *lead, inner = zip(x.shape, x.stride(), strict=True)
        if x.numel() and inner[0] > 1 and inner[1] != 1:
            _checks.fail(name, "the last dimension contiguous", f"strides {x.stride()}")
        if x.numel() and any(n > 1 and step < inner[0] for n, step in lead):
            _checks.fail(name, "rows that do not overlap", f"strides {x.stride()}")
    return key, value


def _is_small(x: object) -> bool:
    """8-bit floats, which no other function takes."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return False
    return x.is_floating_point() and x.itemsize == 1


def _check_same_slots(key: Tensor, first: Tensor, at: str, paged: bool) -> None:
    """Layers may differ in all but where their slots are."""
    if key.device != first.device:
        _checks.fail(f"key{at}", f"the device of key[0], {first.device}", key.device)
    slots = 1 if paged else 2
    if (key.shape[0], key.shape[slots]) != (first.shape[0], first.shape[slots]):
        expected = "the blocks and block_size" if paged else "the B and S"
        _checks.fail(f"key{at}", f"{expected} of key[0], {tuple(first.shape)}", tuple(key.shape))


def _check_apart(layers: list[tuple[Tensor, Tensor]], listed: bool) -> None:
    """What lies in two caches would move twice: in keys and values, or in layers that share one."""
    if torch.compiler.is_compiling():
        return
    owners: dict[int, int] = {}
    for i, (key, value) in enumerate(layers):
        place = key.data_ptr()  # 0 of an empty one and of device meta
        if not place:
            continue
        at = f"[{i}]" if listed else ""
        if -value.shape[3] < (value.data_ptr() - place) // key.itemsize < key.shape[3]:
            expected = "memory of its own (for a cache of one tensor: key[..., :0])"
            _checks.fail(f"value{at}", expected, f"that of key{at}")
        if owners.setdefault(place, i) != i:
            _checks.fail(f"key{at}", "memory of its own", f"that of key[{owners[place]}]")


def check_path(key: Tensor, lengths: Tensor, path: Tensor, block_table: Tensor | None) -> int:
    """Shapes of what says where to move; returns the number of slots a request can address."""
    check_tensor("lengths", lengths)
    check_tensor("path", path)
    if lengths.ndim != 1:
        _checks.fail("lengths", "shape (B,)", tuple(lengths.shape))
    batch = lengths.shape[0]
    if path.ndim != 2:
        _checks.fail("path", "shape (B, P)", tuple(path.shape))
    _checks.check_shape("path", path, (batch, path.shape[1]), "(B, P)")
    if block_table is None:
        _checks.check_shape("key", key, (batch, *key.shape[1:]), "(B, H, S, D)")
        return key.shape[2]
    _checks.check_dtype("block_table", block_table, *INTEGERS)
    _checks.check_device("block_table", block_table, key, "key")
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        _checks.fail("block_table", f"shape ({batch}, max_blocks)", tuple(block_table.shape))
    return key.shape[1] * block_table.shape[1]


def check_slots(
    lengths: Tensor, path: Tensor, accepted: Tensor, start: Tensor, slots: int,
    block_table: Tensor | None, blocks: int, size: int,
) -> None:  # fmt: skip
    """Sources and destinations lie in the cache. CPU only, like `_checks.check_range`."""
    if not _checks.reads_values(lengths):
        return
    _checks.check_range("accepted", accepted, 0, path.shape[1] + 1)
    steps = torch.arange(path.shape[1], device=path.device)
    moves = steps < accepted.unsqueeze(-1)
    moved = accepted > 0  # padding may have any slot
    _checks.check_range("lengths", lengths, 0, slots + 1, where=moved)
    if start is not lengths and (moved & (start < lengths)).any():
        _checks.fail("start", "slots >= lengths", start.tolist())
    _checks.check_range("path", path, 0, max(slots, 1), where=moves)
    source = start.unsqueeze(-1) + path
    _checks.check_range("start + path", source, 0, slots, where=moves)
    if (moves[:, 1:] & (path[:, 1:] <= path[:, :-1])).any():
        _checks.fail("path", "ascending nodes", path.tolist())
    if block_table is not None:
        target = lengths.unsqueeze(-1) + steps
        for x in (source, target):
            entry = block_table.gather(1, torch.where(moves, x // size, 0))
            _checks.check_range("block_table", entry, 0, blocks, where=moves)
