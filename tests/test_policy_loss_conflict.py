"""GTPO: `conflict_token_weights` and `entropy_filter` against loops over the definitions."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from conftest import Backend
from contract import run_contract
from torch import Tensor

import reasonkern as rk
from reasonkern.policy_loss import conflict

pytestmark = pytest.mark.usefixtures("poisoned_empty")
OP = torch.ops.reasonkern.conflict_runs


def literal_weights(
    tokens: Any, advantage: Any, group: Any, mask: Any, amplify: float, combine: str, norm: bool
) -> list[list[float]]:
    """Sets of (position, id) per group and sign, then one walk per completion and direction."""
    rows = []
    for ids, trained in zip(tokens, mask, strict=True):
        at = [t for t, used in enumerate(trained) if used]
        rows.append([(t, ids[t], trained[t]) for t in range(at[0], at[-1] + 1)] if at else [])
    out = [[1.0 if used else 0.0 for used in trained] for trained in mask]
    runs: list[list[set[int]]] = [[set(), set()] for _ in rows]
    for direction in range(2):
        ordered = [row if direction == 0 else row[::-1] for row in rows]
        seen: dict[Any, set[tuple[int, int]]] = {}
        for row, a, g in zip(ordered, advantage, group, strict=True):
            pairs = {(p, token) for p, (_, token, used) in enumerate(row) if used}
            seen.setdefault((g, a > 0, a < 0), set()).update(pairs)
        for i, (row, a, g) in enumerate(zip(ordered, advantage, group, strict=True)):
            if a == 0:
                continue
            both = seen.get((g, True, False), set()) & seen.get((g, False, True), set())
            for p, (column, token, used) in enumerate(row):
                if not used or (p, token) not in both:
                    break
                runs[i][direction].add(column)
    for i, a in enumerate(advantage):
        inside = amplify if a > 0 else 0.0
        count = max(1, len(runs[i][0] | runs[i][1])) if norm else 1
        for t, used in enumerate(mask[i]):
            factors = [inside if t in run else 1.0 for run in runs[i]]
            merged = factors[0] * factors[1] if combine == "product" else max(factors)
            out[i][t] = merged / count if used else 0.0
    return out


def completions(seed: int, rows: int = 9, width: int = 12) -> tuple[Tensor, ...]:
    """Few ids, common starts and ends, unequal lengths and groups, tool output in the middle."""
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    group = draw(3, rows) * 7 - 3
    advantage = (draw(3, rows) - 1).float() * (0.5 + torch.rand(rows, generator=g))
    shared = draw(3, 3, width)
    tokens, mask = draw(3, rows, width), torch.zeros(rows, width, dtype=torch.bool)
    for i in range(rows):
        length = int(draw(width + 1, 1))
        first = int(draw(3, 1)) if seed % 3 == 0 else 0  # a prompt before the completion
        stop = min(width, first + length)
        head, tail = (min(int(n), stop - first) for n in draw(6, 2)) if stop > first else (0, 0)
        common = shared[int(group[i] + 3) // 7]
        tokens[i, first : first + head] = common[:head]
        tokens[i, stop - tail : stop] = common[width - tail :]
        mask[i, first:stop] = True
        if seed % 2 and stop - first > 4:
            at = first + 1 + int(draw(stop - first - 2, 1))
            mask[i, at : at + 1] = False
    return tokens, advantage, group, mask


def runs_of(
    backend: Backend, tokens: Tensor, advantage: Tensor, group: Tensor, mask: Tensor
) -> Any:
    if backend.name in ("cuda", "cuda-sim"):
        pytest.skip("this operator has no CUDA C++ kernel; its CUDA key is Triton")
    members, spans = conflict._layout(group, mask)
    sign = advantage.sign().long()
    args = [backend.to(x) for x in (tokens, mask, sign, members, spans)]
    return backend("conflict_runs", *args).cpu()


@pytest.mark.parametrize("combine", ["product", "max"])
@pytest.mark.parametrize("norm", [False, True])
def test_weights_equal_the_definition(combine: str, norm: bool) -> None:
    seen: set[float] = set()
    for seed in range(200):
        batch = completions(seed)
        given = batch if seed % 2 else (x if x.is_floating_point() else x.int() for x in batch)
        found = rk.conflict_token_weights(
            *given, amplify=1.5, combine=combine, per_conflict_norm=norm
        )
        expected = literal_weights(*(x.tolist() for x in batch), 1.5, combine, norm)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)
        seen |= set(found.unique().tolist())
    if not norm:
        assert seen == {0.0, 1.0, 1.5} | ({2.25} if combine == "product" else set())


def test_runs_on_every_backend(backend: Backend) -> None:
    lengths = set()
    for seed in range(12 if backend.slow else 60):
        batch = completions(seed)
        found = runs_of(backend, *batch)
        tokens, advantage, group, mask = batch
        members, spans = conflict._layout(group, mask)
        expected = conflict.conflict_runs(tokens, mask, advantage.sign().long(), members, spans)
        assert found.dtype == torch.int64 and torch.equal(found, expected)
        lengths |= set(found.flatten().tolist())
    assert {0, 1, 2, 3} <= lengths


def test_long_runs_on_every_backend(backend: Backend) -> None:
    """Across several blocks of the Triton kernel; the run ends in the middle of one, or not."""
    width = 3 * 256 + 17
    tokens = torch.arange(width).expand(4, width).clone()
    tokens[1, 600] = -1
    advantage, group = torch.tensor([1.0, -1.0, 0.0, -1.0]), torch.tensor([5, 5, 5, 6])
    mask = torch.ones(4, width, dtype=torch.bool)
    after = width - 601
    expected = [[600, after], [600, after], [0, 0], [0, 0]]
    assert runs_of(backend, tokens, advantage, group, mask).tolist() == expected
    tokens[1, 600] = 600
    expected = [[width, width], [width, width], [0, 0], [0, 0]]
    assert runs_of(backend, tokens, advantage, group, mask).tolist() == expected


def test_edges() -> None:
    ones = torch.ones(3, 4)
    same = torch.tensor([[1, 2, 3, 4]]).expand(3, 4)
    groups = torch.zeros(3, dtype=torch.int64)

    def weights(advantage: list[float], mask: Tensor = ones, **options: Any) -> Tensor:
        return rk.conflict_token_weights(same, torch.tensor(advantage), groups, mask, **options)

    for sign in (1.0, -1.0, 0.0):  # all of one sign: no conflict
        assert torch.equal(weights([sign] * 3), ones)
    expected = torch.tensor([[4.0], [0.0], [1.0]]).expand(3, 4)
    assert torch.equal(weights([1.0, -1.0, 0.0]), expected)
    # A negative and a positive completion, but of different prompts.
    apart = rk.conflict_token_weights(
        same, torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0, 1, 1]), ones
    )
    assert torch.equal(apart, ones)
    # Tool output ends the run on both sides, in both completions.
    tool = ones.clone()
    tool[0, 1] = 0
    expected = torch.tensor([[2.0, 0, 2, 2], [0, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(weights([1.0, -1.0, 0.0], tool), expected)
    # The other completion is tokens of a tool only.
    empty = ones.clone()
    empty[1] = 0
    assert torch.equal(weights([1.0, -1.0, 0.0], empty), empty)
    for shape in ((0, 4), (3, 0)):
        rows = torch.zeros(shape)
        none = rk.conflict_token_weights(rows.long(), rows[:, :1].sum(1), groups[: shape[0]], rows)
        assert none.shape == shape


def test_no_completions_of_any_strides() -> None:
    tokens = torch.zeros(0, 5, dtype=torch.int64).mT.contiguous().mT
    none = torch.zeros(0)
    assert rk.conflict_token_weights(tokens, none, none.long(), tokens).shape == (0, 5)


def test_equal_ends_of_unequal_lengths() -> None:
    tokens = torch.tensor([[1, 9, 9, 5, 6], [1, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = rk.conflict_token_weights(
        tokens, torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), mask, per_conflict_norm=True
    )
    expected = torch.tensor([[2.0, 1, 1, 2, 2], [0, 0, 0, 0, 0]]) / 3
    torch.testing.assert_close(found, expected)


def samples() -> list[tuple[Tensor, ...]]:
    out = []
    for batch in (completions(3), completions(4), [x[:0] for x in completions(4)]):
        tokens, advantage, group, mask = batch
        out.append((tokens, mask, advantage.sign().long(), *conflict._layout(group, mask)))
    return out


def test_contract() -> None:
    run_contract(OP.default, samples())


def test_the_operator_refuses_what_would_read_out_of_bounds() -> None:
    tokens, mask, sign, members, spans = samples()[0]
    for at, value in ((1, len(members) + 1), (3, tokens.shape[1] + 1), (2, -1)):
        wrong = spans.clone()
        wrong[0, at] = value
        with pytest.raises(RuntimeError, match="spans: expected ranges"):
            OP(tokens, mask, sign, members, wrong)
    with pytest.raises(RuntimeError, match="members: expected rows below"):
        OP(tokens, mask, sign, members + 1, spans)


# ---- entropy filter


def test_entropy_filter_equals_the_definition() -> None:
    g = torch.Generator().manual_seed(0)
    entropy = 1.4 * torch.rand(50, 6, generator=g)
    mask = torch.rand(50, 6, generator=g) < 0.6
    mask[0] = False
    entropy[~mask] = float("nan")
    advantage = torch.randn(50, generator=g)
    kept = 0
    for initial, drops in ((None, True), (0.5, True), (0.7, False), (torch.tensor(0.7), False)):
        found = rk.entropy_filter(advantage, entropy, mask, initial_entropy=initial)
        for i in range(50):
            mean = entropy[i][mask[i]].double().mean().item() if mask[i].any() else 0.0
            inside = mean <= math.log(2) or not drops
            kept += inside
            expected = advantage[i].item() - 0.1 * mean if inside else 0.0
            assert found[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert 110 < kept < 190
    at_most = rk.entropy_filter(
        advantage[:1], torch.full((1, 2), 0.5), mask[1:2, :2], max_entropy=0.5
    )
    assert mask[1, :2].any() and at_most.item() == pytest.approx(advantage[0].item() - 0.05)
    # Two equal choices at every token: in float32 their entropy is a little more than ln 2.
    equal = rk.token_stats(torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64)).entropy
    assert equal.double().mean() > math.log(2)
    assert rk.entropy_filter(torch.ones(1), equal, torch.ones(1, 3), coef=0.0) == 1
    entropy.requires_grad_()  # as that of token_stats is
    assert not rk.entropy_filter(advantage.requires_grad_(), entropy, mask).requires_grad


ROWS = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "advantage": torch.ones(2),
        "group": torch.zeros(2, dtype=torch.int64), "mask": torch.ones(2, 3)}  # fmt: skip
FILTER = {"advantage": torch.ones(2), "entropy": torch.ones(2, 3), "mask": torch.ones(2, 3)}
ERRORS: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (rk.conflict_token_weights, ROWS, change, message)
    for change, message in (
        ({"tokens": [1]}, "tokens: expected a tensor, got list"),
        ({"tokens": torch.zeros(2, 3)}, "tokens: expected dtype torch.int64 or torch.int32, got "
         "torch.float32"),
        ({"tokens": ROWS["tokens"][0]}, "tokens: expected shape (B, T), got (3,)"),
        ({"group": ROWS["group"][:1]}, "group: expected shape (B,) = (2,), got (1,)"),
        ({"mask": torch.ones(2, 2)}, "mask: expected shape tokens.shape = (2, 3), got (2, 2)"),
        ({"mask": torch.ones(2, 3) / 2}, "mask: expected bool or 0/1 values, got 0.5 at (0, 0)"),
        ({"advantage": torch.ones(2) / 0}, "advantage: expected finite values in trained tokens, "
         "got inf at (0,)"),
        ({"amplify": -1.0}, "amplify: expected a finite number >= 0, got -1.0"),
        ({"combine": "sum"}, "combine: expected 'product' or 'max', got 'sum'"),
    )
] + [
    (rk.entropy_filter, FILTER, change, message)
    for change, message in (
        ({"entropy": torch.ones(3)}, "entropy: expected shape (B, T), got (3,)"),
        ({"advantage": torch.ones(2, 3)}, "advantage: expected shape (B,) = (2,), got (2, 3)"),
        ({"advantage": torch.ones(2).long()}, "advantage: expected floating point, got "
         "torch.int64"),
        ({"max_entropy": -1.0}, "max_entropy: expected a finite number >= 0, got -1.0"),
        ({"initial_entropy": torch.ones(1)}, "initial_entropy: expected a number or a 0-dim "
         "tensor, got shape (1,)"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "changes", "message"), ERRORS)
def test_errors(function: Any, given: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**(given | changes))
