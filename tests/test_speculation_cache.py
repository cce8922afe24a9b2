"""`compact_kv_` on every backend: dense and paged caches, any layout, nothing else written."""

from __future__ import annotations

import pytest
import torch
from contract import assert_same_bits, bits
from speculation_cases import generator
from torch import Tensor

import reasonkern as rk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def moved(cache: Tensor, lengths, path, accepted, start, table=None) -> Tensor:
    """One by one, in order: the definition."""
    out = cache.clone()
    for b in range(len(lengths)):
        for j in range(int(accepted[b])):
            source, target = int(start[b] + path[b, j]), int(lengths[b]) + j
            if table is None:
                out[b, :, target] = out[b, :, source]
            else:
                size = cache.shape[1]
                row = out[table[b, source // size], source % size]
                out[table[b, target // size], target % size] = row
    return out


def walk(batch: int, nodes: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ascending paths of random lengths, -1 beyond."""
    g = generator(seed)
    accepted = torch.randint(0, steps + 1, (batch,), generator=g)
    accepted[0], accepted[-1] = 0, steps
    path = torch.full((batch, steps), -1)
    for b, n in enumerate(accepted.tolist()):
        drawn = torch.randperm(nodes - 1, generator=g)[: max(n - 1, 0)].sort().values + 1
        path[b, :n] = torch.cat([torch.zeros(1, dtype=torch.int64), drawn])[:n]
    return path, accepted


def caches(shape, dtype, seed):
    g = generator(seed)
    return [torch.randint(-50, 50, shape, generator=g).to(dtype) for _ in range(2)]


def skip_without_kernel(backend):
    if backend.name == "triton":
        pytest.skip("the Triton backend has no compact_kv_")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 6, 64])
@pytest.mark.parametrize("gap", [0, 3])
def test_dense(backend, dtype, width, gap):
    skip_without_kernel(backend)
    path, accepted = walk(4, 7, 5, width)
    lengths = torch.tensor([0, 3, 8, 5])
    start = lengths + gap
    for key, value in [caches((4, 2, 20, width), dtype, 1)]:
        expected = [moved(x, lengths, path, accepted, start) for x in (key, value)]
        args = (key, value, lengths, path, accepted, start, None)
        on = [backend.to(a) for a in args]
        backend("compact_kv_", *on)
        for got, e in zip(on[:2], expected, strict=True):
            assert torch.equal(bits(got.cpu()), bits(e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paged(backend, dtype):
    skip_without_kernel(backend)
    path, accepted = walk(3, 7, 5, 3)
    lengths = torch.tensor([2, 6, 1])
    start = lengths + torch.tensor([0, 2, 5])
    table = torch.randperm(15, generator=generator(2))[:12].view(3, 4)
    key, value = caches((15, 4, 2, 8), dtype, 2)
    expected = [moved(x, lengths, path, accepted, start, table) for x in (key, value)]
    on = [backend.to(a) for a in (key, value, lengths, path, accepted, start, table)]
    backend("compact_kv_", *on)
    assert_same_bits([x.cpu() for x in on[:2]], expected)


def test_strided_caches(backend):
    """Heads beside slots, as models store them: (B, S, H, D) seen as (B, H, S, D)."""
    skip_without_kernel(backend)
    path, accepted = walk(3, 7, 5, 4)
    lengths = torch.tensor([1, 4, 2])
    stored = caches((3, 16, 2, 10), torch.float32, 4)
    views = [x[..., 1:9].transpose(1, 2) for x in stored]
    expected = [moved(x, lengths, path, accepted, lengths) for x in views]
    before = [x.clone() for x in stored]
    on = [backend.to(x) for x in stored]
    on_views = [x[..., 1:9].transpose(1, 2) for x in on]
    rest = [backend.to(a) for a in (lengths, path, accepted, lengths)]
    backend("compact_kv_", *on_views, *rest, None)
    assert_same_bits([x.cpu() for x in on_views], expected)
    for x, b in zip(on, before, strict=True):
        assert_same_bits(x.cpu()[..., [0, 9]], b[..., [0, 9]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_front_takes_every_dtype(dtype):
    path, accepted = walk(3, 7, 5, 6)
    lengths = torch.tensor([1, 4, 2])
    key, value = (x.transpose(1, 2) for x in caches((3, 16, 2, 8), dtype, 5))
    expected = [moved(x, lengths, path, accepted, lengths) for x in (key, value)]
    rk.compact_kv_(key, value, lengths, path, accepted)
    assert_same_bits([key, value], expected)


def test_a_default_device_does_not_matter():
    key, value = caches((1, 2, 8, 3), torch.float32, 1)
    lengths, path, accepted = torch.tensor([2]), torch.tensor([[0, 2, -1]]), torch.tensor([2])
    expected = moved(key, lengths, path, accepted, lengths)
    with torch.device("meta"):
        rk.compact_kv_(key, value, lengths, path, accepted)
    assert torch.equal(key, expected)


def test_one_tensor_for_keys_and_values():
    """MLA keeps a latent per token: alone, or in two parts of a tensor."""
    path, accepted = walk(3, 7, 5, 8)
    lengths = torch.tensor([1, 4, 2])
    for parts in (lambda x: (x, x[..., :0]), lambda x: (x[..., :6], x[..., 6:])):
        latent = caches((3, 1, 16, 8), torch.bfloat16, 6)[0]
        expected = moved(latent, lengths, path, accepted, lengths)
        rk.compact_kv_(*parts(latent), lengths, path, accepted)
        assert_same_bits([latent], [expected])


def test_rows_of_a_larger_dense_cache():
    path, accepted = walk(3, 7, 5, 9)
    lengths, row = torch.tensor([1, 4, 2]), torch.tensor([6, 0, 3])
    stored = caches((8, 16, 2, 8), torch.float32, 7)
    expected = [x.clone() for x in stored]
    for x in expected:
        own = x[row].transpose(1, 2)
        x[row] = moved(own, lengths, path, accepted, lengths).transpose(1, 2)
    rk.compact_kv_(*stored, lengths, path, accepted, block_table=row[:, None])
    assert_same_bits(stored, expected)


def test_all_layers_in_one_call():
    path, accepted = walk(3, 7, 5, 10)
    lengths = torch.tensor([1, 4, 2])
    stored = caches((4, 3, 2, 16, 8), torch.float32, 8)
    expected = [
        torch.stack([moved(layer, lengths, path, accepted, lengths) for layer in x]) for x in stored
    ]
    keys, values = (x.flatten(0, 1) for x in stored)
    rk.compact_kv_(keys, values, lengths.repeat(4), path.repeat(4, 1), accepted.repeat(4))
    assert_same_bits(stored, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("paged", [False, True])
def test_a_list_of_layers(dtype, paged):
    """The bits of layer by layer; heads, widths, strides and dtypes may differ."""
    path, accepted = walk(3, 7, 5, 11)
    lengths = torch.tensor([1, 4, 2])
    table = torch.tensor([[3, 0], [1, 5], [4, 2]]) if paged else None
    front, slots = ((6,), 8) if paged else ((3,), 16)
    layers = [(2, 8, dtype), (2, 8, dtype), (1, 3, dtype), (2, 8, torch.int8), (2, 8, dtype)]
    pairs = [
        caches((*front, slots, heads, width), kind, 20 + i)
        for i, (heads, width, kind) in enumerate(layers)
    ]
    pairs[4][1] = pairs[4][1][..., :6]
    if not paged:
        pairs = [[x.transpose(1, 2) for x in pair] for pair in pairs]
    expected = [[moved(x, lengths, path, accepted, lengths, table) for x in pair] for pair in pairs]
    single = [[x.clone() for x in pair] for pair in pairs]
    for pair in single:
        rk.compact_kv_(*pair, lengths, path, accepted, block_table=table)
    keys, values = map(list, zip(*pairs, strict=True))
    rk.compact_kv_(keys, tuple(values), lengths, path, accepted, block_table=table)
    for got, one, e in zip(pairs, single, expected, strict=True):
        assert_same_bits(got, e)
        assert_same_bits(one, e)


def test_a_list_of_layers_compiles():
    path, accepted = walk(3, 7, 5, 12)
    lengths = torch.tensor([1, 4, 2])
    keys = caches((3, 2, 16, 4), torch.float32, 13)
    values = caches((3, 2, 16, 6), torch.float32, 14)
    expected = [moved(x, lengths, path, accepted, lengths) for x in (*keys, *values)]
    torch.compile(rk.compact_kv_, fullgraph=True, backend="aot_eager")(
        keys, values, lengths, path, accepted
    )
    assert_same_bits([*keys, *values], expected)


def test_follows_a_verified_step():
    """The cache of the accepted tokens is that of a run that never drafted."""
    tree = rk.DraftTree([-1, 0, 0, 1, 2, 4])
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5]])
    logits = torch.zeros(1, 6, 8)
    for node, token in ((0, 2), (2, 4), (4, 5), (5, 6)):
        logits[0, node, token] = 9
    out = rk.verify_tree(
        logits, rk.Draft(tokens, torch.ones(1, 6, dtype=torch.bool)), tree, temperature=0, seed=0,
        position=0,
    )  # fmt: skip
    assert out.tokens.tolist() == [[2, 4, 5, 6]]
    key = torch.arange(10.0).view(1, 1, 10, 1)
    rk.compact_kv_(key, key.clone(), torch.tensor([3]), out.path, out.length)
    assert key.flatten()[:7].tolist() == [0, 1, 2, 3, 5, 7, 8]


GOOD = {
    "key": lambda: torch.zeros(2, 1, 8, 2), "value": lambda: torch.zeros(2, 1, 8, 2),
    "lengths": lambda: torch.tensor([0, 1]), "path": lambda: torch.tensor([[0, 1], [0, -1]]),
    "accepted": lambda: torch.tensor([2, 1]),
}  # fmt: skip
ONE, FP8 = torch.zeros(2, 1, 8, 4), torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 8, 2)}, r"^key: expected shape \(B, H, S, D\)"),
        ({"value": torch.zeros(2, 1, 7, 2)}, "^value: expected shape"),
        ({"value": torch.zeros(2, 1, 8, 2).half()}, "^value: expected dtype"),
        ({"value": torch.zeros(2, 1, 8, 2).to(FP8)}, "^value: expected dtype torch.float32, that"),
        ({"key": torch.zeros(2, 1, 8, 2).to(FP8)}, "^value: expected dtype torch.float8"),
        ({"key": ONE, "value": ONE}, "^value: expected memory of its own"),
        ({"key": ONE, "value": ONE[..., 1:]}, "^value: expected memory of its own"),
        ({"key": ONE[..., 3:], "value": ONE}, "^value: expected memory of its own"),
        ({"key": ONE.to(FP8), "value": ONE.to(FP8)[..., ::2]}, "^value: expected the last dim"),
        ({"lengths": torch.tensor([0])}, "^path: expected shape"),
        ({"lengths": torch.tensor([0, 1]).int()}, "^lengths: expected dtype"),
        ({"path": torch.tensor([[0, 9], [0, -1]])}, r"^path: expected values in \[0, 8\)"),
        ({"path": torch.tensor([[1, 0], [0, -1]])}, "^path: expected ascending"),
        ({"accepted": torch.tensor([3, 1])}, "^accepted: expected values"),
        ({"start": torch.tensor([0, 0])}, "^start: expected slots >= lengths"),
        ({"lengths": torch.tensor([0, -1]), "start": torch.tensor([0, 1])}, "^lengths: .*got -1"),
        ({"start": torch.tensor([7, 7])}, r"^start \+ path: expected values"),
        ({"block_table": torch.zeros(3, 1).long()}, "^block_table: expected shape"),
        ({"block_table": torch.tensor([[0, 1], [5, 5]])}, "^block_table: expected values"),
    ],
)  # fmt: skip
def test_errors(change, message):
    args = {name: make() for name, make in GOOD.items()} | change
    start, table = args.pop("start", None), args.pop("block_table", None)
    with pytest.raises(ValueError, match=message):
        rk.compact_kv_(*args.values(), start=start, block_table=table)


def test_rows_that_move_nothing_may_name_any_slot():
    """Padding of a batch of fixed size, whose position is 0 and whose lengths are so -1."""
    args = {name: make() for name, make in GOOD.items()} | {"key": torch.rand(2, 1, 8, 2)}
    before = args["key"].clone()
    args |= {"lengths": torch.tensor([0, -1]), "accepted": torch.tensor([2, 0])}
    for start in (None, torch.tensor([0, -5])):
        rk.compact_kv_(*args.values(), start=start)
        assert torch.equal(args["key"], before)


def layer(*shape: int) -> Tensor:
    return torch.zeros(*shape or (2, 1, 8, 2))


OTHER, FIRST = layer(2, 1, 9, 2), layer()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (layer(2, 8, 2), layer(), r"^key\[1\]: expected shape \(B, H, S, D"),
        (None, layer(), r"^key\[1\]: expected a tensor, got NoneType"),
        (layer(), 3, r"^value\[1\]: expected a tensor, got int"),
        (layer(), layer(2, 1, 7, 2), r"^value\[1\]: expected shape that of key\[1\]"),
        (layer().half(), layer(), r"^value\[1\]: expected dtype torch.float16"),
        (layer(3, 1, 8, 2), layer(3, 1, 8, 2), r"^key\[1\]: expected the B and S of key\[0\]"),
        (OTHER, OTHER.clone(), r"^key\[1\]: expected the B and S of key\[0\]"),
        (layer().to_sparse(), layer(), r"^key\[1\]: expected a dense tensor"),
        (layer(2, 1, 8, 4)[..., ::2], layer(), r"^key\[1\]: expected the last dimension"),
        (layer().to("meta"), layer().to("meta"), r"^key\[1\]: expected the device of key\[0\]"),
        (OTHER[:, :, 1:], OTHER[:, :, 1:], r"^value\[1\]: expected memory .*that of key\[1\]"),
        (FIRST, layer(), r"^key\[1\]: expected memory of its own, got that of key\[0\]"),
    ],
)
def test_errors_of_a_layer(key, value, message):
    """Nothing is moved before all layers are checked."""
    rest = [GOOD[name]() for name in ("lengths", "path", "accepted")]
    with pytest.raises(ValueError, match=message):
        rk.compact_kv_([FIRST, key], [layer(), value], *rest)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ([], [], r"^value: expected a list of 0 tensors, one for each of key \(>= 1\), got 0"),
        ([FIRST], layer(), "^value: expected a list of 1 tensors.*, got Tensor"),
        ([FIRST, layer()], [layer()], "^value: expected a list of 2 tensors.*, got 1"),
        (FIRST, [layer()], "^value: expected a tensor, got list"),
    ],
)
def test_errors_of_lists(key, value, message):
    rest = [GOOD[name]() for name in ("lengths", "path", "accepted")]
    with pytest.raises(ValueError, match=message):
        rk.compact_kv_(key, value, *rest)


def test_layers_have_pages_of_one_size():
    one, keys = torch.ones(2, dtype=torch.int64), [layer(4, 8, 2, 2), layer(4, 4, 2, 2)]
    values = [k.clone() for k in keys]
    with pytest.raises(
        ValueError, match=r"^key\[1\]: expected the blocks and block_size of key\[0"
    ):
        rk.compact_kv_(keys, values, one, 0 * one[:, None], one, block_table=one[:, None])
