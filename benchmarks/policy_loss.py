"""Benchmarks of policy_loss: cases and providers as data, their inputs and their truth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, Family, Gate, Provider, Tolerance, Truth
from benchmarks.peers import compile, eager, liger, ours, quack, trl

# Llama 2, Llama 3, Qwen 2.5/3, Gemma 2/3: the vocabularies people train.
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)


@dataclass(frozen=True)
class Spec:
    """The loss of a case and how its rows make up sequences."""

    sequences: int = 8
    ratio_min: float = 0.8
    ratio_max: float = 1.28
    sequence_level: bool = False
    entropy_coef: float = 0.01
    inplace: bool = False


@dataclass
class Batch:
    """Inputs of one case: B sequences of T tokens, all of them active."""

    logits: Tensor
    targets: Tensor
    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor


DAPO = Spec()
GSPO = Spec(ratio_min=0.9997, ratio_max=1.0004, sequence_level=True)
PEERS = ("copy", "eager", "compile", "trl", "liger")


def providers_of(op: str, dtype: str, device: str) -> tuple[str, ...]:
    """Subject first. On a GPU both of our backends take part, whichever the package would pick."""
    subject = ("reasonkern",) if device == "cpu" else ("ours-cuda", "ours-triton")
    # torch.logsumexp of half-precision logits answers in half precision: no yardstick.
    yardstick = ("logsumexp",) if op == "token_stats" and dtype == "float32" else ()
    more = ("quack",) if op == "token_stats" and device == "cuda" else ()
    return (*subject, *yardstick, *PEERS, *more)


def loss_case(
    shape: tuple[int, int],
    dtype: str = "float32",
    spec: Spec = DAPO,
    *,
    entropy: bool = True,
    inplace: bool = True,
    device: str = "cpu",
    threads: int | None = 2,
    providers: tuple[str, ...] = (),
    gates: tuple[Gate, ...] = (),
    quick: bool = False,
) -> Case:
    """Loss and gradient of the logits; a sequence-level objective reads the logits twice."""
    spec = dataclasses.replace(spec, entropy_coef=0.01 if entropy else 0.0, inplace=inplace)
    words = ["gspo" if spec.sequence_level else "dapo"]
    words += ["entropy"] * entropy + ["inplace"] * inplace
    return Case(
        op="policy_loss",
        shape=shape,
        dtype=dtype,
        device=device,
        passes=3 if spec.sequence_level else 2,
        providers=providers or providers_of("policy_loss", dtype, device),
        threads=threads if device == "cpu" else None,
        label="-".join(words),
        spec=spec,
        gates=gates,
        quick=quick,
    )


def stats_case(
    shape: tuple[int, int],
    dtype: str = "float32",
    *,
    device: str = "cpu",
    gates: tuple[Gate, ...] = (),
    quick: bool = False,
    rotate: int = 1,
) -> Case:
    """Row statistics without gradient: one read of the logits."""
    return Case(
        op="token_stats",
        shape=shape,
        dtype=dtype,
        device=device,
        passes=1,
        providers=providers_of("token_stats", dtype, device),
        threads=2 if device == "cpu" else None,
        spec=DAPO,
        gates=gates,
        quick=quick,
        rotate=rotate,
    )


CPU_GATED = (
    loss_case(
        (256, 151_936),
        threads=1,
        providers=("reasonkern", "copy"),
        gates=(Gate("time", 2.2, "copy", min_pairs=25, needs="avx512"),),
    ),
    loss_case(
        (256, 151_936),
        gates=(
            Gate("speedup", 18, "eager"),
            Gate("speedup", 9, "compile"),
            Gate("memory", 0.01),
        ),
    ),
    loss_case((256, 151_936), "bfloat16", gates=(Gate("speedup", 18, "eager"),)),
    stats_case((256, 151_936), gates=(Gate("speedup", 5, "logsumexp"),)),
)
CPU_OTHERS = (
    # Small enough for a first impression in seconds.
    stats_case((256, 32_000), quick=True),
    loss_case((256, 32_000), quick=True),
    # What the entropy bonus, the in-place form and the second phase cost, at one shape.
    loss_case((64, 151_936), inplace=False),
    loss_case((64, 151_936), entropy=False),
    loss_case((64, 151_936), spec=GSPO),
    # The same work at the other vocabularies.
    *(loss_case((64, vocab)) for vocab in (128_256, 262_144)),
    *(stats_case((64, vocab)) for vocab in (128_256, 262_144)),
    stats_case((64, 151_936), "bfloat16"),
)
FASTER_THAN_PEERS = tuple(Gate("speedup", 1.0, name) for name in ("compile", "trl"))
CUDA_CASES = (
    stats_case(
        (8192, 151_936),
        "bfloat16",
        device="cuda",
        gates=(Gate("copy_share", 0.90), *FASTER_THAN_PEERS),
    ),
    loss_case(
        (8192, 151_936),
        "bfloat16",
        device="cuda",
        gates=(Gate("copy_share", 0.85), *FASTER_THAN_PEERS),
    ),
    loss_case(
        (8192, 151_936),
        "bfloat16",
        entropy=False,
        device="cuda",
        gates=(Gate("copy_share", 0.85), Gate("speedup", 1.0, "liger"), *FASTER_THAN_PEERS),
    ),
    loss_case((8192, 151_936), "bfloat16", inplace=False, device="cuda"),
    loss_case(
        (8192, 151_936),
        "bfloat16",
        GSPO,
        device="cuda",
        gates=(Gate("copy_share", 0.85), *FASTER_THAN_PEERS),
    ),
    loss_case((2048, 151_936), "float32", device="cuda"),
    *(loss_case((8192, vocab), "bfloat16", device="cuda") for vocab in (32_000, 128_256)),
    loss_case((4096, 262_144), "bfloat16", device="cuda"),
    *(stats_case((8192, vocab), "bfloat16", device="cuda") for vocab in (32_000, 128_256)),
    # Few rows fit the L2 and the launch overhead counts: graph replay over rotated inputs.
    stats_case((64, 151_936), "bfloat16", device="cuda", rotate=10, quick=True),
    loss_case((512, 32_000), "bfloat16", device="cuda", quick=True),
)


def make_inputs(case: Case, seed: int) -> Batch:
    """Rows like a trained model's: half have a dominant token; ratios fall on every side."""
    spec: Spec = case.spec
    rows, vocab = case.shape
    shape = (spec.sequences, rows // spec.sequences)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(1000 + seed)
    logits = torch.empty(*shape, vocab, dtype=dtype, device=device)
    targets = torch.empty(shape, dtype=torch.int64, device=device)
    logprob = torch.empty(shape, dtype=torch.float64, device=device)
    for b in range(shape[0]):
        x = torch.randn(shape[1], vocab, generator=generator, device=device) * 2.5
        x[::2, b] += 18.0
        logits[b] = x
        logp = torch.log_softmax(logits[b].float(), dim=-1)
        targets[b] = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)
        logprob[b] = logp.gather(-1, targets[b].unsqueeze(1)).squeeze(1)
    log_ratio = 0.3 * torch.randn(shape, generator=generator, device=device)
    advantage = torch.randn(shape[0], generator=generator, device=device)
    weight = torch.full(shape, 1.0 / rows, device=device)
    old = (logprob - off_the_bounds(log_ratio, spec)).float()
    return Batch(logits, targets, old, advantage, weight)


def off_the_bounds(log_ratio: Tensor, spec: Spec) -> Tensor:
    """A ratio within rounding of a bound may be clipped by one provider and not by the other."""
    ratio = log_ratio.exp()
    near = ((ratio - spec.ratio_min).abs() < 1e-3) | ((ratio - spec.ratio_max).abs() < 1e-3)
    return torch.where(near, log_ratio + 0.02, log_ratio)


def truth(case: Case, batch: Batch) -> Truth:
    """The eager formulation in float64, and how far float32 may be from it.

    Allowed is twice the largest error of plain torch in float32, in the worse of its two textbook
    forms (log_softmax, and logits minus logsumexp), plus two units of rounding: this check asks
    whether a provider computes the same thing, not which one is more accurate. An entry of the
    gradient is measured against the terms that it is the difference of. Sequences are independent,
    so they are done one at a time: float64 of the whole batch would need several times its memory.
    """
    gradient = case.op == "policy_loss"
    parts = [_sequence_truth(case.spec, sequence, gradient) for sequence in _sequences(batch)]
    exact = {k: torch.cat([values[k] for values, _ in parts]) for k in parts[0][0]}
    error = {k: max(float(errors[k]) for _, errors in parts) for k in parts[0][1]}
    eps = torch.finfo(torch.float32).eps
    values = {name: exact[name] for name in ("logprob", "entropy", "lse")}
    tolerance = {name: Tolerance(2 * eps, 2 * error[name]) for name in values}
    if gradient:
        values |= {"loss": exact["loss"].sum(), "grad": exact["grad"]}
        # The ratio turns an error of the log-probability into the same relative error of the loss.
        tolerance["loss"] = Tolerance(
            2 * eps, float(exact["size"].sum()) * (2 * error["logprob"] + 2 * eps)
        )
        rounding = 2 * torch.finfo(batch.logits.dtype).eps
        tolerance["grad"] = Tolerance(rounding, exact["terms"].mul_(2 * error["grad"]))
    return Truth(values, tolerance)


def _sequences(batch: Batch) -> list[Batch]:
    fields = [f.name for f in dataclasses.fields(Batch)]
    count = batch.logits.shape[0]
    return [Batch(*(getattr(batch, f)[b : b + 1] for f in fields)) for b in range(count)]


def _sequence_truth(
    spec: Spec, batch: Batch, gradient: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """float64 values, and per name the largest error of the two float32 forms."""
    exact = _sequence_values(spec, batch, torch.float64, eager.log_softmax, gradient)
    errors: dict[str, Tensor] = {}
    for form in (eager.log_softmax, eager.minus_logsumexp):
        plain = _sequence_values(spec, batch, torch.float32, form, gradient)
        for name in ("logprob", "entropy", "lse", *(["grad"] * gradient)):
            error = (plain[name].double() - exact[name]).abs()
            if name == "grad":
                error = torch.nan_to_num(error / exact["terms"])
            errors[name] = torch.maximum(errors.get(name, error.max()), error.max())
    return exact, errors


def _sequence_values(
    spec: Spec, batch: Batch, dtype: torch.dtype, form: eager.LogSoftmax, gradient: bool
) -> dict[str, Tensor]:
    logits = batch.logits.to(dtype).requires_grad_(gradient)
    values = eager.row_statistics(logits.detach(), batch.targets, form)
    values["lse"] = torch.logsumexp(logits.detach(), dim=-1)
    if gradient:
        terms = eager.policy_loss(logits, batch, spec, form)
        wanted = [t for t in (logits, terms.logprob, terms.entropy) if t is not None]
        grads = torch.autograd.grad(terms.loss, wanted)
        values |= {"loss": terms.loss.detach().reshape(1, 1), "grad": grads[0]}
        size = batch.weight.abs() * (batch.advantage.abs().unsqueeze(1) + spec.entropy_coef)
        values["size"] = size
        if dtype == torch.float64:
            values["terms"] = _gradient_terms(logits.detach(), batch.targets, values, grads[1:])
    return {name: t.flatten(0, 1) for name, t in values.items()}


def _gradient_terms(
    logits: Tensor, targets: Tensor, values: dict[str, Tensor], by_row: tuple[Tensor, ...]
) -> Tensor:
    """Size of the terms of g·(1[v=y] − p_v) − e·p_v·(ln p_v + H), as float32 to save memory.

    1 stands beside |ln p_v| and H for the size of what their own errors come from.
    """
    logp = torch.log_softmax(logits, dim=-1)
    g = by_row[0].abs().unsqueeze(-1)
    weight = g.expand_as(logp)
    if len(by_row) > 1:
        e = by_row[1].abs().unsqueeze(-1)
        weight = g + e * (1 + logp.abs() + values["entropy"].unsqueeze(-1))
    size = logp.exp() * weight
    return size.scatter_add_(-1, targets.unsqueeze(-1), g).float()


OURS = {"token_stats": ours.token_stats_runner, "policy_loss": ours.policy_loss_runner}
PROVIDERS = (
    Provider("reasonkern", OURS),
    *ours.gpu_providers(OURS).values(),
    Provider(
        "copy",
        {"token_stats": eager.copy_runner, "policy_loss": eager.copy_runner},
        checked=False,
        passes=2,
    ),
    Provider("logsumexp", {"token_stats": eager.logsumexp_runner}),
    Provider("quack", {"token_stats": quack.token_stats_runner}),
    *(
        Provider(
            name,
            {"token_stats": peer.token_stats_runner, "policy_loss": peer.policy_loss_runner},
        )
        for name, peer in {"eager": eager, "compile": compile, "trl": trl, "liger": liger}.items()
    ),
)
FAMILY = Family(
    name="policy_loss",
    cases=(*CPU_GATED, *CPU_OTHERS, *CUDA_CASES),
    providers={provider.name: provider for provider in PROVIDERS},
    inputs=make_inputs,
    truth=truth,
)
