"""CyclicReflex and a thinking budget on a transformers model: ``model.generate`` with one argument.

Without arguments a small Qwen2 first learns, on CPU and in a minute or two (three on a busy
machine), from generated chains of arithmetic that doubt themselves ("Wait, let me check"); then it
thinks about new problems without control, with CyclicReflex, and with a budget. So short a training
teaches the form of such chains, not the arithmetic: hardly an answer is right. A model of your own
thinks about your prompt:

    pip install "reasonkern[transformers]"    # once reasonkern is installed
    python examples/cyclic_reflex.py
    python examples/cyclic_reflex.py --model PATH --prompt "How many primes are below 60?" \\
        --amplitude 5 --period 1200 --budget 4096 --tokens 8192
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of, or told to, a server

import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import reasonkern as rk  # noqa: E402
from reasonkern.demo import arithmetic  # noqa: E402
from reasonkern.integrations.transformers import ModulationLogitsProcessor  # noqa: E402

PUBLISHED = ["wait", "Wait", "but", "But", "Alternatively"]
QUESTION = "What is 17 * 23? Think step by step."
PIECES = r"</?think>|\\boxed|[A-Za-z]+|\d| |\n|[^\w\s]"
END = "</think>"


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    spec: rk.Modulation | None


class Problem(NamedTuple):
    statement: str
    ids: list[int]
    """The prompt, up to and with <think>: thinking begins with the first generated token."""


def end_of_thinking(args: argparse.Namespace, tokenizer: Any) -> int:
    token = tokenizer.convert_tokens_to_ids(END)
    if tokenizer.encode(END, add_special_tokens=False) != [token]:
        expected = f"a reasoning model, whose tokenizer has {END} as a token"
        raise SystemExit(f"--model {args.model}: expected {expected}")
    return token


def settings(args: argparse.Namespace, tokenizer: Any, think_end: int) -> list[Setting]:
    phrase = tokenizer.encode("\n" + END, add_special_tokens=False)
    cyclic, budget = rk.Cyclic(args.amplitude, args.period), rk.Budget(args.budget, phrase)
    return [
        Setting("plain", None),
        Setting("CyclicReflex", rk.Modulation(cyclic=cyclic, think_end=think_end)),
        Setting(f"budget {args.budget}", rk.Modulation(budget=budget, think_end=think_end)),
        Setting("both", rk.Modulation(cyclic=cyclic, budget=budget, think_end=think_end)),
    ]


def think(
    model: Any, problems: Sequence[Problem], setting: Setting, sets: rk.TokenSets, tokenizer: Any,
    args: argparse.Namespace,
) -> list[list[int]]:  # fmt: skip
    """The generated tokens of all texts, in one batch: the first line is all that control takes."""
    control = ModulationLogitsProcessor([setting.spec] * len(problems), sets)
    prompts = tokenizer.pad(
        {"input_ids": [problem.ids for problem in problems]}, padding_side="left",
        return_tensors="pt",
    ).to(model.device)  # fmt: skip
    torch.manual_seed(args.seed)
    out = model.generate(
        **prompts, logits_processor=[control], do_sample=True, temperature=0.6, top_p=0.95,
        max_new_tokens=args.tokens,
    )  # fmt: skip
    stop = tokenizer.eos_token_id
    texts = out[:, prompts["input_ids"].shape[1] :].tolist()
    return [text[: text.index(stop)] if stop in text else text for text in texts]


class Tally(NamedTuple):
    """What is counted over all texts of a setting."""

    texts: int
    tokens: int
    thinking: int
    rising: int
    """Reflection tokens where the wave is above 0, in the first half of each period."""
    falling: int
    correct: int | None


def count(
    texts: Sequence[list[int]], problems: Iterable[Problem], sets: rk.TokenSets, tokenizer: Any,
    think_end: int, args: argparse.Namespace,
) -> Tally:  # fmt: skip
    reflect = set(sets["reflect"])
    thoughts = [t[: t.index(think_end)] if think_end in t else t for t in texts]
    places = [t for thought in thoughts for t, token in enumerate(thought) if token in reflect]
    rising = sum(t % args.period < args.period / 2 for t in places)
    right = None
    if args.model is None:
        pairs = zip(problems, texts, strict=True)
        right = sum(arithmetic.verify(p.statement, tokenizer.decode(t)) for p, t in pairs)
    lengths = sum(map(len, texts)), sum(map(len, thoughts))
    return Tally(len(texts), *lengths, rising, len(places) - rising, right)


# ---- the small model


def small_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *sorted({w for text in texts for w in re.findall(PIECES, text)})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train(args: argparse.Namespace) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Fine-tunes on texts of the correct traces, by `token_stats`."""
    traces = [t for t in arithmetic.generate(problems=400, samples=4, seed=1) if t.correct]
    texts = [t.prompt + t.text for t in traces]
    tokenizer = small_tokenizer(texts)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    for step in range(args.steps):
        some = [texts[i % len(texts)] + "<eos>" for i in range(8 * step, 8 * step + 8)]
        batch = tokenizer(some, padding=True, return_tensors="pt")
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        kept = batch.attention_mask[:, 1:].bool()
        stats = rk.token_stats(logits[:, :-1], batch.input_ids[:, 1:], mask=kept)
        loss = -stats.logprob.sum() / kept.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"training: step {step + 1} of {args.steps}, {loss.item():.3f} nats per token")
    return model.eval(), tokenizer


def prepare(args: argparse.Namespace) -> tuple[Any, Any, list[Problem], rk.TokenSets]:
    if args.model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            parts = "a folder with config.json, weights and tokenizer, or a name in the local cache"
            # Of anything but a folder transformers says that it could not connect.
            got = f", got {error}" if os.path.isdir(args.model) else ""
            raise SystemExit(f"--model {args.model}: expected {parts}{got}") from None
        text = args.prompt
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        text += "" if text.rstrip().endswith("<think>") else "<think>\n"
        ids = tokenizer.encode(text, add_special_tokens=False)
        try:
            words, variants = {"reflect": args.words}, args.variants
            sets = rk.TokenSets.from_tokenizer(tokenizer, words, variants=variants)
        except ValueError as error:  # other tokenizers have other whole words
            advice = str(error).replace('variants="space"', "--variants space")
            raise SystemExit(f"--words: {advice}") from None
        return model, tokenizer, [Problem(args.prompt, ids)], sets
    model, tokenizer = train(args)
    made = arithmetic.generate(args.problems, samples=2, seed=2)
    statements = dict.fromkeys(trace.prompt for trace in made)
    problems = [Problem(s, tokenizer.encode(s + "<think>")) for s in statements]
    return model, tokenizer, problems, rk.TokenSets.from_tokenizer(tokenizer, {"reflect": ["Wait"]})


def number(kind: type, above: float = 0) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number > {above}, got {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        help="of a reasoning model: a folder, or a name in the local cache; None = a small one, "
        "trained here",
    )
    parser.add_argument("--prompt", help=f"for --model; None = {QUESTION!r}")
    parser.add_argument(
        "--words", nargs="+", default=PUBLISHED, help="reflection words, a token each, for --model"
    )
    parser.add_argument(
        "--variants", choices=("exact", "space"), default="exact",
        help="space: also the words with a space before them, for --model",
    )  # fmt: skip
    add = parser.add_argument_group(
        "sizes",
        "whose defaults fit the small model; a real one takes --amplitude 5 --period 1200, as "
        "published, and thousands of --budget and --tokens",
    ).add_argument
    count = number(int)
    add("--amplitude", type=number(float, -math.inf), default=4.0, help="of the wave, in logits")
    add("--period", type=number(float), default=60.0, help="of the wave, in tokens")
    add("--budget", type=count, default=80, help="thinking tokens")
    add("--tokens", type=count, default=240, help="new tokens at most")
    add("--samples", type=count, default=4, help="texts per problem")
    add("--problems", type=count, default=8, help="for the small model")
    add("--steps", type=count, default=150, help="of training the small model")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.model is None:
        parser.error("--prompt: expected with --model; the small model has problems of its own")
    args.prompt = QUESTION if args.prompt is None else args.prompt
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    model, tokenizer, problems, sets = prepare(args)
    think_end = end_of_thinking(args, tokenizer)
    problems = [problem for problem in problems for _ in range(args.samples)]
    print(f"\n{sets}; reflection tokens per text, above 0 and below 0 of the wave:\n")
    print(f"{'control':<14}{'tokens':>8}{'thinking':>10}{'above':>8}{'below':>8}{'correct':>9}")
    for setting in settings(args, tokenizer, think_end):
        texts = think(model, problems, setting, sets, tokenizer, args)
        tally = count(texts, problems, sets, tokenizer, think_end, args)
        means = [x / tally.texts for x in tally[1:5]]
        right = "" if tally.correct is None else f"{tally.correct / tally.texts:9.0%}"
        print(
            f"{setting.name:<14}{means[0]:8.1f}{means[1]:10.1f}{means[2]:8.2f}{means[3]:8.2f}"
            + right
        )
    if args.model is not None:
        print("\n" + tokenizer.decode(texts[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
