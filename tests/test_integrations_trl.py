"""Our GRPOTrainer against TRL 1.16's on the same model and batch."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from trl_cases import (
    COMPLETION,
    LENGTHS,
    add_logprobs,
    assert_as_accurate,
    assert_same_gradients,
    loss_and_gradients,
    make_batch,
)
from trl_fixtures import Make

import reasonkern as rk
from reasonkern import Objective

pytest_plugins = ("trl_fixtures",)
pytestmark = pytest.mark.peers

CONFIGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo-kl": {"loss_type": "grpo", "beta": 0.1},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo-two-sided": {"loss_type": "dapo", "delta": 1.5},
    "dapo-unbiased-kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    "opsm": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.05},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "top-entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.45, "beta": 0.1},
    "top-entropy-bonus": {
        "loss_type": "grpo", "top_entropy_quantile": 0.45, "entropy_coef": 0.05,
    },
    "accumulation": {
        "loss_type": "dapo", "gradient_accumulation_steps": 4, "steps_per_generation": 8,
        "entropy_coef": 0.05,
    },
    "accumulation-grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 4},
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["hidden", "logits"])
def logits(request: pytest.FixtureRequest) -> bool:
    """Both heads: from hidden states, and on the model's logits."""
    return request.param


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, logits: bool, trl: ModuleType, ours: ModuleType, make: Make
) -> tuple[Any, Any]:
    """(our trainer, TRL's) with the same model and configuration."""
    options = getattr(request, "param", {"loss_type": "grpo"})
    mine = make(ours.GRPOTrainer, logits=logits, **options)
    return mine, make(trl.GRPOTrainer, **options)


@pytest.mark.parametrize("pair", CONFIGS.values(), ids=CONFIGS, indirect=True)
def test_loss_gradients_and_metrics_equal_trls(pair: tuple[Any, Any]) -> None:
    mine, theirs = pair
    batch = add_logprobs(theirs, make_batch())
    mask, nan = batch["completion_mask"] != 0, float("nan")
    dirty = {k: torch.where(mask, x, nan) for k, x in batch.items() if k.endswith("_logps")}
    found, expected = loss_and_gradients(mine, batch | dirty), loss_and_gradients(theirs, batch)
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert_same_gradients(found[1], expected[1])
    logged, theirs_logged = (t._metrics["train"] for t in pair)
    assert logged.keys() == theirs_logged.keys()
    for name, values in theirs_logged.items():
        assert logged[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name
    clipped = [v for k, v in theirs_logged.items() if k.endswith(("region_mean", "clip_ratio"))]
    assert not clipped or clipped[0][0] > 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_the_name_of_a_loss_type_means_that_loss(
    loss_type: str, trl: ModuleType, ours: ModuleType, make: Make
) -> None:
    """objective="bnpo" is GRPOConfig(loss_type="bnpo"), on-policy and in eval mode too."""
    other = {
        "cispo": {"epsilon_high": 5.0}, "grpo": {"off_policy_mask_threshold": 0.1},
        "bnpo": {"gradient_accumulation_steps": 2},
    }  # fmt: skip
    options = other.get(loss_type, {})
    mine = make(ours.GRPOTrainer, objective=loss_type, **{"loss_type": "dapo"} | options)
    theirs = make(trl.GRPOTrainer, loss_type=loss_type, **options)
    found, expected = (loss_and_gradients(t, make_batch()) for t in (mine, theirs))
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(found[1], expected[1])
    with torch.no_grad():
        losses = [t.compute_loss(t.model.eval(), make_batch()) for t in (mine, theirs)]
    assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert mine._metrics["eval"].keys() == theirs._metrics["eval"].keys()


def test_old_and_reference_logprobs_equal_trls(pair: tuple[Any, Any], logits: bool) -> None:
    batch = make_batch()
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        mine, theirs = (
            t._get_per_token_logps_and_entropies(
                t.model, ids, mask, COMPLETION, batch_size=4, compute_entropy=True
            )
            for t in pair
        )
    assert mine[0].shape == (len(LENGTHS), COMPLETION)
    assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-5)
    # The same statistics in both passes: the first update has ratio 1.
    trainer = pair[0]
    trainer.compute_loss(trainer.model, batch | {"old_per_token_logps": mine[0]})
    values = trainer._row_metrics["train"].compute()
    # (Rows that a pass leaves out of the matrix products move their last bits.)
    tolerance = 0 if logits else 1e-5
    assert 1 - tolerance <= values["ratio_min"] <= values["ratio_max"] <= 1 + tolerance


VLLM = {
    "token_truncate": (None, 1.2),
    "token_mask": (0.8, 1.2),
    "sequence_truncate": (0.8, 1.2),
    "sequence_mask": (None, 1.2),
}


@pytest.mark.parametrize("mode", VLLM)
def test_importance_correction_equals_trls(
    mode: str, trl: ModuleType, ours: ModuleType, make: Make
) -> None:
    """TRL's correction of vLLM's log-probabilities, without vLLM; one token has none."""
    low, high = VLLM[mode]
    options = {
        "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high, "loss_type": "grpo", "beta": 0.1,
    }  # fmt: skip
    kinds = (ours.GRPOTrainer, trl.GRPOTrainer)
    mine, theirs = (make(k, **options) for k in kinds)
    batch = add_logprobs(theirs, make_batch())
    batch["sampling_per_token_logps"][0, 2] = float("nan")
    difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    difference = (difference * batch["completion_mask"]).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(low, high)
    else:
        ratio = ratio.masked_fill((ratio < (low or 0)) | (ratio > high), 0.0)
    mine.args.use_vllm = mine.use_vllm = theirs.use_vllm = True
    mine.objective = mine._trls(None)
    batch["importance_sampling_ratio"] = ratio
    found, expected = (loss_and_gradients(t, batch) for t in (mine, theirs))
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert_same_gradients(found[1], expected[1])


def test_tool_tokens_are_left_out(pair: tuple[Any, Any]) -> None:
    """A tool's token may have any old log-probability."""
    tool_mask = torch.ones(len(LENGTHS), COMPLETION, dtype=torch.long)
    tool_mask[0, 1:3] = 0
    batch = add_logprobs(pair[1], make_batch(tool_mask=tool_mask))
    far = torch.where(tool_mask == 0, -200.0, batch["old_per_token_logps"])
    found, expected = (
        loss_and_gradients(t, batch | {"old_per_token_logps": old})
        for t, old in zip(pair, (far, batch["old_per_token_logps"]), strict=True)
    )
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert_same_gradients(found[1], expected[1])
    logged, theirs = (t._metrics["train"] for t in pair)
    assert logged["clip_ratio/region_mean"] == pytest.approx(theirs["clip_ratio/region_mean"])


def test_experts_balance_as_with_trl(trl: ModuleType, ours: ModuleType, make: Make) -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.MixtralConfig(
        vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    results = []
    for kind in (ours.GRPOTrainer, trl.GRPOTrainer):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
        options = {"model": model, "gradient_accumulation_steps": 2, "loss_type": "grpo"}
        trainer = make(kind, **options)
        results.append((*loss_and_gradients(trainer, make_batch()), trainer._metrics["train"]))
    (loss, mine, logged), (expected, theirs, theirs_logged) = results
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(mine, theirs)
    assert logged["aux_loss"] == pytest.approx(theirs_logged["aux_loss"], rel=1e-5)


SCALED = {
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16},
    "Granite": {"logits_scaling": 0.5},
    "Cohere": {"logit_scale": 0.5},
}


@pytest.mark.parametrize("family", SCALED)
def test_heads_that_scale_or_cap(
    family: str, logits: bool, trl: ModuleType, ours: ModuleType, make: Make
) -> None:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3, **SCALED[family],
    )  # fmt: skip
    results = []
    runs = (
        (ours.GRPOTrainer, torch.float32, {"logits": logits}),
        (trl.GRPOTrainer, torch.float32, {}),
        (trl.GRPOTrainer, torch.float64, {}),
    )
    for kind, dtype, head in runs:
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
        options = {"model": model, "loss_type": "grpo", "temperature": 0.8}
        trainer = make(kind, **options, **head)
        results.append(loss_and_gradients(trainer, make_batch()))
    (loss, mine), (expected, theirs), (_, truth) = results
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    if family == "Gemma2":  # eager attention with left padding is NaN in float64
        assert_same_gradients(mine, theirs)
    else:
        assert_as_accurate(mine, theirs, truth)


@pytest.mark.parametrize("logits", [True], indirect=True)
def test_models_that_cannot_narrow_their_logits(
    pair: tuple[Any, Any], logits: bool, ours: ModuleType, example: ModuleType
) -> None:
    """Without ``logits_to_keep`` the logits of the prompt are there too, with weight 0."""
    mine, theirs = pair
    batch = add_logprobs(theirs, make_batch())
    model = example.Qwen2ForCausalLM(mine.model.config)
    model.load_state_dict(mine.model.state_dict())
    plain = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    ours.add_head(model, logits=True)
    mine.model = model
    found, expected = (loss_and_gradients(t, batch) for t in pair)
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert_same_gradients(found[1], expected[1])


def test_what_becomes_of_the_logits(pair: tuple[Any, Any], logits: bool) -> None:
    """The gradient replaces them, or they are not computed by the model."""
    trainer = pair[0]
    seen: list[Tensor] = []
    trainer.model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    batch = add_logprobs(trainer, make_batch())
    loss = trainer.compute_loss(trainer.model, batch)
    assert bool(seen) == logits
    if logits:
        x = seen[-1]
        assert x.shape[1] == COMPLETION + 1
        # A softmax's gradient sums to 0; rows that are not trained are 0.
        assert x.abs().max() > 0 and x.sum(-1).abs().max() < 1e-6
        assert not x[:, -1].any() and not x[3].any()
    loss.backward()


def test_adaptive_entropy_follows_trls_controller(
    trl: ModuleType, ours: ModuleType, make: Make
) -> None:
    options = {"use_adaptive_entropy": True, "entropy_target": 5.0, "loss_type": "grpo"}
    kinds = (ours.GRPOTrainer, trl.GRPOTrainer)
    pair = [make(kind, **options) for kind in kinds]
    for _ in range(3):
        found, expected = (loss_and_gradients(t, make_batch()) for t in pair)
        assert_same_gradients(found[1], expected[1])
        assert pair[0].entropy_coef == pair[1].entropy_coef
    assert pair[0].entropy_coef > 0
    assert pair[0]._metrics["train"]["policy_loss"] == pytest.approx(
        pair[1]._metrics["train"]["policy_loss"], abs=1e-6
    )


def test_an_objective_of_its_own(ours: ModuleType, make: Make) -> None:
    """Its value, TRL's clip metrics at its bounds, and its policy loss without the bonus."""
    objective = Objective.ppo(0.9, 1.05)
    common = {"loss_type": "grpo", "entropy_coef": 0.05, "gradient_accumulation_steps": 2}
    own = make(ours.GRPOTrainer, objective=objective, **common)
    native = make(ours.GRPOTrainer, epsilon=0.1, epsilon_high=0.05, **common)
    batch = add_logprobs(own, make_batch())
    found, expected = (loss_and_gradients(t, batch) for t in (own, native))
    assert_close(found[0], expected[0])
    assert_same_gradients(found[1], expected[1])
    assert own._metrics["train"].keys() == native._metrics["train"].keys()
    for name, values in native._metrics["train"].items():
        assert own._metrics["train"][name] == pytest.approx(values, rel=1e-5, nan_ok=True), name


def test_bapo_balances_the_bounds_of_each_batch(ours: ModuleType, make: Make) -> None:
    bapo, ppo = (
        make(ours.GRPOTrainer, objective=objective, num_iterations=2, loss_type="grpo")
        for objective in ("bapo", Objective.ppo())
    )
    batch = add_logprobs(bapo, make_batch())
    found = loss_and_gradients(bapo, batch)
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        logp = bapo._get_per_token_logps_and_entropies(bapo.model, ids, mask, COMPLETION)[0]
    bounds = rk.bapo_bounds(
        (logp - batch["old_per_token_logps"]).exp(), batch["advantages"][:, None].expand_as(logp),
        batch["completion_mask"], variant="paper",
        rollout_logprob=batch["sampling_per_token_logps"],
    )  # fmt: skip
    ppo.objective = Objective.ppo(*bounds)
    expected = loss_and_gradients(ppo, batch)
    assert_close(found[0], expected[0])
    assert_same_gradients(found[1], expected[1])


def test_clip_cov_draws_anew_in_each_step(ours: ModuleType, make: Make) -> None:
    objective = Objective.clip_cov(fraction=0.2, low=-10, high=10)
    trainer = make(ours.GRPOTrainer, objective=objective, num_iterations=2, loss_type="grpo")
    batch = add_logprobs(trainer, make_batch())
    losses = set()
    for step in (0, 1, 2, 3, 0, 1, 2, 3):
        trainer._step = step
        losses.add(loss_and_gradients(trainer, batch)[0].item())
    assert 1 < len(losses) <= 4


def test_gtpo_weighs_conflicting_tokens_of_a_prompt(ours: ModuleType, make: Make) -> None:
    """The factors of the generated groups follow their rows through TRL's shuffling."""
    trainer = make(
        ours.GRPOTrainer, objective="gtpo", scale_rewards="none", per_device_train_batch_size=32,
        num_generations=8, gradient_accumulation_steps=2, logging_steps=1,
    )  # fmt: skip
    seen = []
    original = trainer._compute_loss

    def compute(model: Any, inputs: dict[str, Any]) -> Tensor:
        seen.append(inputs)
        return original(model, inputs)

    trainer._compute_loss = compute
    trainer.train()
    assert len(seen) == 2 and seen[0]["advantages"].shape == (32,)
    whole = {k: torch.cat([part[k] for part in seen]) for k in seen[0] if seen[0][k].ndim}
    # Rows of one prompt, in any order.
    group = whole["prompt_ids"].unique(dim=0, return_inverse=True)[1]
    expected = rk.conflict_token_weights(
        whole["completion_ids"], whole["advantages"], group, whole["completion_mask"]
    )
    assert torch.equal(whole["conflict_weights"], expected)
    assert (expected > 1).any() and (expected == 0).any()
    # The model has a mean entropy above ln 2: as published, GTPO drops every completion.
    assert trainer.state.log_history[0]["reasonkern/dropped_frac"] == 1
    trained = whole["completion_mask"].sum()
    assert trainer.state.log_history[0]["reasonkern/rows_active"] == trained
    trainer.objective = Objective.gtpo(initial_entropy=2.0)  # drops no completion
    original(trainer.model, seen[0])
    dropped = trainer._row_metrics["train"].compute()["dropped_frac"]
    mask = seen[0]["completion_mask"] != 0
    assert 0 < dropped == (seen[0]["conflict_weights"][mask] == 0).double().mean()


@pytest.mark.parametrize("objective", ["gspo", "gmpo", Objective.gtpo(initial_entropy=2.0)])
def test_a_mean_over_tokens_warns_where_the_source_has_one_over_sequences(
    objective: Any, ours: ModuleType, make: Make
) -> None:
    with pytest.warns(UserWarning, match=r"loss_type: expected 'grpo', .* got 'dapo'"):
        make(ours.GRPOTrainer, objective=objective, loss_type="dapo")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*loss_type")
        for decided in ("grpo", "dr_grpo"):
            make(ours.GRPOTrainer, objective=objective, loss_type=decided)
        make(ours.GRPOTrainer, objective="gppo", loss_type="dapo")


# ---- what is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"objective": "high_entropy", "top_entropy_quantile": 0.5},
        r"args\.top_entropy_quantile: expected 1\.0 with this objective",
    ),
    (
        {"objective": "gmpo", "top_entropy_quantile": 0.5, "loss_type": "grpo"},
        r"args\.top_entropy_quantile: expected 1\.0 with this objective",
    ),
    ({"loss_type": "vespo", "top_entropy_quantile": 0.5}, r"quantile: expected 1\.0 at the seq"),
    (
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
        r"args\.top_entropy_quantile: expected 1\.0 at the sequence level",
    ),
    ({"epsilon": 1.2}, r"args\.epsilon: expected a number in \[0, 1\], .* got 1\.2"),
    ({"epsilon_high": -0.1}, r"args\.epsilon_high: expected 0 or more, .* got -0\.1"),
    ({"delta": 1.5, "epsilon_high": 0.6}, r"args\.delta: expected more than 1\.6, the upper bound"),
    ({"objective": "bapo"}, r"args\.num_iterations: expected more updates than one .* for bapo"),
    (
        {"loss_type": "cispo"},
        r"args\.epsilon_high: expected CISPO's .*rk\.Objective\.cispo\(\)",
    ),
    ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ({"objective": "gppo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ({"beta": 0.1, "importance_sampling_level": "sequence"}, "use_bias_correction_kl: expected F"),
    ({"objective": "gppo", "loss_type": "cispo"}, r"args\.loss_type: expected grpo, bnpo"),
    ({"objective": "gppo", "epsilon": 0.1}, r"args\.epsilon: expected its default, 0\.2: the obj"),
    (
        {"objective": "tppo", "epsilon_high": 0.28},
        r"its own bounds, as in objective=rk\.Objective\.tppo\(ratio_min=0\.8, ratio_max=1\.28\)",
    ),
    (
        {"objective": Objective.ppo(), "delta": 4.0},
        r"its own bounds, as in objective=rk\.Objective\.ppo\(ratio_cap=4\)",
    ),
    ({"objective": "dro", "epsilon": 0.1}, r"the objective has its own bounds, got 0\.1"),
    ({"loss_type": "gpo"}, r"args\.loss_type: expected 'grpo' or .*, got 'gpo'"),
    ({"objective": "gpo"}, "objective: expected one of grpo, .*, luspo, .*, gtpo, got 'gpo'"),
    ({"objective": "custom"}, "objective: expected one of .*, gtpo, got 'custom'"),
    ({"objective": Objective.gppo}, r"objective: expected .*, Objective.gppo\(\), got its const"),
    ({"objective": 3}, r"objective: expected a name, an Objective \(.*\) or None, got int"),
    ({"objective": Objective.ppo(kl=("k1", 0.1))}, r"objective\.kl: expected .* args\.beta"),
    ({"objective": Objective.ppo(entropy_coef=0.1)}, r"objective\.entropy_coef: expected to come"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(options: dict[str, Any], message: str, ours: ModuleType, make: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make(ours.GRPOTrainer, **dict(options))


def test_a_changed_trl_is_an_import_error(
    trl: ModuleType, ours: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_fused_lm_head(model: Any, temperature: float) -> None: ...

    monkeypatch.setattr(trl, "add_fused_lm_head", add_fused_lm_head)
    monkeypatch.delitem(sys.modules, "reasonkern.integrations.trl")
    with pytest.raises(ImportError, match=r"does not fit trl 1\.16.*cast_lm_head_to_fp32, outputs"):
        importlib.import_module("reasonkern.integrations.trl")
