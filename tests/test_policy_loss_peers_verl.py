"""policy_loss against verl 0.9.1: equal losses, gradients, KL estimators and aggregation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from policy_loss_literal import Batch, gradient, spread, stats
from policy_loss_peers import EXACT, SINGLE, Row, data, ours, rows
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_weights

pytestmark = pytest.mark.peers


def bounds(low: float, high: float, c: float = 3.0) -> dict[str, float]:
    return {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": c}


VERL: list[Row] = [
    ("vanilla", {}, Objective.ppo(dual_clip=3.0), "token-mean"),
    ("vanilla", {"clip_ratio_c": 1.3}, Objective.ppo(dual_clip=1.3), "token-mean"),
    (
        "vanilla",
        {"clip_ratio_high": 0.28},
        Objective.dapo(dual_clip=3.0),
        "seq-mean-token-mean",
    ),
    (
        "gspo",
        bounds(3e-4, 4e-4),
        Objective.gspo(),
        "seq-mean-token-mean",
    ),
    ("sapo", {}, Objective.sapo(), "seq-mean-token-mean"),
    ("cispo", {}, Objective.cispo(1.2, 0.8), "token-mean"),
    ("geo_mean", bounds(0.4, 0.4), Objective.gmpo(), "seq-mean-token-mean"),
    ("gpg", {}, Objective.gpg(), "token-mean"),
    ("dppo_tv", bounds(0.02, 0.03, 20.0), Objective.dppo_tv(0.02, 0.03), "token-mean"),
    ("dppo_kl", bounds(1e-3, 2e-3, 20.0), Objective.dppo_kl(1e-3, 2e-3), "token-mean"),
    ("dro", {}, Objective.dro(0.1), "token-mean"),
]


@rows(VERL)
def test_verl_loss(
    loss_type: str, options: dict[str, Any], objective: Objective, mode: str
) -> None:
    core, config = verl(loss_type, **options)
    b = data(seed=1)
    x, y = b.leaf(), b.leaf()
    # verl leaves empty sequences out of its means, except in geo_mean, which counts them.
    out = ours(b, x, objective, mode, count_empty=loss_type == "geo_mean")
    logp, _ = stats(y, b.targets)
    loss, theirs = core.get_policy_loss_fn(loss_type)(
        old_log_prob=b.old_logprob, log_prob=logp, advantages=spread(b, b.advantage).contiguous(),
        response_mask=b.mask.double(), loss_agg_mode=mode, config=config,
    )  # fmt: skip
    assert_close(out.loss, loss, rtol=1e-6, atol=1e-9)
    assert_close(gradient(out.loss, x), gradient(loss, y), rtol=1e-6, atol=1e-8)
    if loss_type in ("vanilla", "gspo", "dppo_tv", "dppo_kl"):
        clipped = out.metrics.compute()["clip_frac"].item()
        assert clipped == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-5) and clipped > 0


def verl(name: str, **options: Any) -> tuple[Any, Any]:
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl==0.9.1")
    workers = pytest.importorskip("verl.workers.config")
    basic = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    policy = workers.PolicyLossConfig(dro_beta=0.1) if name == "dro" else workers.PolicyLossConfig()
    return core, workers.ActorConfig(policy_loss=policy, **basic, **options)


@pytest.mark.parametrize(
    ("theirs", "mine"), [("k1", "k1"), ("k2", "k2"), ("low_var_kl", "k3"), ("k3", "k3")]
)
def test_verl_kl_estimators(theirs: str, mine: Any) -> None:
    core, _ = verl("")
    b = data()
    x, y = b.leaf(), b.leaf()
    nothing = Objective.gpg(kl=(mine, 1.0))
    given = b.given("ref_logprob", advantage=torch.zeros(len(b.advantage)))
    out = policy_loss(x, b.targets, objective=nothing, **given)
    kl = core.kl_penalty(stats(y, b.targets)[0], b.ref_logprob, theirs)
    loss = (b.weight * kl).sum()
    assert_close(out.loss, loss, **EXACT)
    assert_close(gradient(out.loss, x), gradient(loss, y), **EXACT)


MODES: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "token-mean": lambda b: {},
    "seq-mean-token-mean": lambda b: {"count_empty": False},
    "seq-mean-token-sum": lambda b: {"count_empty": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_verl_aggregation(mode: str) -> None:
    core, _ = verl("")
    b = data()
    losses = torch.randn(b.mask.shape, generator=torch.Generator().manual_seed(0))
    expected = core.agg_loss(losses, b.mask.float(), mode)
    found = (token_weights(b.mask, mode, **MODES[mode](b)) * losses).sum()
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    options = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9}
    total = {"num_tokens": 50} if mode == "token-mean" else {"num_sequences": 9}
    mine: dict[str, Any] = {"data_parallel_size": 2, **total}
    expected = core.agg_loss(losses, b.mask.float(), mode, **options)
    assert_close((token_weights(b.mask, mode, **mine) * losses).sum(), expected, **SINGLE)
