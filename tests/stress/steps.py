"""A step of every family, small, as one function of a seed: the same bits wherever it runs."""

from __future__ import annotations

from typing import Any

import torch

import reasonkern as rk


def training_step(seed: int) -> list[torch.Tensor]:
    """Statistics, a loss with its gradient, and the same from hidden states."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 40, 16, generator=g)
    head = torch.randn(700, 16, generator=g)
    logits = (hidden @ head.T).requires_grad_()
    targets = torch.randint(700, (3, 40), generator=g)
    stats = rk.token_stats(logits.detach(), targets, temperature=0.8)
    given = {
        "old_logprob": stats.logprob - 0.1,
        "advantage": torch.randn(3, generator=g),
        "weight": rk.token_weights(torch.ones(3, 40)),
        "objective": rk.Objective.dapo(entropy_coef=0.01),
    }
    out = rk.policy_loss(logits, targets, **given)
    (grad,) = torch.autograd.grad(out.loss, logits)
    linear = rk.linear_policy_loss(hidden.requires_grad_(), head, targets, **given)
    (dhidden,) = torch.autograd.grad(linear.loss, hidden)
    return [*stats, out.loss.detach(), grad, linear.loss.detach(), dhidden]


def decoding_step(seed: int) -> list[torch.Tensor]:
    """A table of its own, drafts from it, and what their verification emits."""
    g = torch.Generator().manual_seed(seed)
    table, tree = rk.NgramTable(512, vocab_size=90, orders=(2, 1)), rk.DraftTree.default(12)
    context, seeds = torch.randint(90, (6, 2), generator=g), rk.request_seeds(seed, 6)
    out: list[torch.Tensor] = []
    for position in range(3):
        given: dict[str, Any] = {"temperature": 0.8, "seed": seeds, "position": position}
        draft = table.draft(context, tree, **given)
        logits = torch.randn(6, tree.nodes, 90, generator=g)
        step = rk.verify_tree(logits, draft, tree, top_p=0.9, **given)
        table.update_verified(context, step)
        out += [draft.tokens, step.tokens, rk.sample(logits[:, 0], **given)]
    return out


def controlled_step(seed: int) -> list[torch.Tensor]:
    """A request of every slot under control, for five tokens, to a stop among them."""
    g = torch.Generator().manual_seed(seed)
    state = rk.ModulationState(4, rk.TokenSets.from_ids({"reflect": range(0, 90, 7)}))
    spec = rk.Modulation(
        cyclic=rk.Cyclic(5.0, 9), budget=rk.Budget(3, [8, 9]), deepconf=rk.DeepConf(4.5, 2, eos=2)
    )
    for slot in range(4):
        state.add(slot, spec, [slot])
    slots, out = torch.arange(4), list[torch.Tensor]()
    for position in range(5):
        logits = torch.randn(4, 90, generator=g)
        given: dict[str, Any] = {"temperature": 0.8, "seed": seed, "position": position}
        row = rk.sample_controlled(logits, state, slots, **given)
        every = [x[:, None] for x in (row.token, row.entropy, row.confidence)]
        length = torch.ones(4, dtype=torch.int64)
        rk.commit_(state, slots, every[0], length, entropy=every[1], confidence=every[2])
        out += [*row, rk.modulate_logits_(logits, state, slots)]
    return [*out, state.stopped]


def shaping_step(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    reward, group = torch.randn(64, generator=g), torch.randint(8, (64,), generator=g)
    advantage, returns = rk.shaping.gae(reward.view(4, 16), reward.view(4, 16), lam=0.95)
    features = torch.randn(40, 12, generator=g)
    chosen = rk.scaling.elliptical_select(features, 8)
    return [rk.shaping.group_advantages(reward, group), advantage, returns, chosen]


STEPS = (training_step, decoding_step, controlled_step, shaping_step)


def everything(seed: int) -> list[torch.Tensor]:
    return [x for step in STEPS for x in step(seed)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
