"""Backward of the public functions: both paths, in place, and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from policy_loss_literal import batch, gradient, make_batch
from policy_loss_paths import FORMS, PATHS, Calls, head, paths
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, policy_loss, token_stats


@paths()
@pytest.mark.parametrize("form", FORMS)
def test_in_place_equals_functional(form: str, objective: Any, dtype: torch.dtype) -> None:
    b = batch(form)
    grads = [gradient(*head(b, dtype, inplace, objective)) for inplace in (False, True)]
    assert grads[0].dtype == dtype and grads[0].any() and torch.equal(*grads)


def test_in_place_over_no_rows_of_one_column() -> None:
    """torch gives them a stride of 0, as it gives rows that share memory."""
    x = torch.zeros(2, 0, 1).requires_grad_() * 1
    assert x.stride(0) == 0
    rows = torch.zeros(2, 0)
    out = policy_loss(
        x, rows.long(), advantage=rows, weight=rows, objective=Objective.ppo(), inplace_grad=True
    )
    assert gradient(out.loss, x).shape == x.shape


@paths()
def test_in_place_gradient_is_written_over_the_logits(objective: Any, dtype: torch.dtype) -> None:
    b = make_batch(torch.float32)
    logits = b.logits.to(dtype).clone().requires_grad_() * 1
    out = policy_loss(logits, b.targets, objective=objective, inplace_grad=True, **b.given())
    out.loss.backward()
    assert torch.equal(logits.detach(), gradient(*head(b, dtype, False, objective)))


@paths()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "constant logits"])
def test_no_gradient_is_formed_unless_it_is_needed(
    how: str, inplace: bool, objective: Any, dtype: torch.dtype
) -> None:
    b = make_batch(torch.float32)
    x = b.logits.to(dtype).clone().requires_grad_(how != "constant logits")
    before = x.detach().clone()
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(how, torch.enable_grad)(), Calls() as calls:
        out = policy_loss(x, b.targets, objective=objective, inplace_grad=inplace, **b.given())
    assert set(calls.names) <= {"policy_loss", "token_stats"} and len(calls.names) == 1
    assert all("reasonkern" not in name for name in calls.at_least(x.numel() * x.element_size()))
    assert not out.loss.requires_grad and torch.equal(x.detach(), before)


@paths()
def test_a_gradient_is_formed_once(objective: Any, dtype: torch.dtype) -> None:
    b = make_batch(torch.float32)
    x = b.logits.to(dtype).clone().requires_grad_()
    with Calls() as calls:
        policy_loss(x, b.targets, objective=objective, **b.given()).loss.backward()
    fused = objective is PATHS[0][1] and dtype != torch.float16
    two_phase = ["token_stats", "token_stats_backward"]
    assert calls.names == (["policy_loss", "scale_rows_"] if fused else two_phase)


@paths()
def test_in_place_over_logits_that_another_op_saved_raises(
    objective: Any, dtype: torch.dtype
) -> None:
    b = make_batch(torch.float32)
    x = b.logits.to(dtype).clone().requires_grad_()
    out = policy_loss(x.tanh(), b.targets, objective=objective, inplace_grad=True, **b.given())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@paths()
def test_in_place_logits_changed_before_backward_raises(objective: Any, dtype: torch.dtype) -> None:
    b = make_batch(torch.float32)
    logits = b.logits.to(dtype).clone().requires_grad_() * 1
    out = policy_loss(logits, b.targets, objective=objective, inplace_grad=True, **b.given())
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize(
    ("which", "inplace"),
    [("fused", False), ("fused", True), ("two-phase half", True), ("sequence", True)],
)
def test_second_backward_raises(which: str, inplace: bool) -> None:
    _, objective, dtype = next(p for p in PATHS if p[0] == which)
    loss, x = head(make_batch(), dtype, inplace, objective)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match="differentiated before.*call policy_loss again"):
        loss.backward()
    assert torch.equal(x.grad, first)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None: ...


@pytest.mark.parametrize("inplace", [False, True])
@paths("fused", "two-phase half", "sequence")
def test_backward_without_an_incoming_gradient(
    objective: Any, dtype: torch.dtype, inplace: bool
) -> None:
    loss, x = head(make_batch(), dtype, inplace, objective)
    NoGradient.apply(loss).backward()
    assert x.grad is None


@paths("two-phase half", "sequence", "custom")
def test_second_backward_of_the_functional_two_phase_form(
    objective: Any, dtype: torch.dtype
) -> None:
    """It keeps nothing that the first one changed, so it gives the same gradient again."""
    loss, x = head(make_batch(), dtype, False, objective)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("inplace", [False, True])
@paths()
def test_second_order_gradients_are_refused(
    objective: Any, dtype: torch.dtype, inplace: bool
) -> None:
    """Also where another term of the graph has them: nothing is silently left out."""
    loss, x = head(make_batch(), dtype, inplace, objective)
    (grad,) = torch.autograd.grad(loss + x.float().pow(3).sum(), x, create_graph=True)
    assert torch.isfinite(grad).any()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.square().sum().backward()


def test_second_order_gradients_of_token_stats_are_refused() -> None:
    b = make_batch(torch.float32)
    x = b.logits.clone().requires_grad_()
    stats = token_stats(x, b.targets.clamp_min(0))
    (grad,) = torch.autograd.grad(
        stats.logprob.square().sum() + x.pow(3).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", ["grad", "jvp", "dual", "dual of a leaf"])
@paths()
def test_forward_mode_and_torch_func_are_refused(
    objective: Any, dtype: torch.dtype, how: str, inplace: bool
) -> None:
    """They would say that the tangent is 0, or absent."""
    b = make_batch(torch.float32)
    x, ones = b.logits.to(dtype), torch.ones_like(b.logits, dtype=dtype)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            x, b.targets, objective=objective, inplace_grad=inplace, **b.given()
        ).loss

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives and none by torch."):
        if how == "grad":
            torch.func.grad(loss)(x)
        elif how == "jvp":
            torch.func.jvp(loss, (x,), (ones,))
        else:
            with forward_ad.dual_level():
                loss(forward_ad.make_dual(x.clone().requires_grad_("leaf" in how), ones))


def test_what_has_no_tangent_passes_a_dual_level() -> None:
    b = make_batch(torch.float32)
    plain = gradient(*head(b, torch.float32, False, Objective.ppo()))
    with forward_ad.dual_level():
        loss, x = head(b, torch.float32, False, Objective.ppo())
    assert torch.equal(gradient(loss, x), plain)


def test_create_graph_alone_gives_the_gradient() -> None:
    b = make_batch(torch.float32)
    plain = gradient(*head(b, torch.float32, False, Objective.ppo()))
    loss, x = head(b, torch.float32, False, Objective.ppo())
    assert torch.equal(torch.autograd.grad(loss, x, create_graph=True)[0], plain)


@pytest.mark.parametrize("inplace", [False, True])
@paths()
@pytest.mark.parametrize("factor", [3.0, 1 / 7, 65536.0, -0.5, 0.0])
def test_incoming_gradient_scales_the_gradient(
    factor: float, objective: Any, dtype: torch.dtype, inplace: bool
) -> None:
    b = make_batch()
    b = b.map(lambda x: x if x is not b.weight else x / 256)  # 65536 must stay below float16's end
    grad = gradient(*head(b, torch.float64, False, objective))
    loss, x = head(b, dtype, inplace, objective)
    scaled = gradient(loss * factor, x)
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert_close(scaled.double(), factor * grad, rtol=tolerance, atol=tolerance * abs(factor) / 99)


@pytest.mark.parametrize("inplace", [False, True])
@paths()
def test_expanded_incoming_gradient(objective: Any, dtype: torch.dtype, inplace: bool) -> None:
    loss, x = head(make_batch(), dtype, inplace, objective)
    mean = gradient(loss.expand(5).sum() / 5, x)
    assert_close(mean, gradient(*head(make_batch(), dtype, inplace, objective)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_scale_cancels_the_scalers_factor(dtype: torch.dtype, inplace: bool) -> None:
    scale = torch.tensor(65536.0)
    b = make_batch(torch.float32)
    b = b.map(lambda x: x if x is not b.weight else x / 65536)
    exact = 65536 * gradient(*head(b, torch.float64, False, Objective.ppo()))
    loss, x = head(b, dtype, inplace, Objective.ppo(), loss_scale=scale)
    found = gradient(loss * scale, x)
    size = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    assert_close(found.double(), exact, rtol=2 * size, atol=size / 10)
    out = policy_loss(x, b.targets, objective=Objective.ppo(), loss_scale=scale, **b.given())
    assert_close(out.loss.double(), loss.detach().double())  # the loss itself is not scaled


@pytest.mark.parametrize("how", ["two-phase", "loss_scale", "in place", "in place loss_scale"])
def test_float16_gradient_survives_with_grad_scaler(how: str) -> None:
    """Formed before the factor 65536, a float16 gradient loses most of its mass at large V."""
    g = torch.Generator().manual_seed(0)
    rows, vocab = 8, 32768
    x = (2 * torch.randn(rows, vocab, generator=g)).half()
    y = torch.randint(vocab, (rows,), generator=g)
    given = {
        "advantage": torch.linspace(-1, 1, rows),
        "weight": torch.full((rows,), 1 / 65536),
        "objective": Objective.ppo(),
    }
    exact = x.double().requires_grad_()
    policy_loss(exact, y, **given).loss.backward()
    early = exact.grad.half().double()
    assert early.abs().sum() < 0.7 * exact.grad.abs().sum()  # hard enough to notice
    leaf = x.clone().requires_grad_()
    factor = torch.tensor(65536.0)
    options = {"loss_scale": factor} if "loss_scale" in how else {}
    out = policy_loss(leaf * 1, y, inplace_grad="in place" in how, **options, **given)
    (out.loss * factor).backward()
    found = leaf.grad.double() / 65536
    assert (found - exact.grad).abs().sum() < 1e-3 * exact.grad.abs().sum()


def test_grad_scaler_of_torch() -> None:
    """The real scaler's scale() and unscale_ around both float16 paths."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    b = make_batch(torch.float32)
    exact = gradient(*head(b, torch.float64, False, Objective.ppo()))
    for with_scale in (False, True):
        x = nn.Parameter(b.logits.clone())
        optimizer = torch.optim.SGD([x], lr=1.0)
        scaler.scale(torch.zeros(()))  # makes the scale tensor
        options = {"loss_scale": scaler._scale} if with_scale else {}
        out = policy_loss(x.half(), b.targets, objective=Objective.ppo(), **options, **b.given())
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        assert_close(x.grad.double(), exact, rtol=2e-3, atol=1e-5)
        scaler.update()


@pytest.mark.parametrize(
    ("mode", "normaliser"),
    [
        ("token-mean", {"num_tokens": 11}),
        ("seq-mean-token-mean", {"num_sequences": 8}),
        ("seq-mean-token-sum", {"num_sequences": 8}),
        ("constant", {"num_sequences": 8}),
    ],
)
def test_two_ranks_of_two_micro_batches_equal_one_batch(mode: str, normaliser: Any) -> None:
    """Weights with the global normaliser and data_parallel_size; ranks' gradients are averaged."""
    g = torch.Generator().manual_seed(0)
    hidden, y = torch.randn(8, 5, 4, generator=g), torch.randint(11, (8, 5), generator=g)
    lengths = torch.tensor([3, 1, 0, 2, 2, 3, 0, 0])  # the last micro-batch trains nothing
    mask = torch.arange(5) < lengths[:, None]
    advantage = torch.randn(8, generator=g)
    lm_head = torch.randn(11, 4, generator=g, requires_grad=True)

    def backward(rows: slice, **options: Any) -> None:
        w = rk.token_weights(mask[rows], mode, **options)
        given = {"advantage": advantage[rows], "weight": w, "objective": Objective.ppo()}
        logits = hidden[rows] @ lm_head.T
        policy_loss(logits, y[rows], inplace_grad=True, **given).loss.backward()

    backward(slice(0, 8))
    whole, lm_head.grad = lm_head.grad, None
    for start in (0, 2, 4, 6):
        backward(slice(start, start + 2), data_parallel_size=2, **normaliser)
    assert whole.any()
    assert_close(lm_head.grad / 2, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_used_twice(inplace: bool) -> None:
    """A second loss on the same hidden states adds its gradient."""
    b = make_batch(torch.float32)
    x = b.leaf()
    loss = policy_loss(
        x * 1, b.targets, objective=Objective.ppo(), inplace_grad=inplace, **b.given()
    ).loss
    (loss + x.square().sum()).backward()
    assert_close(x.grad, gradient(*head(b, torch.float32, False, Objective.ppo())) + 2 * b.logits)


@pytest.mark.parametrize("which", ["fused", "sequence"])
def test_what_saved_the_gradient_in_the_logits_place_sees_it_change(which: str) -> None:
    _, objective, dtype = next(p for p in PATHS if p[0] == which)
    b = make_batch(torch.float32)
    x = b.logits.clone().requires_grad_()
    logits = x * 1
    before = logits.detach().requires_grad_().square().sum()
    loss = policy_loss(logits, b.targets, objective=objective, inplace_grad=True, **b.given()).loss
    changed = "modified by an inplace operation"
    if which == "fused":  # the gradient is there already
        with pytest.raises(RuntimeError, match=changed):
            before.backward()
    after = logits.detach().requires_grad_().square().sum()
    (2 * loss).backward()
    with pytest.raises(RuntimeError, match=changed):
        after.backward()


# ---- memory


@paths()
def test_in_place_allocates_no_second_logits(objective: Any, dtype: torch.dtype) -> None:
    """Through an lm_head: the only (N, V) tensor is the logits themselves."""
    torch.manual_seed(0)
    rows, dim, vocab = 64, 8, 512
    hidden = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    lm_head = nn.Linear(dim, vocab, bias=False, dtype=dtype)
    y = torch.randint(vocab, (rows,))
    w = torch.full((rows,), 1 / rows)
    w[-1] = 0
    given = {"advantage": torch.randn(rows), "weight": w, "objective": objective}
    if isinstance(objective, Objective) and objective.level == "sequence":
        given |= {"segments": torch.tensor([0, rows]), "advantage": torch.ones(1)}
    large: dict[bool, list[str]] = {}
    for inplace in (True, False):
        with Calls() as calls:
            policy_loss(lm_head(hidden), y, inplace_grad=inplace, **given).loss.backward()
        large[inplace] = calls.at_least(rows * vocab * hidden.element_size())
    # The other one is the weight's gradient, which has dim * vocab elements at most.
    assert [n.split(".")[0] for n in large[True]] == ["aten"] and "mm" in large[True][0]
    assert len(large[False]) == 2


PEAK = """
import re, torch, reasonkern as rk
torch.set_num_threads(1)
rows, dim, vocab = 128, 16, 65536
hidden = torch.randn(rows, dim, requires_grad=True)
head = torch.randn(vocab, dim, requires_grad=True)
y = torch.randint(vocab, (rows,))
given = dict(advantage=torch.randn(rows), weight=torch.full((rows,), 1 / rows),
             objective=rk.Objective.ppo(entropy_coef=0.01), old_logprob=torch.full((rows,), -11.0))
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def peak(inplace):
    def step():
        head.grad = hidden.grad = None
        rk.policy_loss(hidden @ head.T, y, inplace_grad=inplace, **given).loss.backward()
    step()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / (rows * vocab * 4)
print(peak(True), peak(False))
"""


@pytest.mark.skipif(
    not next(r["exists"] for r in rk.info()["ops"]["policy_loss"] if r["backend"] == "cpu"),
    reason="the reference needs many buffers; library _C is not built",
)
def test_peak_memory_through_an_lm_head() -> None:
    """In units of the logits: themselves in place, once more in the functional form."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120
    )
    in_place, functional = map(float, found.stdout.split())
    assert in_place < 1.2 and 1.8 < functional < 2.2


# ---- modes of torch


@pytest.mark.parametrize("inplace", [False, True])
@paths()
def test_autocast_changes_nothing(objective: Any, dtype: torch.dtype, inplace: bool) -> None:
    b = make_batch()
    loss, x = head(b, dtype, inplace, objective)
    with torch.autocast("cpu", torch.bfloat16):
        cast_loss, cast_x = head(b, dtype, inplace, objective)
        inside = gradient(cast_loss, cast_x)
    assert torch.equal(cast_loss, loss) and torch.equal(inside, gradient(loss, x))


@paths()
@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_equals_eager(form: str, objective: Any, dtype: torch.dtype) -> None:
    b = batch(form).to(torch.float32)
    x = b.logits.to(dtype)
    expected = policy_loss(x, b.targets, objective=objective, **b.given())
    with torch.inference_mode():
        out = policy_loss(x.clone(), b.targets, objective=objective, **b.given())
        values = out.metrics.compute()
        stats_in = token_stats(x.clone(), b.targets, mask=b.mask)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logprob, expected.logprob)
    assert_close(values, expected.metrics.compute())
    assert torch.equal(stats_in.logprob[b.mask], expected.logprob[b.mask])
