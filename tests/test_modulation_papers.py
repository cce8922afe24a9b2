"""modulation: each paper's function against a literal float64 implementation of its formula."""

from __future__ import annotations

import math

import torch
from tolerance import randn
from torch import Tensor

import reasonkern as rk

N, D, V = 23, 12, 40
F64 = torch.float64


def srgen_loss(
    hidden: Tensor, labels: list[int], last: Tensor, weight: Tensor, delta: Tensor,
    temperature: float, lam: float,
) -> Tensor:  # fmt: skip
    """(1 - λ) CE + λ H, position by position, as the paper writes it."""
    terms = [
        -((h + delta) @ weight.T).log_softmax(-1)[y] for h, y in zip(hidden, labels, strict=True)
    ]
    logp = ((last + delta) @ weight.T / temperature).log_softmax(-1)
    return (1 - lam) * torch.stack(terms).mean() - lam * (logp.exp() * logp).sum()


def adamw(gradients: list[Tensor], lr: float, eps: float, decay: float) -> Tensor:
    """Where AdamW stands after these gradients, from 0 (Loshchilov & Hutter 2019, β .9, .999)."""
    x = m = v = torch.zeros_like(gradients[0])
    for t, g in enumerate(gradients, 1):
        x = x - lr * decay * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    return x


def test_srgen() -> None:
    """SRGen (2510.02919): three AdamW steps on the loss above; both forms of the prefix."""
    hidden, last = randn(N, D, seed=1), randn(D, seed=2)
    weight = randn(V, D, seed=3)
    labels = torch.arange(N) * 7 % V
    delta, gradients, losses = torch.zeros(D, dtype=F64), [], []
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        loss = srgen_loss(hidden, labels.tolist(), last, weight, leaf, 0.6, 0.05)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        losses.append(loss.detach())
        delta = adamw(gradients, 0.01, 1e-5, 1e-8)
    assert losses[0] > losses[1] > losses[2]
    for prefix in (hidden @ weight.T, (hidden, weight)):
        out = rk.srgen_delta(prefix, labels, last, weight, temperature=0.6)
        torch.testing.assert_close(out.delta, delta, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.losses, torch.stack(losses), rtol=0, atol=1e-10)
        torch.testing.assert_close(out.logits, weight @ (last + delta), rtol=0, atol=1e-10)


def test_latentseek() -> None:
    """LatentSeek (2505.13308): -R Σ log p(argmax), and Adam's path over three rewards."""
    weight = randn(V, D, seed=3)
    states = [randn(N, D, seed=4).requires_grad_() for _ in range(2)]
    optimizers = [torch.optim.Adam([state], lr=0.03) for state in states]
    for reward in (-1.0, -0.4, 0.7):
        out = rk.latent_policy_gradient(states[0], weight, reward)
        rows = (states[1] @ weight.T).log_softmax(-1)
        labels = [max(range(V), key=row.__getitem__) for row in rows.tolist()]
        literal = -reward * sum(row[y] for row, y in zip(rows, labels, strict=True))
        assert out.tokens.tolist() == labels
        torch.testing.assert_close(out.loss, literal, rtol=0, atol=1e-10)
        for optimizer, loss in zip(optimizers, (out.loss, literal), strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert states[1].grad is not None and states[1].grad.abs().max() > 0.1
        torch.testing.assert_close(states[0].grad, states[1].grad, rtol=0, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()


REFLECT = (3, 8, 9, 21, 30)
SETS = rk.TokenSets.from_ids({"reflect": REFLECT})
THINK_END = 2


def run(spec: rk.Modulation, tokens: list[int], temperature: float | None = None) -> list[Tensor]:
    """The modulated logits of every step of a text; those of step t are `step(t)` before."""
    state = rk.ModulationState(1, SETS)
    state.add(0, spec, [])
    slot, rows = torch.zeros(1, dtype=torch.int64), []
    for t, token in enumerate(tokens):
        z = step(t)[None]
        rk.modulate_logits_(z, state, slot, temperature=temperature)
        rows.append(z[0])
        rk.commit_(state, slot, torch.tensor([[token]]), torch.ones(1, dtype=torch.int64))
    return rows


def step(t: int) -> Tensor:
    return randn(V, seed=100 + t)


def test_published_settings() -> None:
    """Of the TIP paper, of DeepConf's groups, of SRGen's trigger."""
    assert rk.TIP() == rk.TIP(3.0, 600) and rk.DeepConf(0.0) == rk.DeepConf(0.0, 2048, None)
    assert rk.EntropyTrigger() == rk.EntropyTrigger(25, 4.0, 1.8, 0.5, 3.0)


def test_cyclicreflex() -> None:
    """CyclicReflex (2506.11077): paper and code, published A and C, until the end of thinking."""
    text = [7] * 250 + [THINK_END] + [7] * 20
    for amplitude, period, shift in ((5.0, 120, 0.0), (3.0, 100, 0.25), (-2.0, 75.5, 0.5)):
        windows = [(0, 60), (80, 8192)] if shift else None
        spec = rk.Modulation(
            cyclic=rk.Cyclic(amplitude, period, shift, windows), think_end=THINK_END
        )
        for t, z in enumerate(run(spec, text)):
            u = ((t + shift * period) % period) / period
            if u <= 0.25:  # the code
                delta = amplitude * u / 0.25
            elif u <= 0.75:
                delta = amplitude - 2 * amplitude * (u - 0.25) / 0.5
            else:
                delta = -amplitude + amplitude * (u - 0.75) / 0.25
            quarter = ((t + shift * period) - period / 4) % period  # the paper
            assert abs(delta - (amplitude * abs(4 * quarter / period - 2) - amplitude)) < 1e-12
            if t > 250 or (windows and 60 <= t < 80):
                delta = 0.0
            expected = step(t)
            expected[list(REFLECT)] += delta
            torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)


def test_tip() -> None:
    """TIP (2501.18585): -α on switch tokens for β tokens after the thought began."""
    text = [7, 3, 7, 7, 7, 7, 21, 9, 7, 7, 7, 7, 7, THINK_END, 7]
    began = 0
    rows = run(rk.Modulation(tip=rk.TIP(3.0, 4), think_end=THINK_END), text)
    for t, (token, z) in enumerate(zip(text, rows, strict=True)):
        expected = step(t)
        if t < began + 4 and THINK_END not in text[:t]:
            expected[list(REFLECT)] -= 3.0
        assert torch.equal(z, expected), t
        if token in REFLECT:
            began = t + 1


def test_budget_forcing() -> None:
    """s1 (2501.19393): the phrase after the budget; before a minimum the end becomes Wait."""
    spec = rk.Modulation(budget=rk.Budget(5, [11, THINK_END]), think_end=THINK_END)
    rows = run(spec, [7, 7, 7, 7, 7, 11, THINK_END, 7])
    forced = [int(z.argmax()) if z.max() > 2e4 else None for z in rows]
    assert forced == [None] * 5 + [11, THINK_END, None]
    minimum = rk.Modulation(min_think=rk.MinThink(3, 0, [21]), think_end=THINK_END)
    for t, z in enumerate(run(minimum, [7] * 6, temperature=0.75)):
        p = (step(t) / 0.75).softmax(-1)  # the law of sampling, then replacing an end by Wait
        if t < 3:
            p[21], p[THINK_END] = p[21] + p[THINK_END], 0.0
        assert ((z / 0.75).softmax(-1) - p).abs().sum() / 2 < 1e-12


def test_nowait() -> None:
    """NoWait (2506.08343): no reflection token while the model thinks."""
    rows = run(rk.Modulation(ban=rk.Ban(), think_end=THINK_END), [7, 7, THINK_END, 7])
    for t, z in enumerate(rows):
        expected = step(t)
        if t < 3:
            expected[list(REFLECT)] = -math.inf
        assert torch.equal(z, expected)


def test_ettrl_forks() -> None:
    """ETMR of ETTRL (2508.11356): the N largest entropies of the response, earlier ones first."""
    entropy = (randn(50, 31, seed=5) * 4).round() / 4  # quarters: many ties
    mask = torch.rand(50, 31, generator=torch.Generator().manual_seed(6)) < 0.7
    mask[0], mask[1, :] = False, torch.arange(31) == 30
    entropy[~mask] = torch.nan  # prompts and padding are not looked at
    forks = rk.entropy_forks(entropy, mask, 5)
    assert len(entropy[2][mask[2]].unique()) < mask[2].sum()
    for row, kept, found in zip(entropy.tolist(), mask.tolist(), forks.tolist(), strict=True):
        order = sorted((t for t in range(31) if kept[t]), key=lambda t: (-row[t], t))
        assert found == (order + [-1] * 5)[:5]


def test_solve_detect_verify_probe() -> None:
    """Solve-Detect-Verify (2505.11966): is the solution complete, yes or no, by log-probability."""
    logits = randn(6, V, seed=8) * 3
    slot = torch.tensor([2, 0, -1, 1, 1, 0])
    yes, no = [[1, 5, 9], [2, -1, -1], [30, 31, -1]], [[0, 3], [4, -1], [V - 1, 7]]
    out = rk.completion_probe(logits, slot, torch.tensor(yes), torch.tensor(no))
    for row, s, found in zip(logits, slot.tolist(), out.tolist(), strict=True):
        p = row.softmax(-1).tolist()
        if s < 0:
            assert math.isnan(found)
            continue
        a, b = (sum(p[i] for i in ids[s] if i >= 0) for ids in (yes, no))
        assert abs(found - (math.log(a) - math.log(b))) < 1e-12
    shared = rk.completion_probe(logits, slot.clamp_min(0), [1, 5, 9], [0, 3])
    first = rk.completion_probe(logits, slot * 0, torch.tensor(yes), torch.tensor(no))
    assert torch.equal(shared, first)
