"""Benchmarks of linear_policy_loss: from hidden states and the head to the loss and its gradients.

The yardstick is `gemms`: the three matrix products nobody can avoid, alone, over the whole logits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, Family, Gate, Provider, Tolerance, Truth
from benchmarks.peers import eager, liger, ours, trl
from benchmarks.policy_loss import DAPO, GSPO, Spec

OP = "linear_policy_loss"
PEERS = ("gemms", "eager", "trl", "liger")


@dataclass
class HeadBatch:
    """Inputs of one case: B sequences of T tokens, all of them active."""

    hidden: Tensor  # (B, T, D)
    head: Tensor  # (V, D)
    targets: Tensor
    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor

    def sequence(self, b: int) -> HeadBatch:
        """One sequence as a batch; the head is shared."""
        rows = {f.name: getattr(self, f.name)[b : b + 1] for f in dataclasses.fields(self)}
        return HeadBatch(**(rows | {"head": self.head}))


def case(
    shape: tuple[int, int, int],
    dtype: str = "float32",
    spec: Spec = DAPO,
    *,
    tokens: int = 1024,
    entropy: bool = True,
    device: str = "cpu",
    providers: tuple[str, ...] = (),
    gates: tuple[Gate, ...] = (),
    quick: bool = False,
) -> Case:
    """(N, D, V): N rows in sequences of `tokens`; loss and the gradients of hidden and head."""
    rows, width, vocab = shape
    coef = 0.01 if entropy else 0.0
    spec = dataclasses.replace(spec, sequences=max(1, rows // tokens), entropy_coef=coef)
    subject = ("reasonkern",) if device == "cpu" else ("ours-cuda", "ours-triton")
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        passes=1,
        providers=(*subject, *(providers or PEERS)),
        threads=2 if device == "cpu" else None,
        label="-".join(["gspo" if spec.sequence_level else "dapo"] + ["entropy"] * entropy),
        spec=spec,
        gates=gates,
        quick=quick,
        input_shape=(vocab, width),
        flops=6 * rows * width * vocab,
    )


FASTER = tuple(Gate("speedup", 1.0, name) for name in ("trl", "liger"))
SMALLER = tuple(Gate("memory", 1.0, name) for name in ("trl", "liger"))
CPU_CASES = (
    case((4096, 256, 32_000), providers=("gemms",), gates=(Gate("time", 1.15, "gemms"),)),
    # Liger's loss has no entropy bonus, so the comparison with both is made without one.
    case((2048, 256, 32_000), entropy=False, gates=(*FASTER, *SMALLER)),
    # Cost per token: 16,384 rows in one call against as many in calls of 1,024.
    case(
        (16_384, 256, 32_000), providers=("calls-of-1k",), gates=(Gate("time", 1.1, "calls-of-1k"),)
    ),
    case((2048, 256, 32_000)),
    case((2048, 256, 32_000), spec=GSPO, providers=("gemms", "eager")),
    case((1024, 128, 32_000), quick=True),
)
# 3 products at 80 % of the rate measured for them alone.
GEMM_RATE = Gate("time", 1.25, "gemms")
CUDA_CASES = (
    case(
        (8192, 4096, 151_936),
        "bfloat16",
        entropy=False,
        device="cuda",
        gates=(GEMM_RATE, *FASTER, *SMALLER),
    ),
    case((8192, 4096, 151_936), "bfloat16", device="cuda", gates=(GEMM_RATE, FASTER[0])),
    case((8192, 4096, 151_936), "bfloat16", GSPO, device="cuda", providers=("gemms", "trl")),
    case((16_384, 4096, 151_936), "bfloat16", device="cuda", providers=("calls-of-1k",)),
    case((8192, 2048, 32_000), "bfloat16", device="cuda", quick=True),
)


def make_inputs(case: Case, seed: int) -> HeadBatch:
    """Rows like a trained model's: half have a dominant token; ratios inside and on both sides.

    Ratios stay 0.15 nat away from every bound, more than half-precision logits move them: no token
    is clipped by one provider and not by the other.
    """
    spec: Spec = case.spec
    rows, width, vocab = case.shape
    shape = (spec.sequences, rows // spec.sequences)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(1000 + seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    head = (noise(vocab, width) * (2.5 / width**0.5)).to(dtype)
    hidden, targets, logprob = [], [], []
    for b in range(shape[0]):
        h = noise(shape[1], width)
        favourite = head[b].float()
        h[::2] += 18.0 * favourite / favourite.square().sum()
        hidden.append(h.to(dtype))
        logp = torch.log_softmax((hidden[b] @ head.T).float(), dim=-1)
        targets.append(torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1))
        logprob.append(logp.gather(-1, targets[b].unsqueeze(1)).squeeze(1))
    choice = torch.randint(4, shape, generator=generator, device=device)
    log_ratio = torch.tensor((-0.5, -0.05, 0.05, 0.5), device=device)[choice]
    return HeadBatch(
        torch.stack(hidden),
        head,
        torch.stack(targets),
        torch.stack(logprob) - log_ratio - 0.01 * noise(*shape),
        noise(shape[0]),
        torch.full(shape, 1.0 / rows, device=device),
    )


def truth(case: Case, batch: HeadBatch) -> Truth:
    """The eager formulation in float64, one sequence at a time: the logits of all do not fit.

    Allowed is twice the largest error of the same formulation on materialised logits of the case's
    dtype, computed in float32 from there in the worse of its two textbook forms, plus two units of
    rounding of the largest value.
    """
    exact = sequence_by_sequence(case.spec, batch, torch.float64, eager.log_softmax)
    errors = dict.fromkeys(exact, 0.0)
    for form in (eager.log_softmax, eager.minus_logsumexp):
        plain = sequence_by_sequence(case.spec, batch, batch.hidden.dtype, form)
        for name, value in exact.items():
            errors[name] = max(errors[name], largest(plain[name].double() - value))
    tolerance = {}
    for name, value in exact.items():
        error = errors[name]
        eps = torch.finfo(batch.hidden.dtype if "grad" in name else torch.float32).eps
        tolerance[name] = Tolerance(0.0, 2 * error + 2 * eps * max(largest(value), 1e-30))
    # The loss is a sum whose terms cancel: the rows decide whether a provider is right.
    tolerance["loss"] = Tolerance(2e-5, 2 * float(tolerance["logprob"].absolute))
    return Truth(exact, tolerance)


def largest(x: Tensor) -> float:
    """Largest magnitude, without a copy of a large tensor."""
    low, high = torch.aminmax(x)
    return max(abs(low.item()), abs(high.item())) if x.numel() else 0.0


def sequence_by_sequence(
    spec: Spec, batch: HeadBatch, dtype: torch.dtype, form: eager.LogSoftmax
) -> dict[str, Tensor]:
    """Loss, rows and gradients; the head's is summed in float64 (float32 in half precision)."""
    head = batch.head.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_head = torch.zeros_like(head, dtype=wide)
    rows: dict[str, list[Tensor]] = {n: [] for n in ("loss", "logprob", "entropy", "grad_hidden")}
    for b in range(spec.sequences):
        one = batch.sequence(b)
        hidden = one.hidden.to(dtype)
        logits = (hidden @ head.T).requires_grad_()
        terms = eager.policy_loss(logits, one, spec, form)
        (gradient,) = torch.autograd.grad(terms.loss, logits)
        gradient = gradient.flatten(0, 1)
        entropy = textbook_entropy(logits.detach(), form)
        rows["loss"].append(terms.loss.detach())
        rows["logprob"].append(terms.logprob.detach().flatten())
        rows["entropy"].append(entropy.flatten())
        rows["grad_hidden"].append(gradient @ head)
        add_outer(grad_head, gradient, hidden.flatten(0, 1))
    out = {name: torch.cat(x) for name, x in rows.items() if name != "loss"}
    return out | {"loss": torch.stack(rows["loss"]).sum(), "grad_head": grad_head}


def textbook_entropy(logits: Tensor, form: eager.LogSoftmax) -> Tensor:
    """-Σ p ln p, and with the second form of the logarithm ln Σ e^z - Σ p z, as in TRL."""
    x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if form is eager.log_softmax:
        logp = form(x)
        return -(logp.exp() * logp).sum(-1)
    return torch.logsumexp(x, -1) - (torch.softmax(x, -1) * x).sum(-1)


def add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a.T @ b`` in the dtype of `total`, a few columns of a at a time."""
    for columns in torch.arange(a.shape[1], device="cpu").split(16_384):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        total[part].addmm_(a[:, part].T.to(total.dtype), b.to(total.dtype))


PROVIDERS = (
    Provider("reasonkern", {OP: ours.linear_policy_loss_runner}),
    *ours.gpu_providers({OP: ours.linear_policy_loss_runner}).values(),
    Provider("calls-of-1k", {OP: ours.linear_in_calls_of_1k_runner}),
    Provider("gemms", {OP: eager.gemms_runner}, checked=False),
    *(
        Provider(name, {OP: peer.linear_policy_loss_runner})
        for name, peer in {"eager": eager, "trl": trl, "liger": liger}.items()
    ),
)
FAMILY = Family(
    name=OP,
    cases=(*CPU_CASES, *CUDA_CASES),
    providers={provider.name: provider for provider in PROVIDERS},
    inputs=make_inputs,
    truth=truth,
)
