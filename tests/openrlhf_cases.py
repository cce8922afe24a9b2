"""Inputs of the tests against OpenRLHF: a model, arguments, an experience, its trainer."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LENGTHS = (9, 6, 4)  # of prompt and answer
PROMPTS = (3, 2, 1)
A = max(LENGTHS) - 1  # OpenRLHF's actions are all tokens but the first


class Lm(torch.nn.Module):
    """Each token's logits depend on it and its position, so packing changes nothing."""

    V, D = 29, 8

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.token, self.place, self.head = (
            torch.nn.Parameter(scale * torch.randn(n, self.D, generator=g).to(dtype))
            for n, scale in ((self.V, 1.0), (max(LENGTHS), 0.5), (self.V, 1.0))
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any
    ) -> Any:
        hidden = self.token[input_ids] + self.place[position_ids]
        outputs = importlib.import_module("transformers.modeling_outputs")
        return outputs.CausalLMOutputWithPast(logits=hidden @ self.head.T)


def make_actor(
    models: ModuleType,
    temperature: float = 1.0,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    actor = models.Actor(Lm(dtype), temperature=temperature)
    actor.packing_samples = packed
    return actor


def padded() -> dict[str, Tensor]:
    """Padded on the right; a token within the first answer that is a tool's."""
    place = torch.arange(max(LENGTHS))
    attention = (place < torch.tensor(LENGTHS)[:, None]).long()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, Lm.V, attention.shape, generator=g) * attention
    actions = (place >= torch.tensor(PROMPTS)[:, None]) & (attention != 0)
    actions[0, 5] = False
    return {"sequences": ids, "attention_mask": attention, "action_mask": actions[:, 1:]}


DEFAULTS: dict[str, Any] = {
    "train.max_epochs": 1, "train.dynamic_batch_enable": False, "train.colocate_all": True,
    "train.async_enable": False, "train.micro_batch_size": 3, "train.enable_ema": False,
    "train.ema_beta": 0.99, "rollout.temperature": 0.8, "vllm.sync_backend": "gloo",
    "ckpt.save_hf": False, "ckpt.disable_ds": True, "ckpt.path": "", "ckpt.load_enable": False,
    "data.disable_fast_tokenizer": False, "ref.offload": False,
    "ds.packing_samples": False, "ds.tensor_parallel_size": 1, "ds.attn_implementation": "eager",
    "ds.experts_implementation": None, "ds.param_dtype": "bf16", "ds.load_in_4bit": False,
    "ds.lora.rank": 0, "ds.lora.alpha": 1, "ds.lora.target_modules": None, "ds.lora.dropout": 0,
    "ds.use_liger_kernel": False, "ds.enable_sleep": False,
    "actor.eps_clip": 0.2, "actor.eps_clip_low_high": (0.2, 0.2), "actor.dual_clip": None,
    "actor.loss_agg_mode": "token-mean", "actor.policy_loss_type": "ppo",
    "actor.aux_loss_coef": 0.0, "actor.entropy_coef": None, "actor.optim": "adam",
    "actor.muon.lr": 0.0, "actor.adam.lr": 0.0, "actor.lr_scheduler": "constant",
    "actor.lr_warmup_ratio": 0.0, "actor.min_lr_ratio": 0.0, "actor.max_norm": 1.0,
    "actor.gradient_checkpointing_enable": False,
    "algo.advantage.estimator": "gae",
    "algo.advantage.is_correction_level": "off", "algo.advantage.is_correction_mode": "mask",
    "algo.advantage.is_correction_gating": "ratio",
    "algo.advantage.is_correction_threshold": [0.5, 5.0],
    "algo.kl.use_loss": False, "algo.kl.init_coef": 0.3, "algo.kl.estimator": "k2",
    "algo.kl.unbiased_gradient": False,
}  # fmt: skip


def make_args(given: dict[str, Any]) -> Any:
    """OpenRLHF's arguments, as its command line nests them."""
    config = importlib.import_module("openrlhf.utils.config")
    assert given.keys() <= DEFAULTS.keys()
    return config.hierarchize(SimpleNamespace(**(DEFAULTS | given)))


class Strategy:
    """DeepSpeed's part of a step on one process."""

    ring_attn_group = None

    def __init__(self, args: Any) -> None:
        self.args = args

    def setup_distributed(self) -> None: ...

    def print(self, *_: Any) -> None: ...

    def get_ds_train_config(self) -> None: ...

    def get_ds_eval_config(self, offload: bool) -> None: ...

    def prepare(self, given: Any) -> Any:
        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        return (given[0], None, scheduler) if isinstance(given, tuple) else given

    def backward(self, loss: Tensor, *_: Any) -> None:
        loss.backward()

    def optimizer_step(self, *_: Any, **__: Any) -> None: ...

    def get_grad_norm(self, actor: Any) -> float:
        return 0.0


def make_trainer(workers: ModuleType, actor: Any, args: Any) -> Any:
    """OpenRLHF's trainer of one actor."""
    strategy = Strategy(args)
    return workers.ActorPPOTrainer(
        strategy, actor, None, None, strategy.prepare((actor, {}))[2], tokenizer=None
    )


def make_experience() -> Any:
    """Old, reference and rollout log-probabilities near those of the model."""
    experience = importlib.import_module("openrlhf.trainer.ppo_utils.experience")
    batch = padded()
    mask = batch["action_mask"]
    g = torch.Generator().manual_seed(2)
    ids = batch["sequences"]
    with torch.no_grad():
        logits = Lm(torch.float32)(ids, position_ids=torch.arange(max(LENGTHS))).logits
    logp = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    def near(scale: float) -> Tensor:
        return (logp + scale * torch.randn(mask.shape, generator=g)) * mask

    advantages = torch.tensor([1.3, -0.7, 0.9])[:, None].expand(mask.shape)
    return experience.Experience(
        **batch, action_log_probs=near(0.3), base_action_log_probs=near(0.3),
        rollout_log_probs=near(0.3), advantages=advantages, info={},
    )  # fmt: skip


def make_worker(kind: Any, folder: str, args: Any) -> Any:
    """As Ray starts one of OpenRLHF's workers, of a class that is not remote."""
    worker = object.__new__(kind)
    worker.init_model_from_pretrained(Strategy(args), folder)
    return worker
