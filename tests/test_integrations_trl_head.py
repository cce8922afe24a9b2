"""The head of our GRPOTrainer: the logits it stands for, and what wrappers do to its arguments."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective

pytest_plugins = ("trl_fixtures",)
pytestmark = pytest.mark.peers

# Whether the head takes the hidden states, and the fields that do something to the logits.
FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "Llama": (True, {}),
    "NanoChat": (True, {"final_logit_softcapping": 1.0}),
    "RecurrentGemma": (
        False, {"logits_soft_cap": 1.0, "lru_width": 32, "block_types": ["attention"]},
    ),
    "HyperCLOVAX": (False, {"logits_scaling": 0.5}),
}  # fmt: skip


def make_model(family: str) -> Any:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3, **FAMILIES[family][1],
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def assert_scores_its_logits(model: Any) -> None:
    """Log-probabilities and entropies through the head are those of the model's logits."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 14, (2, 8), generator=g)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logp = (model(**inputs).logits[:, -6:-1].double() / 0.8).log_softmax(-1)
        out = model(**inputs, labels=ids, fused_lm_head=True, tokens=5)
    expected = logp.gather(-1, ids[:, -5:, None])[..., 0]
    assert_close(out.log_probs.double(), expected, rtol=0, atol=1e-5)
    assert_close(out.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_models_logits(
    family: str, ours: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.16 itself leaves out a cap that a configuration does not call as Gemma's does."""
    head = importlib.import_module("reasonkern.integrations._trl_head")
    paths: list[bool] = []
    score = head._score_hidden
    monkeypatch.setattr(head, "_score_hidden", lambda *a: (paths.append(True), score(*a))[1])
    model = make_model(family)
    ours.add_head(model, 0.8)
    assert_scores_its_logits(model)
    assert bool(paths) == FAMILIES[family][0]


class Adapted(torch.nn.Linear):
    """A linear layer with something beside its weight, as PEFT's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :14]


def test_a_head_that_was_adapted_after_patching(ours: ModuleType) -> None:
    """TRL patches the model before PEFT wraps its layers."""
    model = make_model("Llama")
    ours.add_head(model, 0.8)
    head = Adapted(32, 14, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert_scores_its_logits(model)


def test_fsdp_in_mixed_precision_rounds_no_log_probability(
    ours: ModuleType, tmp_path: Path
) -> None:
    """It casts what enters and leaves a module: a first update must still see ratios of 1."""
    dist = torch.distributed
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        model = make_model("Llama")
        ours.add_head(model)
        policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)
        mesh = dist.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
        ids = torch.randint(2, 14, (2, 8), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "labels": ids, "fused_lm_head": True, "tokens": 5}
        with torch.no_grad():
            old = model(**inputs).log_probs
        rows = ours.HeadRows(
            Objective.ppo(), torch.ones(2), torch.ones(2, 5), None, old, None, None
        )
        out = model(**inputs, rows=rows)
        out.loss.backward()
        found = out.statistics.metrics.compute()
    finally:
        dist.destroy_process_group()
    assert not torch.equal(old, old.bfloat16().float())
    assert found["rows_active"] == 10 and found["ratio_min"] == found["ratio_max"] == 1
    assert all(p.grad is not None for p in model.parameters())
