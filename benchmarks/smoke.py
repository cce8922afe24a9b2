"""Every op of one GPU backend on a few small inputs, compared with the reference.

What `gpu.sh sanitize` runs under compute-sanitizer, where a kernel is a hundred times slower:
`python -m benchmarks.smoke [cuda|triton]`.
"""

from __future__ import annotations

import sys

import torch

import reasonkern as rk
from benchmarks.peers.ours import forced

# A row smaller than a warp, one with a ragged tail, one that takes a whole cluster.
VOCABULARIES = (7, 1021, 151_936)
OBJECTIVES = (
    rk.Objective.dapo(0.8, 1.28, entropy_coef=0.01),
    rk.Objective.gspo(0.9, 1.1, entropy_coef=0.01),
)


def gradient(
    logits: torch.Tensor, targets: torch.Tensor, objective: rk.Objective, inplace: bool
) -> torch.Tensor:
    """The gradient of the logits, on the device they are on."""
    leaf = logits.clone().requires_grad_()
    rows = torch.full(targets.shape, 1.0, device=logits.device)
    out = rk.policy_loss(
        leaf,
        targets,
        old_logprob=-2.0 * rows,
        advantage=rows[:, 0],
        weight=rows / rows.numel(),
        objective=objective,
        inplace_grad=inplace,
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return grad


def main(backend: str) -> int:
    """Exit status 1 when anything differs."""
    generator, ops = torch.Generator().manual_seed(0), set[str]()
    wrong = 0
    for vocab in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(2, 3, vocab, generator=generator).mul(3).to(dtype)
            targets = torch.randint(vocab, (2, 3), generator=generator)
            on_gpu = logits.cuda(), targets.cuda()
            for objective in OBJECTIVES:
                want = gradient(logits, targets, objective, False).float()
                for inplace in (False, True):
                    with forced(backend, ops):
                        got = gradient(*on_gpu, objective, inplace).float().cpu()
                    allowed = 2 * torch.finfo(dtype).eps * want.abs() + 1e-5 * want.abs().amax()
                    wrong += int(((got - want).abs() > allowed).any())
    print(f"{backend}: {wrong} mismatches; ops run: {', '.join(sorted(ops))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main((sys.argv[1:] or ["cuda"])[0]))
