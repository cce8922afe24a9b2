"""On-policy GRPO of a tiny model with TRL and reasonkern: on CPU, in a minute or two, offline.

A Qwen2 with 0.1 M random parameters learns to add: after "3 + 4 =" it has to write "7" and end the
text. A completion's reward is the share of that answer it gets right from its start.

    pip install "reasonkern[trl]"                   # once reasonkern is installed
    python examples/trl_grpo.py                     # GRPO
    python examples/trl_grpo.py --objective gppo    # any objective of reasonkern by name
    python examples/trl_grpo.py --out run           # and the curves in run/, with matplotlib
    torchrun --nproc_per_node 2 examples/trl_grpo.py --steps 100
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of, or told to, a server
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig  # noqa: E402

from reasonkern import Objective  # noqa: E402
from reasonkern.integrations.trl import GRPOTrainer  # noqa: E402

WORDS = ["<pad>", "<eos>", "+", "=", *"0123456789"]
CURVES = ("reward", "entropy", "reasonkern/clip_frac", "reasonkern/ess_frac")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**(shape | changes)))


def make_dataset() -> Dataset:
    sums = [(a, b) for a in range(5) for b in range(5)]
    return Dataset.from_dict(
        {"prompt": [f"{a} + {b} =" for a, b in sums], "answer": [str(a + b) for a, b in sums]}
    )


def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    scores = []
    for ids, text in zip(completion_ids, answer, strict=True):
        wanted = [WORDS.index(text), WORDS.index("<eos>")]
        right = [x == y for x, y in zip(ids, wanted, strict=False)] + [False]
        scores.append(right.index(False) / len(wanted))
    return scores


def make_config(folder: str, steps: int, **changes: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 128,
        "num_generations": 16, "num_iterations": 2, "max_completion_length": 3,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5,
        "loss_type": "grpo", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "logging_steps": 10, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return GRPOConfig(**(options | changes))


def make_objective(name: str) -> str | Objective:
    """A name as the trainer takes it, but for two that need numbers."""
    if name == "gtpo":  # drops completions of high entropy, unless the model started from one
        return Objective.gtpo(initial_entropy=math.log(len(WORDS)))
    # The name is TRL's loss type, too, whose bound would be args.epsilon_high.
    return Objective.cispo() if name == "cispo" else name


def plot(history: list[dict[str, Any]], objective: str, folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(3.2 * len(CURVES), 2.6))
    for axis, name in zip(axes, CURVES, strict=True):
        axis.plot([row["step"] for row in history], [row[name] for row in history])
        axis.set(title=name, xlabel="step")
    figure.suptitle(objective)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trl_{objective}.png"
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--objective",
        default="grpo",
        help="a TRL loss type or an Objective's name (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=250, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for the plot (default: no plot)")
    options = parser.parse_args(arguments)
    if options.out is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out needs matplotlib (pip install matplotlib)")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            make_model(), reward, args=make_config(folder, options.steps),
            objective=make_objective(options.objective), train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    if trainer.is_world_process_zero():
        share = max(1, len(history) // 10)
        first, last = (
            sum(row["reward"] for row in rows) / share
            for rows in (history[:share], history[-share:])
        )
        print(f"{options.objective}: mean reward {first:.2f} at first, {last:.2f} at last")
        if options.out is not None:
            print(plot(history, options.objective, options.out))
    return history


if __name__ == "__main__":
    main()
