"""linear_*: error messages, torch.compile, the operator contract, memory, and FSDP2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from contract import run_contract
from policy_loss_linear_cases import (
    BF16,
    F32,
    F64,
    OBJECTIVES,
    gradients,
    linear,
    operands,
    problem,
)
from policy_loss_literal import LENGTHS, Batch, T, V, make_batch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, linear_policy_loss, linear_token_stats

B = len(LENGTHS)
F = torch.zeros(B, T)
IDS = torch.zeros(B, T, dtype=torch.int64)
slow = pytest.mark.slow
DTYPES = "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64"


# ---- errors


class DTensorLike(Tensor):
    """Has what tells a DTensor."""

    def full_tensor(self) -> None: ...


def call(**changes: Any) -> Any:
    b = make_batch(F32)
    hidden, weight, bias = operands(b, F32)
    given: dict[str, Any] = {"hidden": hidden, "lm_head_weight": weight, "targets": b.targets,
             "bias": bias, "objective": Objective.ppo()} | b.given() | changes  # fmt: skip
    names = ("hidden", "lm_head_weight", "targets")
    return linear_policy_loss(*[given.pop(name) for name in names], **given)


W = torch.zeros(V, V)
LOSS: list[tuple[dict[str, Any], str]] = [
    ({"hidden": [1.0]}, "hidden: expected a tensor, got list"),
    ({"lm_head_weight": None}, "lm_head_weight: expected a tensor, got NoneType"),
    ({"targets": None}, "targets: expected a tensor, got NoneType"),
    ({"bias": 0.0}, "bias: expected a tensor, got float"),
    ({"hidden": IDS[..., None]}, f"hidden: expected dtype {DTYPES}, got torch.int64"),
    ({"hidden": F[0]}, "hidden: expected shape (N, D) or (B, T, D), D >= 1, got (6,)"),
    (
        {"hidden": F[..., None][..., :0]},
        "hidden: expected shape (N, D) or (B, T, D), D >= 1, got (4, 6, 0)",
    ),
    (
        {"lm_head_weight": W[:, 1:]},
        "lm_head_weight: expected shape (V, 13) with V >= 1, got (13, 12)",
    ),
    ({"lm_head_weight": W[:0]}, "lm_head_weight: expected shape (V, 13) with V >= 1, got (0, 13)"),
    ({"lm_head_weight": W[0]}, "lm_head_weight: expected shape (V, 13) with V >= 1, got (13,)"),
    (
        {"lm_head_weight": W.bfloat16()},
        "lm_head_weight: expected the dtype of hidden, torch.float32, got torch.bfloat16",
    ),
    ({"bias": W[0].double()}, "bias: expected the dtype of hidden, torch.float32, got "
     "torch.float64"),
    ({"bias": W[0, 1:]}, "bias: expected shape (V,) = (13,), got (12,)"),
    (
        {"lm_head_weight": W.to("meta")},
        "lm_head_weight: expected the device of hidden, cpu, got meta",
    ),
    (
        {"lm_head_weight": W.as_subclass(DTensorLike)},
        "lm_head_weight: expected a plain tensor (inside the forward of its module), got a DTensor",
    ),
    ({"targets": IDS[:, 1:]}, "targets: expected shape hidden.shape[:-1] = (4, 6), got (4, 5)"),
    ({"targets": F}, "targets: expected dtype torch.int64 or torch.int32, got torch.float32"),
    (
        {"targets": IDS + V},
        "targets: expected values in [0, 13) in rows with a weight (of a mask such as targets != "
        "-100), got 13 at (0, 0)",
    ),
    ({"weight": F.to("meta")}, "weight: expected the device of hidden, cpu, got meta"),
    ({"advantage": 1.0}, "advantage: expected a tensor, got float"),
    (
        {"objective": "ppo"},
        "objective: expected an Objective, such as Objective.dapo(), or a function, got 'ppo'",
    ),
    (
        {"objective": Objective.ppo(kl=("k3", 0.1))},
        "ref_logprob: expected a tensor for objective ppo with kl, got None",
    ),
    (
        {"objective": Objective.gspo(), "advantage": F},
        "advantage: expected one value per sequence, (4,), for objective gspo, got shape (4, 6)",
    ),
    ({"loss_scale": F}, "loss_scale: expected a 0-dim tensor, got shape (4, 6)"),
    ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
    ({"chunk_rows": 0}, "chunk_rows: expected an integer >= 1 or None, got 0"),
    ({"chunk_rows": 64.0}, "chunk_rows: expected an integer >= 1 or None, got 64.0"),
    ({"chunk_rows": True}, "chunk_rows: expected an integer >= 1 or None, got True"),
    (
        {"num_active": -1, "compact": True},
        "num_active: expected an integer >= 0 or None, got -1",
    ),
    ({"compact": "no"}, "compact: expected False or True, got 'no'"),
    ({"num_active": 3}, "num_active: expected None without compact=True, got 3"),
    (
        {"num_active": 3, "compact": True},
        "num_active: expected at least the 8 rows that take part, got 3",
    ),
]  # fmt: skip
STATS: list[tuple[dict[str, Any], str]] = [
    ({"weight": W[:, 1:]}, "weight: expected shape (V, 13) with V >= 1, got (13, 12)"),
    ({"weight": W.double()}, "weight: expected the dtype of hidden, torch.float32, got "
     "torch.float64"),
    ({"mask": F + 2}, "mask: expected bool or 0/1 values, got 2.0 at (0, 0)"),
    ({"mask": F.bool().to("meta")}, "mask: expected the device of hidden, cpu, got meta"),
    (
        {"targets": IDS - 1},
        "targets: expected values in [0, 13) in rows that mask= keeps (such as targets != -100), "
        "got -1 at (0, 0)",
    ),
    ({"chunk_rows": -5}, "chunk_rows: expected an integer >= 1 or None, got -5"),
    ({"softcap": 0.0}, "softcap: expected a finite number > 0, got 0.0"),
    ({"parallel": 2}, "parallel: expected a Parallel or None, got int"),
]  # fmt: skip


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(("changes", "message"), LOSS, ids=[m[:50] for _, m in LOSS])
def test_error_of_linear_policy_loss(changes: dict[str, Any], message: str) -> None:
    assert torch.isfinite(call().loss)
    with raises(message):
        call(**changes)


@pytest.mark.parametrize(("changes", "message"), STATS, ids=[m[:50] for _, m in STATS])
def test_error_of_linear_token_stats(changes: dict[str, Any], message: str) -> None:
    given = {"hidden": torch.zeros(B, T, V), "weight": W, "targets": IDS} | changes
    with raises(message):
        linear_token_stats(*[given.pop(n) for n in ("hidden", "weight", "targets")], **given)


def test_mixed_dtypes_are_an_error_only_outside_autocast() -> None:
    mixed = {"lm_head_weight": W.bfloat16()}
    with torch.autocast("cpu", BF16):
        assert torch.isfinite(call(**mixed).loss)
        with raises("lm_head_weight: expected the dtype of hidden, torch.float32, got "
                    "torch.float64"):  # fmt: skip
            call(lm_head_weight=W.double())


# ---- torch.compile


def results(x: list[Tensor], out: rk.PolicyLossOutput) -> Any:
    rows = [t.detach() for t in out[:4]]
    return *rows, *gradients(out, x), out.metrics.compute()


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["every term", "gspo", "custom"])
def test_traced_without_a_graph_break_equals_eager(
    name: str, compact: bool, autocast: bool
) -> None:
    torch._dynamo.reset()
    b = make_batch(F32)

    def step(*x: Tensor) -> Any:
        with torch.autocast("cpu", BF16, enabled=autocast):
            return linear(list(x), b, OBJECTIVES[name], compact=compact, chunk_rows=5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for f in (compiled, step):
        x = operands(b, F32)
        found.append(results(x, f(*x)))
    assert_close(*found, rtol=1e-6, atol=1e-7)


@slow
def test_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    b = make_batch(F32)

    def step(*x: Tensor) -> Any:
        return linear([x[0] * 1, *x[1:]], b, OBJECTIVES["every term"], chunk_rows=5).loss

    found = []
    for f in (torch.compile(step, fullgraph=True), step):
        x = operands(b, F32)
        loss = f(*x)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert_close(*found, rtol=1e-5, atol=1e-6)


def test_at_most_three_graphs_over_lengths() -> None:
    """Neither the rows nor the number of chunks are baked in."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 4, generator=g, requires_grad=True)

    def step(x: Tensor, y: Tensor, a: Tensor, w: Tensor) -> Tensor:
        given = {"advantage": a, "weight": w, "objective": Objective.ppo(), "chunk_rows": 8}
        return linear_policy_loss(x, weight, y, **given).loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for shape in ((2, 5), (3, 7), (4, 9), (6, 12), (3, 30), (9, 4)):
        x = torch.randn(*shape, 4, generator=g, requires_grad=True)
        y = torch.randint(11, shape, generator=g)
        a, w = torch.randn(shape[0], generator=g), torch.rand(shape, generator=g)
        loss, expected = (f(x, y, a, w) for f in (compiled, step))
        assert_close(loss, expected)
        grads = [torch.autograd.grad(t, (x, weight)) for t in (loss, expected)]
        assert_close(*grads)
    assert counter.frame_count <= 3


# ---- the operators


def samples(dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    (hidden, weight, bias), y, given = problem(6, 5, 11, dtype)
    acc = F64 if dtype == F64 else F32
    old, advantage, w = (given[k].to(acc).view(2, 3) for k in given)
    y = y.view(2, 3)
    mask = w != 0
    frozen = [t.detach() for t in (hidden, weight, bias)]
    ops = torch.ops.reasonkern
    plans = [(dtype, -1, False, -1), (dtype, 4, True, -1), (dtype, 4, True, 5)]
    stats, backward, loss = [], [], []
    for plan in plans:
        stats.append((hidden, weight, bias, y, mask, None, 0.7, 0.0, *plan))
        out = ops.linear_token_stats(*frozen, y, mask, None, 0.7, 0.0, *plan)
        saved = [out[i] for i in (0, 1, 3, 5, 7)]
        grads = (advantage, None, advantage, None)
        backward.append((*frozen, y, None, 0.7, 0.0, *saved, *grads, *plan, True, True, True))
        values, hyper = Objective.dapo(entropy_coef=0.1).pack(w)
        rows = (y, old, advantage, w, None, None, None, None, None)
        loss.append((hidden, weight, bias, *rows, hyper, values, 1.0, 5.0, 0, 0, False, *plan,
                     True, True, True))  # fmt: skip
    loss.append((hidden, frozen[1], None, *loss[0][3:-3], True, False, False))
    return {"token_stats": stats, "token_stats_backward": backward, "policy_loss": loss}


@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=slow), F64], ids=str)
@pytest.mark.parametrize("name", ["token_stats", "token_stats_backward", "policy_loss"])
def test_contract(name: str, dtype: torch.dtype) -> None:
    # The gradients that the loss keeps are not to be returned from a traced graph.
    visible, differentiable = {"policy_loss": (4, 1), "token_stats": (None, 4)}.get(name, (None, 0))
    op = getattr(torch.ops.reasonkern, f"linear_{name}")
    run_contract(op, samples(dtype)[name], differentiable_outputs=differentiable, visible=visible)


# ---- memory


PEAK = """
import re, sys, torch, reasonkern as rk
torch.set_num_threads(1)
dim, vocab, chunk = 32, 32768, 64
objective = {"3": rk.Objective.ppo(entropy_coef=0.01), "4": lambda lp, _, ctx: -ctx.advantage * lp}
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def peak(rows, trained):
    hidden = torch.randn(rows, dim, requires_grad=True)
    head = torch.randn(vocab, dim, requires_grad=trained)
    y = torch.randint(vocab, (rows,))
    given = dict(advantage=torch.randn(rows), weight=torch.full((rows,), 1 / rows),
                 objective=objective[sys.argv[1]], old_logprob=torch.full((rows,), -11.0))
    for _ in range(2):
        head.grad = hidden.grad = None
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        rk.linear_policy_loss(hidden, head, y, chunk_rows=chunk, **given).loss.backward()
    return status("VmHWM") - before
print(peak(512, True), peak(1024, True), peak(1024, False))
"""
MIB = 1 << 20
# Freed memory leaves at once, or what the heap keeps of the first call would hide the second one.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.skipif(
    not next(r["exists"] for r in rk.info()["ops"]["policy_loss"] if r["backend"] == "cpu"),
    reason="the reference needs many buffers; library _C is not built",
)
@pytest.mark.parametrize("products", ["3", "4"])
def test_peak_memory_does_not_grow_with_the_rows(products: str) -> None:
    """64 rows of logits are 8 MiB, the gradient of the head 4 MiB; 1024 rows would be 128 MiB."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK, products],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, **MALLOC},
    )  # fmt: skip
    short, long, frozen = (int(n) / MIB for n in found.stdout.split())
    buffer, head, hidden = 8, 4, 1024 * 32 * 4 / MIB
    assert buffer < short < 1.25 * buffer + head + hidden
    assert abs(long - short) < hidden + 1
    assert frozen < long - 0.75 * head


# ---- FSDP2


def worker(rank: int, port: int, products: str) -> None:
    """Two ranks with different halves of a batch; rank 0 compares with a single process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    b = make_batch()
    half = slice(2 * rank, 2 * rank + 2)
    for reshard in (False, True):
        model = Model()
        alone = Model()
        fully_shard(model.head, reshard_after_forward=reshard, mp_policy=MixedPrecisionPolicy())
        fully_shard(model, reshard_after_forward=reshard)
        part = Batch(**{k: v if v is None else v[half] for k, v in vars(b).items()})
        (2 * model(part, products)).backward()  # FSDP averages over the ranks
        alone(b, products).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert_close(p.grad.full_tensor(), q.grad, rtol=1e-9, atol=1e-12)
        with raises("lm_head_weight: expected a plain tensor (inside the forward of its module), "
                    "got a DTensor"):  # fmt: skip
            linear_policy_loss(torch.zeros(1, V), model.head.weight, torch.zeros(1).long(),
                               advantage=torch.ones(1), weight=torch.ones(1),
                               objective=Objective.ppo())  # fmt: skip
    dist.destroy_process_group()


class Head(torch.nn.Linear):
    """The loss in the forward of the module that holds the head."""

    def forward(self, hidden: Tensor, b: Batch, products: str) -> Tensor:
        objective = {"3": OBJECTIVES["every term"], "4": OBJECTIVES["gspo"]}[products]
        return linear([hidden, self.weight, self.bias], b, objective).loss


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(V, 8, dtype=F64)
        self.head = Head(8, V, dtype=F64)

    def forward(self, b: Batch, products: str) -> Tensor:
        return self.head(torch.tanh(self.body(b.logits)), b, products)


@slow
@pytest.mark.parametrize("products", ["3", "4"])
def test_fsdp2_equals_a_single_process(products: str) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, products), nprocs=2)
