"""The head of our GRPOTrainer against the logits of the model that it is added to."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

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


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_models_logits(
    family: str, ours: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.16 itself leaves out a cap that a configuration does not call as Gemma's does."""
    transformers = importlib.import_module("transformers")
    plain, fields = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    g = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(2, 14, (2, 8), generator=g)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    head = importlib.import_module("reasonkern.integrations._trl_head")
    paths: list[bool] = []
    score = head._score_hidden
    monkeypatch.setattr(head, "_score_hidden", lambda *a: (paths.append(True), score(*a))[1])
    with torch.no_grad():
        logp = (model(**inputs).logits[:, -6:-1].double() / 0.8).log_softmax(-1)
        ours.add_head(model, 0.8)
        labels = inputs["input_ids"]
        out = model(**inputs, labels=labels, fused_lm_head=True, tokens=5)
    assert_close(
        out.log_probs.double(), logp.gather(-1, labels[:, -5:, None])[..., 0], rtol=0, atol=1e-5
    )
    assert_close(out.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)
    assert bool(paths) == plain
