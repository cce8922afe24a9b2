"""Every op of one GPU backend on a few small inputs, compared with the CPU.

What `gpu.sh sanitize` runs under compute-sanitizer, where a kernel is a hundred times slower:
`python -m benchmarks.smoke {cuda,triton} [--family NAME]`.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.peers.ours import forced

Outputs = dict[str, Tensor]
Check = Callable[[str], Outputs]  # from a device to results, the same on every device

OBJECTIVES = {
    "dapo": rk.Objective.dapo(0.8, 1.28, entropy_coef=0.01),
    "gspo": rk.Objective.gspo(0.9, 1.1, entropy_coef=0.01),
}


def rows(vocab: int, dtype: torch.dtype, batch: int = 2, length: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(batch, length, vocab, generator=g).mul(3).to(dtype)
    return logits, torch.randint(vocab, (batch, length), generator=g)


def loss_inputs(targets: Tensor) -> dict[str, Tensor]:
    ones = torch.ones(targets.shape, device=targets.device)
    return {"old_logprob": -2.0 * ones, "advantage": ones[:, 0], "weight": ones / ones.numel()}


# ---- one function per call; each is run on the CPU and on the GPU


def policy_loss(
    vocab: int, dtype: torch.dtype, objective: str, inplace: bool, device: str
) -> Outputs:
    logits, targets = (x.to(device) for x in rows(vocab, dtype))
    leaf = logits.clone().requires_grad_()
    given = loss_inputs(targets)
    out = rk.policy_loss(
        leaf, targets, objective=OBJECTIVES[objective], inplace_grad=inplace, **given
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return {"loss": out.loss.detach(), "gradient": gradient}


def token_stats(vocab: int, dtype: torch.dtype, device: str) -> Outputs:
    logits, targets = (x.to(device) for x in rows(vocab, dtype))
    leaf = logits.requires_grad_()
    stats = rk.token_stats(leaf, targets)
    (gradient,) = torch.autograd.grad((stats.logprob + 0.1 * stats.entropy).sum(), leaf)
    return {"logprob": stats.logprob.detach(), "lse": stats.lse.detach(), "gradient": gradient}


def linear(kind: str, device: str) -> Outputs:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, 24, generator=g).to(device).requires_grad_()
    head = torch.randn(257, 24, generator=g).mul(0.5).to(device).requires_grad_()
    targets = torch.randint(257, (2, 9), generator=g).to(device)
    objective = OBJECTIVES.get(kind, lambda logp, entropy, ctx: -ctx.advantage * logp - entropy)
    out = rk.linear_policy_loss(
        hidden, head, targets, objective=objective, chunk_rows=8, **loss_inputs(targets)
    )
    gradients = torch.autograd.grad(out.loss, (hidden, head))
    return dict(zip(("loss", "hidden", "head"), (out.loss.detach(), *gradients), strict=True))


def conflict(device: str) -> Outputs:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, (6, 40), generator=g).to(device)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, -0.5], device=device)
    group = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return {"weights": rk.conflict_token_weights(tokens, advantage, group, mask)}


def gae(device: str) -> Outputs:
    g = torch.Generator().manual_seed(3)
    reward, value = (torch.randn(5, 1100, generator=g).to(device) for _ in range(2))
    mask = (torch.rand(5, 1100, generator=g) < 0.8).to(device)
    out = rk.shaping.gae(reward, value, mask, gamma=0.99, lam=0.95)
    return dict(zip(("advantage", "returns"), out, strict=True))


def elliptical_select(device: str) -> Outputs:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(4)).to(device)
    return {"picks": rk.scaling.elliptical_select(features, 5)}


def requests(device: str, batch: int = 3) -> dict[str, Tensor]:
    return {
        "temperature": torch.tensor([0.6, 1.0, 0.0], device=device)[:batch],
        "seed": rk.request_seeds(7, batch, device=device),
        "position": torch.tensor([0, 5, 9], device=device)[:batch],
    }


FILTERS = ({}, {"top_k": 20}, {"top_p": 0.9, "min_p": 0.02})


def sample(vocab: int, dtype: torch.dtype, filters: int, device: str) -> Outputs:
    logits = rows(vocab, dtype, batch=3, length=1)[0][:, 0].to(device)
    return {"token": rk.sample(logits, **requests(device), **FILTERS[filters])}


def verify(vocab: int, dtype: torch.dtype, mode: str, device: str) -> Outputs:
    """A step of a small table: learn, draft, verify, learn from the result, compact."""
    tree = rk.DraftTree([-1, 0, 0, 1, 1, 2, 3])
    logits, _ = rows(vocab, dtype, batch=3, length=tree.nodes)
    logits[..., 1:4] += 12.0
    logits = logits.to(device)
    table = rk.NgramTable(64, vocab_size=vocab, orders=(2, 1), topk=4, device=device)
    context = torch.tensor([[0, 1], [1, 2], [2, 3]], device=device)
    ids = torch.arange(1, 5, device=device).repeat(3, 1)
    chances = torch.tensor([0.4, 0.3, 0.2, 0.05], device=device).log().repeat(3, 1)
    for window in (context, context + 1, context.flip(1)):
        table.update(window, ids, chances)
    drafted = table.draft(context, tree, mode=mode, **requests(device))
    out = rk.verify_tree(logits, drafted, tree, topk=4, mode=mode, **requests(device))
    table.update_verified(context, out)
    cache = torch.arange(3 * 2 * 20 * 4.0, device=device).view(3, 2, 20, 4)
    rk.compact_kv_(cache, cache.clone(), torch.tensor([2, 5, 9], device=device), out.path,
                   out.length)  # fmt: skip
    state = table.state_dict()
    named = {"drafted": drafted.tokens, "keys": state["keys"], "slots": state["slots"]}
    given = {name: x for name, x in out._asdict().items() if x is not None}
    return {**named, **given, "cache": cache}


CONTROLS = (
    rk.Modulation(cyclic=rk.Cyclic(5.0, 7.5), tip=rk.TIP(3.0, 2, "other"), ban=rk.Ban("words")),
    rk.Modulation(
        budget=rk.Budget(2, [5, 6], rk.SoftBudget(0.0)), min_think=rk.MinThink(1, 1, [0, 5]),
        think_end=6,
    ),
    rk.Modulation(
        schedule=rk.Schedule([(0, 0.0), (9, 3.0)]), constant=rk.Constant(1.0, "other"),
        deepconf=rk.DeepConf(0.5, 2, eos=3), entropy_trigger=rk.EntropyTrigger(2),
    ),
)  # fmt: skip


def control(vocab: int, dtype: torch.dtype, device: str) -> Outputs:
    """Every part over a tree, a commit that ends a budget, and rows without drafts after it."""
    sets = rk.TokenSets.from_ids({"reflect": [1, 2], "other": [2, 3], "words": [4]})
    state = rk.ModulationState(4, sets, device)
    for slot, spec in enumerate(CONTROLS):
        state.add(slot, spec, [])
    tree = rk.DraftTree([-1, 0, 0, 1, 3])
    logits, _ = rows(vocab, dtype, batch=4, length=tree.nodes)
    logits = logits.to(device)
    drafts = torch.tensor([[0, 1, 5, 5, 6], [0, 0, 2, 5, 2], [0, 3, -1, 2, 1]], device=device)
    drafts = torch.cat((drafts, drafts[:1]))
    slot, heat = torch.tensor([2, 0, 1, -1], device=device), torch.ones(4 * tree.nodes)
    heat[::3] = 0.0
    parents, heat = tree.parents.int().to(device), heat.to(device)
    drafted = rk.modulate_logits_(
        logits.flatten(0, 1), state, slot, draft_tokens=drafts, parents=parents, temperature=heat,
        allow_dense=True,
    )  # fmt: skip
    length = torch.tensor([2, 4, 3, 1], device=device)
    entropy, confidence = (torch.full((4, 5), x, device=device) for x in (2.0, 0.25))
    rk.commit_(state, slot, drafts, length, entropy=entropy, confidence=confidence)
    after = rk.modulate_logits_(
        logits[:, 0].clone(), state, slot, temperature=0.5, allow_dense=True
    )
    return {"drafted": drafted, "after": after, **state.tensors._asdict()}


# A row smaller than a warp, one with a ragged tail, one of a whole cluster.
VOCABULARIES = (7, 1021, 151_936)


def checks(
    backend: str, family: str, vocabularies: Sequence[int] = VOCABULARIES
) -> Iterator[tuple[str, Check]]:
    """Named calls."""
    shapes = [(v, dtype) for v in vocabularies for dtype in (torch.float32, torch.bfloat16)]
    if family == "policy_loss":
        for v, d in shapes:
            yield f"token_stats {v} {d}", lambda on, v=v, d=d: token_stats(v, d, on)
            for name in OBJECTIVES:
                for into in (False, True):
                    yield (
                        f"{name} {v} {d} {into}",
                        lambda on, v=v, d=d, n=name, i=into: policy_loss(v, d, n, i, on),
                    )
        for kind in (*OBJECTIVES, "custom"):
            yield f"linear {kind}", lambda on, kind=kind: linear(kind, on)
        if backend == "triton":  # CUDA C++ has no such kernel
            yield "conflict", conflict
    elif family == "shaping" and backend == "triton":  # CUDA C++ has no such kernels
        yield from (("gae", gae), ("elliptical_select", elliptical_select))
    elif family == "speculation":
        for v, d in shapes:
            for i in range(len(FILTERS)):
                yield f"sample {v} {d} {i}", lambda on, v=v, d=d, i=i: sample(v, d, i, on)
            for mode in ("shared", "target-only", "rejection"):
                yield f"verify {v} {d} {mode}", lambda on, v=v, d=d, m=mode: verify(v, d, m, on)
    elif family == "modulation":
        for v, d in shapes:
            yield f"control {v} {d}", lambda on, v=v, d=d: control(v, d, on)


FAMILIES = ("policy_loss", "shaping", "speculation", "modulation")


def differing(got: Outputs, want: Outputs) -> list[str]:
    """Integers exactly, floats up to two units of rounding and 1e-5 of the largest."""
    wrong = []
    for name, b in want.items():
        a = got[name].cpu()
        if b.is_floating_point():
            allowed = 2 * torch.finfo(b.dtype).eps * b.abs() + 1e-5 * finite_size(b)
            same = (a == b) | ((a.float() - b.float()).abs() <= allowed.float())
        else:
            same = a == b
        wrong += [name] * (not same.all())
    return wrong


def finite_size(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x.abs().float(), 0.0).amax()) if x.numel() else 0.0


def main() -> int:
    """Exit status 1 when anything differs or raises."""
    parser = argparse.ArgumentParser("python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("--family", choices=FAMILIES, help="default: all")
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES, help="row sizes")
    options = parser.parse_args()
    ops, bad, count = set[str](), 0, 0
    for family in [options.family] if options.family else FAMILIES:
        for name, check in checks(options.backend, family, options.vocab):
            count += 1
            try:
                want = check("cpu")
                with forced(options.backend, ops):
                    wrong = differing(check("cuda"), want)
            except Exception:
                wrong = [traceback.format_exc(limit=-2)]
            bad += bool(wrong)
            if wrong:
                print(f"{name}: {', '.join(wrong)}", flush=True)
    print(f"{options.backend}: {bad} of {count} calls differ; ops run: {', '.join(sorted(ops))}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
