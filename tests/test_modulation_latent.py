"""srgen_delta and latent_policy_gradient: gradients, chunks, memory, real logits, errors."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import NoHostData
from tolerance import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reasonkern as rk
from reasonkern.demo import arithmetic
from reasonkern.demo.model import Transformer, seeded
from reasonkern.demo.tokenizer import VOCABULARY, Tokenizer
from reasonkern.demo.windows import encode, random_batch
from reasonkern.modulation import latent

pytestmark = pytest.mark.usefixtures("poisoned_empty")
N, D, V = 37, 9, 53
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
INF, NAN = float("inf"), float("nan")


def operands(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, labels, last hidden state, head: with a dominating logit, labels at both ends."""
    hidden, last = randn(N, D, seed=1), randn(D, seed=2)
    weight = randn(V, D, seed=3)
    hidden[0] *= 30
    labels = torch.arange(N) * 5 % V
    labels[:2] = torch.tensor([0, V - 1])
    return hidden.to(dtype), labels, last.to(dtype), weight.to(dtype)


def literal_loss(
    logits: Tensor, labels: Tensor, last: Tensor, shift: Tensor, mask: Tensor, lam: float, t: float
) -> Tensor:
    ce = F.cross_entropy((logits + shift)[mask], labels[mask])
    p = ((last + shift) / t).softmax(-1)
    return (1 - lam) * ce + lam * torch.special.entr(p).sum()


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 64])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_srgen_gradient_is_autograd(form: str, chunk_rows: int | None) -> None:
    hidden, labels, last, weight = operands()
    mask = torch.arange(N) % 3 > 0
    delta = (0.3 * randn(D, seed=9)).requires_grad_()
    shift = weight @ delta
    literal = literal_loss(hidden @ weight.T, labels, weight @ last, shift, mask, 0.3, 0.7)
    (expected,) = torch.autograd.grad(literal, delta)
    assert expected.abs().max() > 0.1
    prefix = hidden @ weight.T if form == "logits" else (hidden, weight)
    plan = latent._plan(F64, chunk_rows, N)
    share = mask.to(F64) / mask.sum()
    loss = latent._SrgenLoss(prefix, labels, share, weight @ last, weight, 0.7, 0.3, plan)
    value, gradient = loss(shift.detach())
    torch.testing.assert_close(value, literal.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_labels_and_masks_of_any_stride_and_more_rows_than_there_are() -> None:
    hidden, labels, last, weight = operands()
    mask = torch.arange(N) % 3 > 0
    expected = rk.srgen_delta((hidden, weight), labels, last, weight, mask=mask)
    strided, masks = torch.stack((labels, labels), -1)[:, 0], torch.stack((mask, mask), -1)[:, 0]
    for y in (strided, labels.int()):
        out = rk.srgen_delta((hidden, weight), y, last, weight, mask=masks, chunk_rows=1 << 70)
        torch.testing.assert_close(out, expected)
    latents = rk.latent_policy_gradient(hidden, weight, 1.0, chunk_rows=1 << 70)
    torch.testing.assert_close(latents, rk.latent_policy_gradient(hidden, weight, 1.0))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_srgen_in_lower_precision(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 arithmetic on the logits as they are: the cached ones, or the head's rounded ones."""
    monkeypatch.setattr(latent, "HEAD_ROWS", 20)
    hidden, labels, last, weight = operands(dtype)
    z = hidden @ weight.T
    out = rk.srgen_delta(z if form == "logits" else (hidden, weight), labels, last, weight)
    z64, last64, w64 = (x.to(F64) for x in (z, last, weight))
    exact = rk.srgen_delta(z64, labels, last64, w64)
    assert {x.dtype for x in out} == {F32}
    for ours, theirs in zip(out, exact, strict=True):
        torch.testing.assert_close(ours.to(F64), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    hidden, labels, last, weight = operands(dtype)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            srgen = rk.srgen_delta((hidden, weight), labels, last, weight)
            found.append((*srgen, *rk.latent_policy_gradient(hidden, weight, 1.0)))
    for plain, under in zip(*found, strict=True):
        assert plain.dtype == under.dtype and torch.equal(plain, under)


def test_srgen_counts_rows_without_a_finite_loss_as_0() -> None:
    hidden, labels, last, weight = operands()
    logits, shift = hidden @ weight.T, torch.zeros(V, dtype=F64)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[3, 5, 8]] = False

    def loss(share: Tensor) -> tuple[Tensor, Tensor]:
        plan = latent._plan(F64, 7, N)
        return latent._SrgenLoss(logits, labels, share, weight @ last, weight, 1.0, 0.0, plan)(
            shift
        )

    only = loss(kept.to(F64) / N)
    logits[3, 4], logits[5, 6], logits[8, labels[8]] = NAN, INF, -INF
    torch.testing.assert_close(loss(torch.full((N,), 1 / N, dtype=F64)), only)
    labels[8] = 700  # masked: it is not looked at
    torch.testing.assert_close(loss(kept.to(F64) / N), only)
    out = rk.srgen_delta(logits, labels, last, weight, mask=kept)
    assert out.losses.isfinite().all() and out.delta.isfinite().all()


def test_srgen_with_nothing_before_it_lowers_the_entropy() -> None:
    _, _, last, weight = operands()
    nothing = torch.zeros(0, dtype=torch.int64)
    out = rk.srgen_delta(torch.zeros(0, V, dtype=F64), nothing, last, weight, lam=1.0, steps=20)
    first, final = (rk.token_stats(z[None], nothing.new_zeros(1)).entropy for z in
                    (weight @ last, out.logits))  # fmt: skip
    torch.testing.assert_close(out.losses[:1], first)
    assert final < first
    mask = torch.zeros(2, dtype=torch.bool)  # of no position either
    masked = rk.srgen_delta(
        torch.zeros(2, V, dtype=F64), mask.long(), last, weight, mask=mask, lam=1.0, steps=20
    )
    torch.testing.assert_close(masked, out)


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


def test_neither_the_heads_gradient_nor_all_logits_exist() -> None:
    rows, width, vocab = 96, 40, 512
    hidden = randn(rows, width, seed=1).requires_grad_()
    weight = randn(vocab, width, seed=2).requires_grad_()
    labels = torch.arange(rows)
    with Largest() as naive:
        (hidden @ weight.T).log_softmax(-1).amax(-1).sum().backward()
    assert naive.elements == rows * vocab and weight.grad is not None
    weight.grad = hidden.grad = None
    with Largest() as ours:
        rk.latent_policy_gradient(hidden, weight, 1.0, chunk_rows=8).loss.backward()
        rk.srgen_delta((hidden, weight), labels, hidden[0], weight, chunk_rows=8)
    assert ours.elements == 8 * vocab < width * vocab
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 64])
def test_latent_gradient_is_autograd(chunk_rows: int | None) -> None:
    hidden, _, _, weight = operands()
    reward = randn(N, seed=11)
    reward[4] = 0
    a, b = (hidden.clone().requires_grad_() for _ in range(2))
    out = rk.latent_policy_gradient(a, weight, reward, chunk_rows=chunk_rows)
    rows = (b @ weight.T).log_softmax(-1).amax(-1)
    literal = -(reward * rows).sum()
    (3 * out.loss).backward()
    (3 * literal).backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(out.loss, literal, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.logprob, rows.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)
    assert not a.grad[4].any() and not out.logprob.requires_grad
    wanted = weight.requires_grad_(), reward.requires_grad_()
    assert not rk.latent_policy_gradient(hidden, *wanted).loss.requires_grad


def test_latent_second_derivatives_are_refused() -> None:
    """Also where another term of the graph has them: nothing is silently left out."""
    hidden, _, _, weight = operands()
    hidden.requires_grad_()
    loss = rk.latent_policy_gradient(hidden, weight, 1.0).loss + hidden.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_latent_states_may_be_a_view_or_half_or_none_or_broken() -> None:
    hidden, _, _, weight = operands()
    view = hidden.t().contiguous().t()
    assert not view.is_contiguous()
    assert (
        rk.latent_policy_gradient(view, weight, 1.0).loss
        == rk.latent_policy_gradient(hidden, weight, 1.0).loss
    )
    half = hidden.to(BF16).requires_grad_()
    out = rk.latent_policy_gradient(half, weight.to(BF16), torch.tensor(-2.0))
    out.loss.backward()
    assert out.loss.dtype == F32 and half.grad is not None and half.grad.dtype == BF16
    none = rk.latent_policy_gradient(hidden[:0], weight, 1.0)
    assert none.loss == 0 and none.tokens.shape == (0,)
    hidden[2, 3] = NAN
    broken = hidden.requires_grad_()
    out = rk.latent_policy_gradient(broken, weight, 1.0)
    out.loss.backward()
    assert out.loss.isfinite() and out.logprob[2].isnan() and out.logprob.isnan().sum() == 1
    assert broken.grad is not None and not broken.grad[2].any() and broken.grad.isfinite().all()


@pytest.fixture(scope="module")
def trained() -> tuple[Transformer, list[Tensor]]:
    """The demo's transformer after a few steps on its traces, and traces it has not seen."""
    traces = arithmetic.generate(problems=16, samples=4, seed=1)
    tokenizer = Tokenizer.learn(text for trace in traces for text in (trace.prompt, trace.text))
    sequences = encode(traces, tokenizer)
    model = seeded(VOCABULARY, 96, 48, 1, seed=0)
    optimizer, rng = torch.optim.Adam(model.parameters(), 5e-3), Random(0)
    for _ in range(20):
        batch = random_batch(sequences[:48], 4, 96, rng)
        stats = rk.token_stats(model(batch.ids), batch.targets, mask=batch.mask)
        loss = -stats.logprob.sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4.5  # ln 512 is 6.2
    return model, [torch.as_tensor(list(s.ids))[:96] for s in sequences[48:]]


def test_srgen_lowers_its_loss_on_real_logits(trained: tuple[Transformer, list[Tensor]]) -> None:
    """At the most uncertain token of every unseen trace, at each of the three steps."""
    model, texts = trained
    weight = model.head.detach()
    assert len(texts) == 16
    for ids in texts:
        with torch.no_grad():
            hidden = model.hidden(ids[None])[0]
        targets = ids.roll(-1)
        entropy = rk.token_stats(hidden @ weight.T, targets).entropy
        at = int(rk.entropy_forks(entropy[None], torch.arange(len(ids))[None] > 20, 1))
        prefix, labels, last = hidden[:at], targets[:at], hidden[at]
        out = rk.srgen_delta(prefix @ weight.T, labels, last, weight, temperature=0.6)
        shift = weight @ out.delta
        every = torch.ones(at, dtype=torch.bool)
        final = literal_loss(prefix @ weight.T, labels, weight @ last, shift, every, 0.05, 0.6)
        losses = [*out.losses.tolist(), final.item()]
        assert all(a > b for a, b in zip(losses, losses[1:], strict=False)), losses
        assert out.delta.abs().max() < 0.0301


def test_no_value_is_read() -> None:
    """On tensors without values, which nothing can wait for."""
    hidden, labels, last, weight = (x.to("meta") for x in operands(F32))
    for prefix in (torch.empty(N, V, device="meta"), (hidden, weight)):
        out = rk.srgen_delta(prefix, labels, last, weight)
        assert [x.shape for x in out] == [(D,), (V,), (3,)]
    assert rk.latent_policy_gradient(hidden, weight, 1.0).loss.device.type == "meta"
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    assert rk.entropy_forks(torch.empty(2, 5, device="meta"), mask, 3).shape == (2, 3)
    slot = torch.empty(N, dtype=torch.int64, device="meta")
    with NoHostData():
        assert rk.completion_probe(torch.empty(N, V, device="meta"), slot, [1], [2]).shape == (N,)


H, Y, L, W = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4, 2)
Z, SLOT = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
MASK = torch.ones(3, 4, dtype=torch.bool)
IDS = torch.zeros(1, 2, dtype=torch.int64)
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.srgen_delta([1.0], Y, L, W), "prefix: expected a tensor, got list"),
    (lambda: rk.srgen_delta(H, Y, L, W), r"prefix: expected shape \(N, 4\), or \(hidden, weight\)"),
    (lambda: rk.srgen_delta((H,), Y, L, W), r"prefix: expected logits, or .*got 1 tensors"),
    (lambda: rk.srgen_delta((H, H), Y, L, W), r"prefix\[1\]: expected shape weight.shape"),
    (lambda: rk.srgen_delta((L, W), Y, L, W), r"prefix\[0\]: expected shape \(N, D\)"),
    (lambda: rk.srgen_delta(Z.long(), Y, L, W), "prefix: expected dtype"),
    (lambda: rk.srgen_delta(Z.to("meta"), Y, L, W), "prefix: expected the device of weight"),
    (lambda: rk.srgen_delta((H.to("meta"), W.to("meta")), Y, L, W),
     r"prefix\[0\]: expected the device of weight"),
    (lambda: rk.srgen_delta((H, W.double()), Y, L, W), r"prefix\[1\]: expected dtype torch.float"),
    (lambda: rk.srgen_delta(Z, Y.to("meta"), L, W), "labels: expected the device of weight"),
    (lambda: rk.srgen_delta(Z, Y[:2], L, W), r"labels: expected shape \(N,\) = \(3,\)"),
    (lambda: rk.srgen_delta(Z, Y.float(), L, W), "labels: expected dtype torch.int64"),
    (lambda: rk.srgen_delta(Z, Y + 4, L, W), r"labels: expected values in \[0, 4\), got 4"),
    (lambda: rk.srgen_delta(Z, Y, H, W), r"last_hidden: expected shape \(D,\)"),
    (lambda: rk.srgen_delta(Z, Y, L, W.t()), r"weight: expected shape \(V, 2\)"),
    (lambda: rk.srgen_delta(Z, Y, L, W, mask=Y), "mask: expected dtype torch.bool"),
    (lambda: rk.srgen_delta(Z, Y, L, W, mask=MASK[0]), r"mask: expected shape \(N,\) = \(3,\)"),
    (lambda: rk.srgen_delta(Z, Y, L, W, mask=MASK[:, 0].to("meta")),
     "mask: expected the device of weight"),
    (lambda: rk.srgen_delta(Z, Y, L, W, temperature=0), "temperature: expected .* > 0, got 0"),
    (lambda: rk.srgen_delta(Z, Y, L, W, lam=1.5), r"lam: expected a number in \[0, 1\], got 1.5"),
    (lambda: rk.srgen_delta(Z, Y, L, W, steps=0), "steps: expected an integer >= 1, got 0"),
    (lambda: rk.srgen_delta(Z, Y, L, W, lr=-1), "lr: expected a finite number > 0"),
    (lambda: rk.srgen_delta(Z, Y, L, W, chunk_rows=0), "chunk_rows: expected an integer >= 1"),
    (lambda: rk.latent_policy_gradient(L, W, 1.0), r"hidden: expected shape \(N, D\)"),
    (lambda: rk.latent_policy_gradient(H, W[:, :1], 1.0), r"weight: expected shape \(V, 2\)"),
    (lambda: rk.latent_policy_gradient(H, W.double(), 1.0), "weight: expected dtype torch.float32"),
    (lambda: rk.latent_policy_gradient(H, W.to("meta"), 1.0), "weight: expected the device of hid"),
    (lambda: rk.latent_policy_gradient(H[:, :0], W[:, :0], 1.0), r"hidden: .* D >= 1, got \(3, 0"),
    (lambda: rk.latent_policy_gradient(H, W[:0], 1.0), r"weight: .* V >= 1, got \(0, 2\)"),
    (lambda: rk.latent_policy_gradient(H, W, Z[:, 0].to("meta")), "reward: expected the device of"),
    (lambda: rk.latent_policy_gradient(H, W, NAN), "reward: expected a finite number"),
    (lambda: rk.latent_policy_gradient(H, W, L), r"reward: expected shape \(N,\) = \(3,\)"),
    (lambda: rk.latent_policy_gradient(H, W, Z[:, 0] / 0), "reward: expected finite numbers"),
    (lambda: rk.entropy_forks(L, L, 1), r"entropy: expected shape \(B, T\)"),
    (lambda: rk.entropy_forks(Z.long(), MASK, 1), "entropy: expected dtype"),
    (lambda: rk.entropy_forks(Z, MASK[:2], 1), "mask: expected shape entropy.shape"),
    (lambda: rk.entropy_forks(Z, Z, 1), "mask: expected dtype torch.bool"),
    (lambda: rk.entropy_forks(Z, MASK.to("meta"), 1), "mask: expected the device of entropy"),
    (lambda: rk.entropy_forks(Z, MASK, -1), r"n: expected an integer in \[0, 2\^31\), got -1"),
    (lambda: rk.entropy_forks(Z, MASK, 1 << 31), r"n: expected an integer in \[0, 2\^31\), got 21"),
    (lambda: rk.entropy_forks(Z / 0, MASK, 1), r"entropy: expected finite .* the mask, got nan"),
    (lambda: rk.completion_probe(L, SLOT, [0], [1]), r"logits: expected shape \(R, V\)"),
    (lambda: rk.completion_probe(Z, SLOT[:2], [0], [1]), r"slot: expected shape \(R,\)"),
    (lambda: rk.completion_probe(Z, Z[:, 0], [0], [1]), "slot: expected dtype torch.int64"),
    (lambda: rk.completion_probe(Z, SLOT.to("meta"), [0], [1]), "slot: expected the device of log"),
    (lambda: rk.completion_probe(Z, SLOT, IDS.float(), IDS), "ids_a: expected dtype torch.int64"),
    (lambda: rk.completion_probe(Z, SLOT, IDS, IDS.to("meta")), "ids_b: expected the device of l"),
    (lambda: rk.completion_probe(Z, SLOT, IDS[:, :0], IDS), r"ids_a: .* K >= 1, got \(1, 0\)"),
    (lambda: rk.completion_probe(Z, SLOT - 2, [0], [1]), "slot: expected values in .*got -2"),
    (lambda: rk.completion_probe(Z, SLOT + 1, IDS, IDS), r"slot: expected values in \[-1, 1\)"),
    (lambda: rk.completion_probe(Z, SLOT, [], [1]), r"ids_a: expected one id or more"),
    (lambda: rk.completion_probe(Z, SLOT, "yes", "no"), "ids_a: expected a sequence .* got 'yes'"),
    (lambda: rk.completion_probe(Z, SLOT, [0.5], [1]), r"ids_a: expected a sequence .* \[0.5\]"),
    (lambda: rk.completion_probe(Z, SLOT, [True], [0]), r"ids_a: expected a sequence .* \[True\]"),
    (lambda: rk.completion_probe(Z, SLOT, 0, 1), "ids_a: expected a sequence of token ids, got 0"),
    (lambda: rk.completion_probe(Z, SLOT, [0], [1, 1]), "ids_b: expected one id .*each once"),
    (lambda: rk.completion_probe(Z, SLOT, [0], [4]), r"ids_b: expected values in \[0, 4\), got 4"),
    (lambda: rk.completion_probe(Z, SLOT, [-1], [1]), r"ids_a: expected values in \[0, 4\)"),
    (lambda: rk.completion_probe(Z, SLOT, IDS - 2, IDS), r"ids_a: expected values in \[-1, 4\)"),
    (lambda: rk.completion_probe(Z, SLOT, IDS[0], IDS), r"ids_a: expected a sequence of ids, or a"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_probe_at_the_edges() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, 0.0], [NAN, 0.0, 0.0]])
    out = rk.completion_probe(logits, torch.zeros(3, dtype=torch.int32), [0], [1])
    assert out[0] == INF and out[1].isnan() and out[2].isnan()
    many = randn(1, 600, seed=3).to(BF16) + 300  # exponentials overflow without a shift
    slot = torch.zeros(1, dtype=torch.int64)
    out = rk.completion_probe(many, slot, list(range(300)), list(range(300, 600)))
    assert out.dtype == F32 and out.isfinite().all()


def test_forks_at_the_edges() -> None:
    entropy, mask = torch.ones(2, 3), torch.tensor([[True, True, False], [False] * 3])
    assert rk.entropy_forks(entropy, mask, 0).shape == (2, 0)
    assert rk.entropy_forks(entropy, mask, 5).tolist() == [[0, 1, -1, -1, -1], [-1] * 5]
    assert rk.entropy_forks(entropy[:, :0], mask[:, :0], 2).tolist() == [[-1, -1]] * 2
