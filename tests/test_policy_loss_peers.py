"""policy_loss against TRL 1.16 and Liger 0.8.5: equal losses, gradients and metrics.

Where a peer deviates, the test states by what.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_loss_literal import Batch, T, gradient, stats
from policy_loss_peers import COMMON, SINGLE, data, ours, rows
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_stats, token_weights

pytestmark = pytest.mark.peers


# ---- TRL: the trainer's loss function on a stand-in trainer


def trl_loss(b: Batch, x: Tensor, loss_type: str, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """GRPOTrainer._compute_loss and its metrics; options are the trainer's attributes."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl==1.16.0")
    utils = pytest.importorskip("trl.trainer.utils")
    arguments = {
        "use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    ratio = options.pop("importance_sampling_ratio", None)
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda t: t, reduce=lambda t, reduction: t
    )
    attributes = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "beta": 0.0, "loss_type": loss_type,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "model": SimpleNamespace(training=True), "current_gradient_accumulation_steps": 1,
        "accelerator": accelerator, "max_completion_length": T, "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": "entropy_coef" in options, "entropy_coef": 0.0,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "args": SimpleNamespace(
            **{name: options.pop(name, value) for name, value in arguments.items()}
        ),
        "get_gamma_weights": trainer.GRPOTrainer.get_gamma_weights,
        "get_off_policy_mask": trainer.GRPOTrainer.get_off_policy_mask,
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (
            utils.selective_log_softmax(x, b.targets), utils.entropy_from_logits(x), None,
        ),
    }  # fmt: skip
    stand_in = SimpleNamespace(**(attributes | options))
    inputs = {
        "prompt_ids": b.targets[:, :1], "prompt_mask": b.mask[:, :1], "completion_ids": b.targets,
        "completion_mask": b.mask.to(x.dtype), "advantages": b.advantage,
        "old_per_token_logps": b.old_logprob, "ref_per_token_logps": b.ref_logprob,
        "sampling_per_token_logps": b.rollout_logprob, "num_items_in_batch": b.mask.sum(),
        "importance_sampling_ratio": ratio,
    }  # fmt: skip
    loss = trainer.GRPOTrainer._compute_loss(stand_in, stand_in.model, inputs)
    return loss, {name: v[0] for name, v in stand_in._metrics["train"].items()}


TRL = [
    *COMMON,
    ("dr_grpo", {}, Objective.dr_grpo(), "constant"),
    ("dapo", {"off_policy_mask_threshold": 0.05}, Objective.ppo(opsm=0.05), "token-mean"),
    ("bnpo", {"entropy_coef": 0.1}, Objective.ppo(entropy_coef=0.1), "token-mean"),
]


@rows(TRL)
@pytest.mark.parametrize("seed", [0, 1])
def test_trl_loss(
    seed: int, loss_type: str, options: dict[str, Any], objective: Objective, mode: str
) -> None:
    b = data(seed=seed)
    x, y = b.leaf(), b.leaf()
    out = ours(b, x, objective, mode)
    loss, _ = trl_loss(b, y, loss_type, **options)
    # Our weights are float32.
    assert_close(out.loss, loss, rtol=3e-7, atol=1e-9)
    assert_close(gradient(out.loss, x), gradient(loss, y), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "lo", "hi", "objective"),
    [
        ("token_truncate", None, 1.2, ("token", "truncate", None, 1.2)),
        ("token_mask", 0.8, 1.2, ("token", "mask", 0.8, 1.2)),
        ("sequence_truncate", 0.8, 1.2, ("sequence", "truncate", 0.8, 1.2)),
        ("sequence_mask", None, 1.2, ("sequence", "mask", None, 1.2)),
    ],
)
def test_trl_importance_correction(
    mode: str, lo: float | None, hi: float, objective: tuple[Any, ...]
) -> None:
    """The ratio as the trainer forms it (grpo_trainer.py), through the trainer's loss."""
    b = data(seed=1)
    log_r = (b.old_logprob - b.rollout_logprob) * b.mask
    if mode.startswith("sequence"):
        log_r = log_r.sum(-1, keepdim=True)
    ratio = log_r.exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(lo, hi)
    else:
        ratio = ratio.masked_fill((ratio < (lo or 0)) | (ratio > hi), 0.0)
    x, y = b.leaf(), b.leaf()
    out = ours(b, x, Objective.ppo(importance=objective), "token-mean")
    loss, _ = trl_loss(b, y, "dapo", importance_sampling_ratio=ratio)
    assert_close(out.loss, loss, rtol=3e-7, atol=1e-9)
    assert_close(gradient(out.loss, x), gradient(loss, y), rtol=3e-7, atol=1e-9)


def test_trl_metrics() -> None:
    b = data(seed=1)
    # The trainer's means over sequences divide by the length, so every one gets a token.
    _, theirs = trl_loss(b, b.logits, "dapo", beta=0.1)
    values = ours(b, b.logits, Objective.ppo(kl=("k3", 0.1)), "token-mean").metrics.compute()
    same = {
        "kl": "kl_ref_k3",
        "entropy": "entropy",
        "clip_ratio/low_mean": "clip_frac_neg_low",
        "clip_ratio/high_mean": "clip_frac_pos_high",
        "clip_ratio/region_mean": "clip_frac",
    }
    for name, mine in same.items():
        assert theirs[name] > 0
        assert values[mine].item() == pytest.approx(theirs[name], rel=1e-6), name


def test_trl_corrects_the_kl_of_gspo_by_the_sequence_ratio() -> None:
    """Ours multiplies each token's KL by its own ratio: that is what makes it unbiased."""
    b = data()
    out = ours(b, b.logits, Objective.gspo(0.8, 1.2, kl=("k3", 0.1, True)), "seq-mean-token-mean")
    options = {"beta": 0.1, "use_bias_correction_kl": True}
    loss, _ = trl_loss(b, b.logits, "grpo", importance_sampling_level="sequence", **options)
    logp, _ = stats(b.logits, b.targets)
    log_r = (logp - b.old_logprob) * b.mask
    lengths = b.mask.sum(-1, keepdim=True).clamp_min(1)
    d = b.ref_logprob - logp
    between = (log_r.sum(-1, keepdim=True) / lengths).exp() - log_r.exp()
    difference = 0.1 * (between * (d.exp() - d - 1) * b.mask / lengths / len(lengths)).sum()
    assert abs(difference) > 1e-5
    assert_close(loss - out.loss, difference, rtol=1e-4, atol=1e-8)


def test_trl_overflows_where_the_advantage_is_zero() -> None:
    """exp of an unclamped log-ratio is inf, inf * 0 is NaN; here A = 0 gives 0."""
    b = data()
    b = Batch(**(vars(b) | {"old_logprob": b.old_logprob - 800, "advantage": 0 * b.advantage}))
    assert trl_loss(b, b.logits, "dapo")[0].isnan()
    assert ours(b, b.logits, Objective.dapo(), "token-mean").loss == 0


def test_trl_statistics() -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl==1.16.0")
    b = data(torch.float32)
    x, y = b.leaf(), b.leaf()
    found = token_stats(x, b.targets)
    logp, entropy = utils.selective_log_softmax(y, b.targets), utils.entropy_from_logits(y)
    assert_close(found.logprob, logp, **SINGLE)
    assert_close(found.entropy, entropy, **SINGLE)
    mine = gradient((found.logprob + 0.5 * found.entropy).sum(), x)
    assert_close(mine, gradient((logp + 0.5 * entropy).sum(), y), **SINGLE)
    warm = utils.selective_log_softmax(b.logits, b.targets, temperature=0.7)
    assert_close(token_stats(b.logits, b.targets, temperature=0.7).logprob, warm, **SINGLE)


def test_trl_entropy_is_nan_where_a_logit_is_minus_inf() -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl==1.16.0")
    x = torch.tensor([[0.0, 1.0, -float("inf")]])
    assert utils.entropy_from_logits(x).isnan()
    expected = utils.entropy_from_logits(x[:, :2])
    assert_close(token_stats(x, torch.tensor([0])).entropy, expected)


def hidden_states() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g)
    return hidden, torch.randn(33, 5, generator=g), torch.randint(33, (7,), generator=g)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (0.9, 3.0)])
def test_trl_chunked_logprob(temperature: float, softcap: float | None) -> None:
    kernels = pytest.importorskip("trl.kernels", reason="needs trl==1.16.0")
    hidden, weight, y = hidden_states()
    mine, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    outputs = ("entropy", "log_sum_sq_probs", "is_top1")
    found = token_stats(mine[0] @ mine[1].T, y, temperature=temperature, softcap=softcap)
    chunked = kernels.ChunkedLogProbFunction.apply(
        *theirs, None, y, temperature, 8, softcap, 1.0, outputs
    )
    logp, entropy, log_collision, _, top1 = chunked
    assert_close(found.logprob, logp, **SINGLE)
    assert_close(found.entropy, entropy, **SINGLE)
    assert_close(found.collision.log(), log_collision, **SINGLE)
    assert torch.equal(found.is_top1, top1.bool())
    ones = (found.logprob - 0.3 * found.entropy).sum(), (logp - 0.3 * entropy).sum()
    both = (torch.autograd.grad(o, t) for o, t in zip(ones, (mine, theirs), strict=True))
    assert_close(*both, **SINGLE)


# ---- Liger

LIGER = [
    *COMMON,
    ("dr_grpo", {"max_completion_length": T}, Objective.dr_grpo(), "constant"),
    ("dapo", {"temperature": 0.8}, Objective.ppo(), "token-mean"),
]


@rows(LIGER)
def test_liger_loss(
    loss_type: str, options: dict[str, Any], objective: Objective, mode: str
) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="needs liger-kernel==0.8.5")
    b = data(torch.float32)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*b.targets.shape, 5, generator=g)
    weight = torch.randn(b.logits.shape[-1], 5, generator=g)
    temperature = options.get("temperature", 1.0)
    shift = stats(hidden @ weight.T, b.targets, temperature)[0] - stats(b.logits, b.targets)[0]
    b = Batch(**(vars(b) | {n: getattr(b, n) + shift for n in ("old_logprob", "ref_logprob")}))
    mine, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    out = policy_loss(
        mine[0] @ mine[1].T, b.targets, objective=objective, temperature=temperature,
        **b.given("ref_logprob", weight=token_weights(b.mask, mode)),
    )  # fmt: skip
    loss_fn = liger.LigerFusedLinearGRPOLoss(
        compiled=False, loss_type=loss_type, use_ref_model="beta" in options,
        **({"beta": 0.0} | options),
    )  # fmt: skip
    loss, _ = loss_fn(
        *theirs, b.targets, b.mask.float(), b.advantage, ref_per_token_logps=b.ref_logprob,
        old_per_token_logps=b.old_logprob,
    )  # fmt: skip
    assert_close(out.loss, loss, **SINGLE)
    grads = (torch.autograd.grad(o, t) for o, t in ((out.loss, mine), (loss, theirs)))
    assert_close(*grads, **SINGLE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_liger_scaled_cross_entropy(temperature: float) -> None:
    """Negative log-likelihood and entropy with the entropy's gradient."""
    liger = pytest.importorskip(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="needs liger-kernel==0.8.5"
    )
    hidden, weight, y = hidden_states()
    mine, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    found = token_stats(mine[0] @ mine[1].T, y, temperature=temperature)
    nll, entropy = liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
        *theirs, y, temperature, -100, 1, return_entropy=True
    )
    assert_close(-found.logprob, nll.float(), **SINGLE)
    assert_close(found.entropy, entropy.float(), **SINGLE)
    ones = (found.logprob - 0.3 * found.entropy).sum(), (-nll - 0.3 * entropy).sum()
    both = (torch.autograd.grad(o, t) for o, t in zip(ones, (mine, theirs), strict=True))
    assert_close(*both, **SINGLE)
