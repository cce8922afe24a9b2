"""Several answers of your own transformers model to one prompt, plain and with speculation.

    pip install "reasonkern[transformers]"    # once reasonkern is installed
    python examples/transformers_generate.py FOLDER
    python examples/transformers_generate.py FOLDER --prompt "What is 17 * 23?" --trajectories 16

FOLDER holds a causal model and its tokenizer, as `save_pretrained` writes them; nothing is
downloaded. Both runs have the same seed and give the same texts, as far as the model's dtype lets a
pass over many nodes give the logits of a pass over one; the second one needs fewer passes. The
table then knows the prompt's answers: a further call starts with what it has learnt.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import reasonkern as rk  # noqa: E402
from reasonkern.integrations.transformers import Generation, generate  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def prompt_ids(tokenizer: Any, prompt: str, device: torch.device) -> torch.Tensor:
    """With the tokenizer's chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64, device=device)


def new_tokens(found: Generation, prompt: int) -> list[list[int]]:
    rows = zip(found.sequences.tolist(), found.lengths.tolist(), strict=True)
    return [row[prompt : prompt + length] for row, length in rows]


def report(name: str, found: Generation) -> None:
    print(f"{name}: {found.statistics}")


def main(arguments: Sequence[str] | None = None) -> tuple[Generation, Generation]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a causal model and its tokenizer")
    question = "How many positive divisors does 360 have? Think step by step."
    add("--prompt", default=question, help="put into the tokenizer's chat template, if any")
    add("--trajectories", type=int, default=4, help="answers to it")
    add("--max-new-tokens", type=int, default=512, help="of each answer")
    add("--temperature", type=float, default=0.6, help="0 = greedy")
    add("--top-p", type=float, default=0.95, help="probability kept")
    add("--seed", type=int, default=0, help="of the run")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the weights")
    add("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this torch sees no GPU")
    if not (options.folder / "config.json").is_file():
        parser.error(f"{options.folder}: expected a folder with config.json, weights and tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
    except (OSError, ValueError) as error:
        parser.error(f"{options.folder}: expected a tokenizer, got {error}")
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=DTYPES[options.dtype])
    model = model.to(options.device).eval()
    ids = prompt_ids(tokenizer, options.prompt, model.device)
    if ids.shape[1] == 0:  # transformers makes an empty tokenizer where its files are missing
        parser.error(f"{options.folder}: expected a tokenizer that knows the prompt, got no tokens")
    table = rk.NgramTable(vocab_size=model.config.vocab_size, device=model.device)
    given: dict[str, Any] = {
        "temperature": options.temperature, "top_p": options.top_p, "seed": options.seed,
        "max_new_tokens": options.max_new_tokens, "num_trajectories": options.trajectories,
    }  # fmt: skip
    plain = generate(model, ids, **given)
    report("plain", plain)
    speculative = generate(model, ids, table=table, **given)
    report("with speculation", speculative)
    texts = [new_tokens(found, ids.shape[1]) for found in (plain, speculative)]
    equal = sum(a == b for a, b in zip(*texts, strict=True))
    print(f"{equal} of {len(texts[0])} texts are equal; the first one:")
    print(tokenizer.decode(texts[1][0], skip_special_tokens=True))
    return plain, speculative


if __name__ == "__main__":
    main()
