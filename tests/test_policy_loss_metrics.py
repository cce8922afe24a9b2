"""`PolicyMetrics` against literal float64 loops and under merging."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import parallel_ranks
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_literal import Batch, batch, make_batch, spread, stats
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, Parallel, PolicyMetrics, policy_loss, rollout_mismatch

LOW, HIGH, DUAL, CAP = 0.8, 1.2, 1.6, 2.0
OBJECTIVE = Objective.ppo(LOW, HIGH, dual_clip=DUAL, ratio_cap=CAP)


def large_batch(seed: int = 0) -> Batch:
    """Several batches of sequences below each other, so that every region holds tokens."""
    parts = [make_batch(seed=seed + i) for i in range(6)]
    rows = {
        k: torch.cat([getattr(p, k) for p in parts])
        for k, v in vars(parts[0]).items()
        if v is not None
    }
    b = replace(parts[0], **rows)
    sign = 1 - 2 * (torch.arange(len(b.advantage)) % 3 == 0).double()
    return replace(b, advantage=b.advantage * sign)


def metrics(b: Batch, objective: Objective = OBJECTIVE, **given: Any) -> PolicyMetrics:
    given = b.given("ref_logprob", **given)
    return policy_loss(b.logits, b.targets, objective=objective, **given).metrics


def k(d: float) -> tuple[float, float, float]:
    return -d, d * d / 2, math.exp(d) - 1 - d


def literal(b: Batch, ratios: Tensor | None = None) -> dict[str, float]:
    """Every value by a loop over the trained rows; ``ratios`` replaces exp(logp - old)."""
    logp, entropy = stats(b.logits, b.targets)
    advantage = spread(b, b.advantage)
    r_all = (logp - b.old_logprob).exp() if ratios is None else ratios
    rows = [i for i, w in enumerate(b.weight.flatten().tolist()) if w != 0]
    columns = (logp, entropy, advantage, r_all, b.old_logprob, b.ref_logprob)
    table = [[c.flatten()[i].item() for c in columns] for i in rows]
    n = len(table)
    out: dict[str, float] = {"rows_active": n, "rows_skipped": b.weight.numel() - n}
    out["rows_nonfinite"] = 0

    def count(test: Any) -> float:
        return sum(test(a, r) for _, _, a, r, _, _ in table) / n

    out["clip_frac_pos_low"] = count(lambda a, r: a > 0 and r < LOW)
    out["clip_frac_pos_high"] = count(lambda a, r: a > 0 and r > HIGH)
    out["clip_frac_neg_low"] = count(lambda a, r: a < 0 and r < LOW)
    out["clip_frac_neg_high"] = count(lambda a, r: a < 0 and r > HIGH)
    out["clip_frac"] = out["clip_frac_pos_high"] + out["clip_frac_neg_low"]
    out["dual_clip_frac"] = count(lambda a, r: r > CAP or (a < 0 and r > DUAL))
    out["dropped_frac"] = 0
    r = [row[3] for row in table]
    out["ratio_mean"], out["ratio_min"], out["ratio_max"] = sum(r) / n, min(r), max(r)
    out["ratio_var"] = sum((x - out["ratio_mean"]) ** 2 for x in r) / n
    out["ess"] = sum(r) ** 2 / sum(x * x for x in r)
    out["ess_frac"] = out["ess"] / n
    for name, other in (("old", 4), ("ref", 5)):
        for i in range(3):
            out[f"kl_{name}_k{i + 1}"] = sum(k(row[other] - row[0])[i] for row in table) / n
    out["entropy"] = sum(row[1] for row in table) / n
    for name, sign in (("pos", 1), ("neg", -1)):
        h = [row[1] for row in table if row[2] * sign > 0]
        out[f"entropy_{name}"] = sum(h) / len(h)
        effective = [(min(x, HIGH) if a >= 0 else max(x, LOW)) * a for _, _, a, x, _, _ in table]
        out[f"contribution_{name}"] = sum(max(sign * v, 0) for v in effective)
    for name, used in (("cov_logp_adv", False), ("cov_logp_adv_unclipped", True)):
        x = [row[0] for row in table]
        y = [
            0.0 if used and ((a > 0 and r > HIGH) or (a < 0 and r < LOW)) else a
            for _, _, a, r, _, _ in table
        ]
        mx, my = sum(x) / n, sum(y) / n
        out[name] = sum((u - mx) * (v - my) for u, v in zip(x, y, strict=True)) / n
    return out


def compare(got: PolicyMetrics, expected: dict[str, float], **tolerance: float) -> None:
    values = got.compute()
    assert set(values) == set(expected)
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for name, value in values.items():
        assert value.shape == () and value.dtype == torch.float64
        want = torch.tensor(float(expected[name]), dtype=torch.float64)
        assert_close(value, want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_every_value_is_its_definition() -> None:
    b = large_batch()
    expected = literal(b)
    for region in ("pos_low", "pos_high", "neg_low", "neg_high"):
        assert expected[f"clip_frac_{region}"] > 0.03
    assert 0.03 < expected["dual_clip_frac"] < 0.5
    assert abs(expected["cov_logp_adv"] - expected["cov_logp_adv_unclipped"]) > 0.01
    compare(metrics(b), expected)


def test_values_in_float32() -> None:
    compare(metrics(large_batch().to(torch.float32)), literal(large_batch()), rtol=2e-5, atol=2e-6)


def test_packed_rows_have_the_same_values() -> None:
    b = make_batch()
    expected = metrics(b).compute()
    found = metrics(b.pack()).compute()
    del expected["rows_skipped"], found["rows_skipped"]  # packing removes the padding
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gspo_reports_the_sequence_ratio() -> None:
    b = large_batch()
    logp, _ = stats(b.logits, b.targets)
    log_r = torch.where(b.mask, logp - b.old_logprob, 0.0)
    s = (log_r.sum(-1) / b.mask.sum(-1).clamp_min(1)).exp()[:, None].expand(b.targets.shape)
    objective = Objective.gspo(LOW, HIGH, dual_clip=DUAL, ratio_cap=CAP)
    compare(metrics(b, objective), literal(b, s))


def test_gspo_reports_the_ratio_of_the_loss_beside_a_dropped_row() -> None:
    """A row without a reference takes part in the ratio of its sequence all the same."""
    b = large_batch()
    b.ref_logprob[0, 2] = math.nan
    without = b.weight.clone()
    without[0, 2] = 0
    logp, _ = stats(b.logits, b.targets)
    log_r = torch.where(b.mask, logp - b.old_logprob, 0.0)
    s = (log_r.sum(-1) / b.mask.sum(-1).clamp_min(1)).exp()[:, None].expand(b.targets.shape)
    objective = Objective.gspo(LOW, HIGH, dual_clip=DUAL, ratio_cap=CAP, kl=("k3", 0.1))
    expected = literal(replace(b, weight=without), s)
    expected |= {"rows_nonfinite": 1, "rows_skipped": expected["rows_skipped"] - 1}
    compare(metrics(b, objective), expected)


@pytest.mark.parametrize(
    "objective",
    [Objective.dppo_tv(0.02, 0.02), Objective.dppo_kl(0.001, 0.001)],
    ids=lambda o: o.name,
)
def test_dppo_reports_the_dropped_tokens_on_the_side_they_are_limited(objective: Objective) -> None:
    b = large_batch()
    out = policy_loss(b.logits, b.targets, objective=objective, **b.given())
    dropped = (out.token_loss == 0) & b.mask
    positive = spread(b, b.advantage) > 0
    n = b.mask.sum().double()
    values = out.metrics.compute()
    assert (dropped & positive).any() and (dropped & ~positive).any()
    assert_close(values["clip_frac"], dropped.sum() / n)
    assert_close(values["clip_frac_pos_high"], (dropped & positive).sum() / n)
    assert_close(values["clip_frac_neg_low"], (dropped & ~positive).sum() / n)
    assert values["clip_frac_pos_low"] == values["clip_frac_neg_high"] == 0


HALF = (torch.arange(large_batch().mask.numel()) % 2).double().view(large_batch().mask.shape)
DROPPING = {
    "selection": Objective.ppo(selection=HALF),
    "selection gspo": Objective.gspo(selection=HALF),
    "selection kl_cov": Objective.kl_cov(selection=HALF),
    "selection custom": Objective.custom(lambda logprob, *_: -logprob, selection=HALF),
    "importance": Objective.ppo(importance=("token", "mask", 0.6, 1.6)),
    "opsm": Objective.ppo(opsm=-0.1),
    "clip_cov": Objective.clip_cov(fraction=0.3, low=-9.0, high=9.0),
    "high_entropy": Objective.high_entropy(0.4),
    "gtpo": Objective.gtpo(max_entropy=1.4),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropped_tokens_are_counted(name: str) -> None:
    """Those without a policy term, whatever dropped them; without one left, all of them."""
    b = large_batch()
    given = b.given("rollout_logprob")
    out = policy_loss(b.logits, b.targets, objective=DROPPING[name], **given)
    dropped = ((out.token_loss == 0) & b.mask).sum() / b.mask.sum().double()
    assert 0.1 < dropped < 0.9
    assert_close(out.metrics.compute()["dropped_frac"], dropped)
    if name == "gtpo":
        none = replace(DROPPING[name], rule=replace(DROPPING[name].rule, max_entropy=0.0))
        metrics = policy_loss(b.logits, b.targets, objective=none, **given).metrics
        assert metrics.compute()["dropped_frac"] == 1


def test_objectives_without_a_ratio_clip_nothing() -> None:
    b = batch("padded")
    for objective in (Objective.reinforce(), Objective.gpg(), Objective.rloo()):
        out = policy_loss(b.logits, b.targets, objective=objective, **b.given())
        values = out.metrics.compute()
        assert values["ratio_max"] > 1.05 and values["ratio_min"] < 0.95
        assert all(value == 0 for name, value in values.items() if name.startswith("clip_frac"))
    bounded = policy_loss(
        b.logits, b.targets, objective=Objective.reinforce(0.95, 1.05), **b.given()
    )
    assert bounded.metrics.compute()["clip_frac"] > 0
    ppo = policy_loss(b.logits, b.targets, objective=Objective.ppo(1.0, 1.0), **b.given())
    assert ppo.metrics.compute()["clip_frac"] > 0


def test_without_reference_or_old_policy() -> None:
    b = make_batch()
    values = metrics(b, ref_logprob=None, old_logprob=None).compute()
    assert not any(name.startswith("kl_ref") for name in values)
    assert values["kl_old_k1"] == values["kl_old_k2"] == values["kl_old_k3"] == 0
    assert values["ratio_min"] == values["ratio_max"] == values["ess_frac"] == 1
    unused = metrics(b, ref_logprob=torch.full_like(b.logits[..., 0], float("nan"))).compute()
    assert unused["rows_nonfinite"] == 0 and unused["ratio_max"] > 1


def test_entropy_weight_alone_does_not_make_a_row_count() -> None:
    b = make_batch()
    more = torch.where(torch.arange(6) == 1, 1.0, b.entropy_weight)
    targets = b.targets.clamp_min(0)
    out = policy_loss(
        b.logits, targets, objective=Objective.ppo(entropy_coef=0.1),
        **b.given(entropy_weight=more),
    )  # fmt: skip
    assert out.metrics.compute()["rows_active"] == int(b.mask.sum())


def test_nonfinite_rows_are_counted_once_and_left_out() -> None:
    b = large_batch()
    logits = b.logits.clone()
    for sequence, position, value in ((0, 0, math.nan), (2, 0, math.inf), (2, 2, -math.inf)):
        logits[sequence, position] = value
    values = metrics(replace(b, logits=logits)).compute()
    assert values["rows_nonfinite"] == 3 and values["rows_active"] == int(b.mask.sum()) - 3
    without = b.weight.clone()
    without[0, 0] = without[2, 0] = without[2, 2] = 0
    expected = literal(replace(b, weight=without))
    expected |= {"rows_nonfinite": 3, "rows_skipped": expected["rows_skipped"] - 3}
    compare(metrics(replace(b, logits=logits)), expected)


# ---- merging


def part(b: Batch, rows: Tensor) -> PolicyMetrics:
    """Metrics of the batch with weight 0 outside `rows`, less what it then skips."""
    found = metrics(replace(b, weight=torch.where(rows, b.weight, 0.0)))
    outside = torch.zeros_like(found.flat)
    outside[1] = (~rows).sum()
    return replace(found, flat=found.flat - outside)


WHOLE = large_batch()
ROWS = WHOLE.targets.numel()


@settings(max_examples=30, deadline=None)
@given(owners=st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
def test_split_equals_whole(owners: list[int]) -> None:
    owner = torch.tensor(owners).view(WHOLE.targets.shape)
    merged = reduce(lambda a, b: a + b, (part(WHOLE, owner == i) for i in range(4)))
    assert_close(merged.compute(), metrics(WHOLE).compute(), rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(owners=st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS))
def test_merging_is_associative_and_commutative(owners: list[int]) -> None:
    owner = torch.tensor(owners).view(WHOLE.targets.shape)
    a, b, c = (part(WHOLE, owner == i) for i in range(3))
    for other in (a + (b + c), (c + b) + a, (a + c) + b):
        assert_close(((a + b) + c).compute(), other.compute(), rtol=1e-11, atol=1e-13)


def test_merging_with_an_all_masked_micro_batch_changes_nothing() -> None:
    nothing = part(WHOLE, torch.zeros_like(WHOLE.mask))
    assert all(torch.isfinite(v) for v in (nothing + nothing).compute().values())
    expected = metrics(WHOLE).compute()
    for merged in (metrics(WHOLE) + nothing, nothing + metrics(WHOLE)):
        for name, value in merged.compute().items():
            assert torch.equal(value, expected[name]), name


def test_moments_survive_a_large_offset() -> None:
    """Centred moments: log-probabilities near -700 do not wash out the covariance."""
    b = replace(WHOLE, logits=WHOLE.logits.clone())
    down = torch.nn.functional.one_hot(WHOLE.targets.clamp_min(0), b.logits.shape[-1])
    logits = b.logits - 700.0 * down
    shift = stats(logits, b.targets)[0] - stats(b.logits, b.targets)[0]
    b = replace(
        b, logits=logits, old_logprob=b.old_logprob + shift, ref_logprob=b.ref_logprob + shift
    )
    first = torch.arange(ROWS).view(b.targets.shape) % 2 == 0
    compare(part(b, first) + part(b, ~first), literal(b), rtol=1e-7, atol=1e-9)


def test_metrics_with_and_without_reference_do_not_merge() -> None:
    b = make_batch()
    with pytest.raises(ValueError, match="^metrics: expected ref_logprob in both or in neither"):
        metrics(b) + metrics(b, ref_logprob=None)
    with pytest.raises(TypeError):
        metrics(b) + 1
    with pytest.raises(TypeError):
        1 + metrics(b)


def test_metrics_of_micro_batches_add_up_by_sum() -> None:
    first, second = metrics(make_batch()), metrics(make_batch())
    added = (first + second).compute()
    assert_close(sum([first, second]).compute(), added, rtol=0, atol=0)  # type: ignore[union-attr]


def test_metrics_of_groups_are_pickled_without_them() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        given = metrics(make_batch(), parallel=Parallel(data_group=dist.group.WORLD))
        copy = pickle.loads(pickle.dumps(given))
        assert given.parallel and torch.equal(copy.sums, given.sums)
        with pytest.raises(ValueError, match="^group: expected a process group: pickling left"):
            (copy + copy).all_reduce()
        merged = copy.all_reduce(dist.group.WORLD)
        assert_close(merged.compute(), given.all_reduce().compute(), rtol=0, atol=0)
        for resumed in (copy + given, given + copy):  # whichever comes first has the groups
            assert resumed.parallel is given.parallel
            assert resumed.all_reduce().sums[0] == 2 * given.sums[0]
    finally:
        dist.destroy_process_group()


def test_metrics_load_from_a_checkpoint_by_default() -> None:
    mismatch = rollout_mismatch(*torch.randn(2, 3, 4), torch.ones(3, 4))
    for own in (metrics(make_batch()), mismatch):
        file = io.BytesIO()
        torch.save({"metrics": own}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["metrics"]
        assert_close(loaded.compute(), own.compute(), rtol=0, atol=0)


RANK = """
odd = torch.arange(m.ROWS).view(m.WHOLE.targets.shape) % 3 == 0
merged = m.part(m.WHOLE, odd if rank else ~odd).all_reduce()
torch.save(merged.compute(), f"{folder}/{rank}.pt")
"""


def test_all_reduce_over_two_processes(tmp_path: Path) -> None:
    parallel_ranks.run_script("import test_policy_loss_metrics as m", RANK, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, metrics(WHOLE).compute(), rtol=1e-10, atol=1e-12)
