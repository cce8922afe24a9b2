"""Cases of the sampler: a token with its log-probability and entropy, against a processor chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.case import DTYPES, Case, Gate, Provider, Runner, Skip, Tolerance, Truth
from reasonkern import _load

VOCAB, TEMPERATURE, TOP_P = 151_936, 0.6, 0.95
REFLECT = (14190, 13824, 8088, 3983, 92014)  # wait, Wait, but, But, Alternatively in Qwen2.5


@dataclass
class Rows:
    """Logits (B, V) whose heads are as peaked as a reasoner's: a few likely tokens each."""

    logits: Tensor
    seed: Tensor
    state: rk.ModulationState | None
    slot: Tensor | None


def inputs(case: Case, seed: int) -> Rows:
    batch, vocab = case.shape
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=g) * 2.0
    heads = torch.randint(0, vocab, (batch, 40), generator=g)
    logits.scatter_(1, heads, 18 - 8 * torch.rand(batch, 40, generator=g))
    logits = logits.to(DTYPES[case.dtype])
    seeds = rk.request_seeds(seed, batch)
    if case.label != "controlled":
        return Rows(logits, seeds, None, None)
    state = rk.ModulationState(batch, rk.TokenSets.from_ids({"reflect": REFLECT}))
    spec = rk.Modulation(cyclic=rk.Cyclic(5.0, 1200, shift=0.2), budget=rk.Budget(4096, [7, 9]))
    for b in range(batch):
        state.add(b, spec, prompt_tokens=[1])
    return Rows(logits, seeds, state, torch.arange(batch))


def ours(case: Case, rows: Rows) -> Runner:
    def call() -> rk.Sampled:
        return rk.sample_controlled(
            rows.logits, rows.state, rows.slot, temperature=TEMPERATURE, top_p=TOP_P,
            seed=rows.seed, position=0,
        )  # fmt: skip

    def outputs(out: rk.Sampled) -> dict[str, Tensor]:
        return {name: getattr(out, name).double() for name in ("token", "logprob", "entropy")}

    return Runner(call, outputs)


def transformers(case: Case, rows: Rows) -> Runner:
    """The warpers of `generate`, then what its users compute from their result."""
    try:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
    except ImportError as error:
        raise Skip(f"transformers: {error}") from error
    if rows.state is not None:
        raise Skip("transformers has no control to go with it")
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])
    text = torch.zeros(case.shape[0], 1, dtype=torch.int64)

    def call() -> dict[str, Tensor]:
        logits = rows.logits.float()
        scores = warpers(text, logits)
        token = torch.multinomial(torch.softmax(scores, -1), 1)
        logprob = torch.log_softmax(logits, -1).gather(-1, token)
        entropy = torch.distributions.Categorical(logits=scores).entropy()
        return {"token": token, "logprob": logprob, "entropy": entropy}

    return Runner(call, lambda out: {"entropy": out["entropy"].double()})


def sampling(case: Case, rows: Rows) -> Runner:
    """`rk.sample`: what the statistics cost."""
    return Runner(
        lambda: rk.sample(
            rows.logits, temperature=TEMPERATURE, top_p=TOP_P, seed=rows.seed, position=0
        )
    )


def truth(case: Case, rows: Rows) -> Truth:
    batch = case.shape[0]
    fill = lambda x, dtype: torch.full((batch,), x, dtype=dtype)  # noqa: E731
    state = [] if rows.state is None else list(rows.state.tensors)
    token, logprob, entropy, *_ = _load.implementation("sample_controlled", "reference")(
        rows.logits, None, fill(TEMPERATURE, torch.float32), fill(0, torch.int64),
        fill(TOP_P, torch.float32), fill(0.0, torch.float32), rows.seed, fill(0, torch.int64),
        rows.slot, state,
    )  # fmt: skip
    close = Tolerance(1e-5, 1e-5)
    return Truth(
        {"token": token.double(), "logprob": logprob.double(), "entropy": entropy.double()},
        {"token": Tolerance(0.0, 0.0), "logprob": close, "entropy": close},
    )


def case_of(label: str, dtype: str, *providers: str, gates: tuple[Gate, ...] = ()) -> Case:
    return Case(
        "sampler", (64, VOCAB), dtype, "cpu", passes=1, providers=("reasonkern", *providers),
        label=label, gates=gates,
    )  # fmt: skip


FASTER = (Gate("speedup", 10.0, "transformers", needs="transformers"),)
CASES = (
    case_of("plain", "float32", "transformers", "sample", gates=FASTER),
    case_of("plain", "bfloat16", "transformers", "sample", gates=FASTER),
    case_of("controlled", "float32", "sample"),
)
BUILD: dict[str, dict[str, Any]] = {
    "reasonkern": {"sampler": ours},
    "transformers": {"sampler": transformers},
    "sample": {"sampler": sampling},
}
PROVIDERS = {name: Provider(name, build, checked=name != "sample") for name, build in BUILD.items()}
