"""Our GRPOTrainer against TRL 1.16's on the same model and batch, and real training runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent
LENGTHS = (5, 3, 1, 0, 4, 5)  # completions; the fourth is masked out, as a truncated one can be
PROMPT, COMPLETION = 4, 5


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl==1.16.0")


@pytest.fixture(scope="module")
def ours(trl: ModuleType) -> ModuleType:
    return importlib.import_module("reasonkern.integrations.trl")


@pytest.fixture(scope="module")
def example(ours: ModuleType) -> ModuleType:
    return importlib.import_module("examples.trl_grpo")


@pytest.fixture(scope="module")
def model_folder(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TRL loads the reference model from where the model came from."""
    folder = tmp_path_factory.mktemp("model")
    model = example.make_model(initializer_range=0.3)  # logits that are not all alike
    model.save_pretrained(folder)
    return folder


def make_batch(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What TRL's `_compute_loss` gets; log-probabilities near those of a random model."""
    g = torch.Generator().manual_seed(seed)
    rows = len(LENGTHS)
    completion_mask = (torch.arange(COMPLETION) < torch.tensor(LENGTHS)[:, None]).long()
    prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
    prompt_mask[1, :2] = 0  # padded on the left
    batch = {
        "prompt_ids": torch.randint(2, 14, (rows, PROMPT), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 14, (rows, COMPLETION), generator=g),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.3, -0.7, 0.9, 1.0, -1.1, 0.0]),
        "num_items_in_batch": torch.tensor(50),
    }
    return batch | changes


def add_logprobs(trainer: Any, batch: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Old log-probabilities up to e^+-0.5 from the model's own, reference ones as well."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)[0]
    g = torch.Generator().manual_seed(seed)
    noise = [scale * torch.randn(logp.shape, generator=g) for scale in (0.5, 0.3, 0.3)]
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    return batch | {name: logp + n for name, n in zip(names, noise, strict=True)}


def make_trainer(kind: Any, example: ModuleType, folder: Path, output: Path, **options: Any) -> Any:
    objective = {"objective": options.pop("objective")} if "objective" in options else {}
    options = {
        "per_device_train_batch_size": 6,
        "num_generations": 2,
        "num_iterations": 1,
    } | options
    model = options.pop("model", None) or example.Qwen2ForCausalLM.from_pretrained(folder)
    trainer = kind(
        model, example.reward, args=example.make_config(str(output), 1, **options),
        train_dataset=example.make_dataset(), processing_class=example.make_tokenizer(),
        **objective,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within fp32 rounding: 2e-6 of the largest element (a key bias's gradient is 0 but for it)."""
    assert mine.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 1e-2
    for name, expected in theirs.items():
        difference = (mine[name] - expected).abs().max().item()
        assert difference <= 2e-6 * largest, f"{name}: {difference} of {largest}"


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
    "accumulation": {
        "loss_type": "dapo", "gradient_accumulation_steps": 4, "steps_per_generation": 8,
        "entropy_coef": 0.05,
    },
    "accumulation-grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 4},
}  # fmt: skip


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, trl: ModuleType, ours: ModuleType, example: ModuleType,
    model_folder: Path, tmp_path: Path,
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """(our trainer, TRL's) with the same model and configuration."""
    options = getattr(request, "param", {"loss_type": "grpo"})
    kinds = (ours.GRPOTrainer, trl.GRPOTrainer)
    yield tuple(make_trainer(kind, example, model_folder, tmp_path, **options) for kind in kinds)  # type: ignore[misc]


@pytest.mark.parametrize("pair", CONFIGS.values(), ids=CONFIGS, indirect=True)
def test_loss_gradients_and_metrics_equal_trls(pair: tuple[Any, Any]) -> None:
    mine, theirs = pair
    batch = add_logprobs(theirs, make_batch())
    found, expected = (loss_and_gradients(t, batch) for t in pair)
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
    loss_type: str, trl: ModuleType, ours: ModuleType, example: ModuleType, model_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """objective="bnpo" is GRPOConfig(loss_type="bnpo"), on-policy and in eval mode too."""
    mine = make_trainer(
        ours.GRPOTrainer, example, model_folder, tmp_path, loss_type="dapo", objective=loss_type
    )
    theirs = make_trainer(trl.GRPOTrainer, example, model_folder, tmp_path, loss_type=loss_type)
    found, expected = (loss_and_gradients(t, make_batch()) for t in (mine, theirs))
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(found[1], expected[1])
    with torch.no_grad():
        losses = [t.compute_loss(t.model.eval(), make_batch()) for t in (mine, theirs)]
    assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert mine._metrics["eval"].keys() == theirs._metrics["eval"].keys()


def test_old_and_reference_logprobs_equal_trls(pair: tuple[Any, Any]) -> None:
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
    assert values["ratio_min"] == values["ratio_max"] == 1.0
