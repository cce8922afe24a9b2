"""Every objective of policy_loss on every backend, each branch taken, and the reference itself."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import assert_same_bits
from policy_loss_branches import assert_branches_taken
from policy_loss_cases import INF, NAN, LossArgs
from policy_loss_checks import check_loss, run_loss, run_stats
from tolerance import acc, randn
from torch import Tensor

from reasonkern import Objective
from reasonkern.policy_loss import reference_objective as formulas

pytestmark = pytest.mark.usefixtures("poisoned_empty")

VOCAB = 37

# Beside both sides of every bound: beyond the clamp of the log-ratio, and in between.
RATIOS = (math.exp(-25), 0.5, 0.97, 1.6, 6.0, math.exp(25))
SPARE = 4  # last rows of a batch, for weights that are 0 and for extremes of the KL
# (p, p_old) around DPPO's thresholds: far up, far down, a little, nearly certain, ratio above 20.
PROBABILITIES = ((0.7, 0.3), (0.3, 0.7), (0.55, 0.5), (0.5, 0.55), (0.9999, 0.9), (0.9, 0.9999))
PROBABILITIES += ((0.25, 0.14), (0.14, 0.25), (0.01, 1e-4), (1e-4, 0.01), (0.8, 0.01))

OBJECTIVES = {
    "ppo": Objective.ppo(),
    "ppo upper bound only": Objective.ppo(None, 1.2),
    "ppo lower bound only": Objective.ppo(0.8, None),
    "ppo unbounded": Objective.ppo(None, None, log_ratio_clamp=None),
    "dapo dual clip": Objective.dapo(dual_clip=3.0),
    "two-sided cap": Objective.grpo(ratio_cap=2.0),
    "cap and dual clip": Objective.dr_grpo(ratio_cap=5.0, dual_clip=3.0),
    "cap below dual clip": Objective.ppo(ratio_cap=2.0, dual_clip=4.0),
    "gppo": Objective.gppo(),
    "gppo one-sided": Objective.gppo(None, 1.28, beta_low=0.0),
    "ce_gppo dual clip": Objective.ce_gppo(beta_high=0.5, dual_clip=10.0),
    "cispo": Objective.cispo(),
    "cispo two-sided": Objective.cispo(1.28, 0.8),
    "sapo": Objective.sapo(),
    "reinforce": Objective.reinforce(),
    "reinforce with ratio": Objective.reinforce(0.1, 10.0),
    "gpg": Objective.gpg(),
    "rloo": Objective.rloo(),
    "dppo_tv": Objective.dppo_tv(0.08, 0.3),
    "dppo_kl": Objective.dppo_kl(0.02, 0.06),
    "dro": Objective.dro(),
}


def batch(o: Objective, dtype: torch.dtype, seed: int = 0, vocab: int = VOCAB) -> LossArgs:
    """One row per ratio and sign of the advantage, and A = 0 at four ratios; shape (1, N)."""
    if o.kind in (formulas.DPPO_TV, formulas.DPPO_KL):
        pairs = [(p, math.log(p / old), s) for p, old in PROBABILITIES for s in (1, -1)]
    else:
        bounds = {b for b in o.numbers()[:4] if 0 < b < INF}
        ratios = (*RATIOS, *(b * side for b in sorted(bounds) for side in (0.99, 1.01)))
        draws = torch.rand(len(ratios), 2, generator=cases.generator(seed + 3)).tolist()
        pairs = [
            (min(0.02 + 0.2 * u, 0.5 * r), math.log(r), s)
            for r, both in zip(ratios, draws, strict=True)
            for u, s in zip(both, (1, -1), strict=True)
        ]
    pairs += [(0.1, math.log(0.5), 0), (0.1, 25.0, 0), *[(0.1, 0.05, 1)] * SPARE]
    n = len(pairs)
    p, log_ratio, sign = (
        torch.tensor(column).double()[None] for column in zip(*pairs, strict=True)
    )
    x = 2 * randn(1, n, vocab, seed=seed)
    y = torch.randint(vocab, (1, n), generator=cases.generator(seed + 1))
    y[0, 0], y[0, -1] = 0, vocab - 1
    x.scatter_(-1, y.unsqueeze(-1), -INF)
    rest = x.logsumexp(-1)
    x.scatter_(-1, y.unsqueeze(-1), (p.log() - torch.log1p(-p) + rest).unsqueeze(-1))
    x = x.to(dtype)
    logp = cases.literal_stats(x.double(), y).logprob
    values, hyper = o.pack(torch.zeros(1, n, dtype=acc(dtype)))
    magnitude = 0.3 + randn(1, n, seed=seed + 4).abs()
    return LossArgs(
        x, y, (logp - log_ratio).to(acc(dtype)), (sign * magnitude).to(acc(dtype)),
        (0.5 + randn(1, n, seed=seed + 5).abs()).to(acc(dtype)),
        hyper=hyper, values=tuple(values), kind=o.kind,
    )  # fmt: skip


def with_terms(a: LossArgs, seed: int = 70, **changes: Any) -> LossArgs:
    """Entropy bonus, entropy and importance weights, KL; weights that are 0, separately."""
    shape, dtype = a.targets.shape, a.weight.dtype
    weight, entropy_weight = a.weight.clone(), randn(*shape, seed=seed).to(dtype)
    weight[0, -1] = entropy_weight[0, -1] = 0
    weight[0, -2], entropy_weight[0, -3] = 0, 0
    d = 0.4 * randn(*shape, seed=seed + 1)
    # Beyond the clamp; without one k + k' of the unbiased k3 would cancel e^25.
    d[0, -3] = 25.0 if math.isfinite(a.values[8]) else 5.0
    d[0, -4] = -25.0
    logp = cases.literal_stats(a.logits.double(), a.targets).logprob
    more: dict[str, Any] = {
        "weight": weight,
        "entropy_weight": entropy_weight,
        "importance": (2 * torch.rand(shape, generator=cases.generator(seed + 2))).to(dtype),
        "ref_logprob": (logp + d).to(dtype),
        "values": (*a.values[:6], 0.3, 0.7, a.values[8]),
    }
    return cases.replace(a, **(more | changes))


# ---- the reference itself


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]


KL = [(0, False), *itertools.product((1, 2, 3), (False, True))]


def test_reference_is_the_published_formula(objective: Objective) -> None:
    """In float64 against autograd through the formulas of the papers: nothing but rounding."""
    plain = batch(objective, torch.float64)
    assert_branches_taken(plain)
    every = [with_terms(plain, kl_kind=kind, kl_unbiased=unbiased) for kind, unbiased in KL]
    full = every[-1]
    t = 0.5 + randn(*plain.targets.shape, seed=80).abs()
    per_row = torch.tensor(full.values).double()[:, None].expand(9, t.numel()).contiguous()
    for a in (
        plain,
        *every,
        cases.replace(full, old_logprob=None, entropy_weight=None),
        cases.replace(full, importance=None, row_temperature=t, softcap=9.0),
        cases.replace(full, temperature=0.6, loss_scale=torch.tensor(1024.0).double()),
        cases.replace(full, hyper=per_row, values=(NAN,) * 9),
        cases.replace(full, hyper=per_row[:, :1].contiguous(), values=(NAN,) * 9),
    ):
        got, expected = cases.exact_loss(a), cases.literal_loss(a)
        terms = cases.loss_terms(a, expected)
        sizes = (terms.row_loss, terms.token_loss, *(x.abs() for x in expected[2:4]))
        for name, x, y, size in zip(
            cases.Loss._fields, got, expected, (*sizes, terms.grad_logits), strict=True
        ):
            # A ratio or k3 magnifies the rounding of logp, up to 30, to that of 30 r; beside 1e-14
            # for the rounding of logp near 0.
            assert ((x - y).abs() <= 1e-13 * (size + 0.1)).all(), name


# ---- every backend


def test_objective(backend: Backend, objective: Objective) -> None:
    a = with_terms(batch(objective, torch.float32, seed=20), kl_kind=3)
    assert_branches_taken(a)
    check_loss(backend, a.map(backend.to))
    if not backend.slow:
        check_loss(backend, batch(objective, torch.float32).map(backend.to))
        a = with_terms(batch(objective, torch.bfloat16, seed=30), kl_kind=2)
        check_loss(backend, a.map(backend.to))


@pytest.mark.parametrize(("kl_kind", "unbiased"), KL[1:])
def test_kl(backend: Backend, kl_kind: int, unbiased: bool) -> None:
    a = batch(OBJECTIVES["dapo dual clip"], torch.float32, seed=30)
    a = with_terms(a, kl_kind=kl_kind, kl_unbiased=unbiased)
    check_loss(backend, a.map(backend.to))


@pytest.mark.parametrize("name", ["cap and dual clip", "gppo", "sapo", "dppo_tv", "dro"])
def test_on_policy(backend: Backend, name: str) -> None:
    """Without old log-probabilities r = 1 with gradient: exactly what the no-grad pass gives."""
    a = with_terms(batch(OBJECTIVES[name], torch.float32, seed=40), kl_kind=3, kl_unbiased=True)
    a = cases.replace(a.rows(slice(-SPARE - 4, None)), old_logprob=None).map(backend.to)
    check_loss(backend, a)
    old = run_stats(backend, a.logits, a.targets.cpu()).logprob
    explicit = cases.replace(a, old_logprob=backend.to(old))
    assert_same_bits(run_loss(backend, a), run_loss(backend, explicit))


@pytest.fixture
def exact_ratio(backend: Backend) -> Any:
    """The ratio as a backend computes it: the unclipped loss at A = -1."""

    def measure(a: LossArgs) -> Tensor:
        free = (0.0, INF, INF, INF, 0.0, 0.0, 0.0, 0.0, 20.0)
        minus_one = -torch.ones_like(a.advantage)
        return run_loss(backend, cases.replace(a, advantage=minus_one, values=free)).token_loss

    return measure


def test_ties_are_unclipped(backend: Backend, exact_ratio: Any) -> None:
    """A ratio that equals a bound keeps its gradient -rA, whichever bound it is."""
    a = batch(Objective.ppo(), torch.float32, seed=50)
    r = exact_ratio(a)[0]
    a = a.rows(((a.advantage[0] != 0) & (r > 1) & (r < 10)).nonzero()[:, 0])
    assert (a.advantage > 0).any() and (a.advantage < 0).any()
    r = exact_ratio(a)
    free = torch.tensor((0.0, INF, INF, INF, 1.0, 1.0, 0.0, 0.0, 20.0)).unsqueeze(-1)
    free = free.expand(9, r.numel()).clone()
    unclipped = run_loss(backend, cases.replace(a, hyper=free))
    assert torch.equal(unclipped.token_loss, -r * a.advantage)
    for kind, bounds in (
        (formulas.CLIP, ("ratio_min", "ratio_max", "dual_clip", "ratio_cap")),
        (formulas.GPPO, ("ratio_min", "ratio_max", "dual_clip")),
    ):
        for bound in bounds:
            tied, beyond = free.clone(), free.clone()
            row = cases.Numbers._fields.index(bound)
            tied[row] = r[0]
            beyond[row] = r[0] * (1.0001 if bound == "ratio_min" else 0.9999)
            out = run_loss(backend, cases.replace(a, kind=kind, hyper=tied))
            assert_same_bits(out, unclipped)
            if kind == formulas.CLIP:
                clipped = run_loss(backend, cases.replace(a, kind=kind, hyper=beyond)).grad_logits
                side = a.advantage > 0 if bound == "ratio_max" else a.advantage < 0
                side |= torch.tensor(bound == "ratio_cap")  # with no ratio_max, both signs
                assert (clipped[side] == 0).all() and (clipped[~side] != 0).any(-1).all()


def test_log_ratio_clamp_limits_the_value_and_stops_the_gradient(backend: Backend) -> None:
    """Losses through r have gradient 0 outside +-20; detached ratios and GPPO's bounds keep it."""
    free = (0.0, INF, INF, INF, 0.0, 0.0, 0.0, 0.0, 20.0)
    a = batch(Objective.sapo(), torch.float32, seed=60).rows([0, 1, 10, 11])
    a = cases.replace(a, kind=formulas.CLIP, values=free)
    limit = torch.where(torch.arange(4) < 2, math.exp(-20.0), math.exp(20.0)).unsqueeze(0)
    ppo = check_loss(backend, a.map(backend.to))
    assert ((ppo.token_loss / (-limit * a.advantage) - 1).abs() < 1e-6).all()
    assert (ppo.grad_logits == 0).all()
    cispo = check_loss(backend, cases.replace(a, kind=formulas.CISPO).map(backend.to))
    assert (cispo.grad_logits != 0).any(-1).all()
    bounds = (0.8, 1.28, INF, INF, 1.0, 1.0, 0.0, 0.0, 20.0)
    gppo = check_loss(backend, cases.replace(a, kind=formulas.GPPO, values=bounds).map(backend.to))
    preserved = torch.tensor([[False, True, True, False]])  # A < 0 below, A > 0 above
    assert torch.equal((gppo.grad_logits != 0).any(-1), preserved)
    off = cases.replace(a, values=(*free[:8], INF))
    assert (check_loss(backend, off.map(backend.to)).grad_logits != 0).any(-1).all()


def test_zero_advantage_gives_zero_whatever_the_ratio(
    backend: Backend, objective: Objective
) -> None:
    """inf * 0 included: unclamped, the ratio of row 0 overflows, and its KL term must survive."""
    a = batch(objective, torch.float32, seed=70)
    a = cases.replace(a, values=(*a.values[:8], INF)).rows(slice(-6, None))
    a.old_logprob[0, 0] = -200.0
    a.advantage[:] = 0
    out = run_loss(backend, with_terms(a, kl_kind=1).map(backend.to))
    assert torch.isfinite(out.logprob).all() and (out.grad_logits[0, 0] != 0).any()
    if objective.kind == formulas.DRO:  # its quadratic term does not carry A
        return
    active = with_terms(a).weight[0] != 0
    k1 = 0.3 * (out.logprob - with_terms(a).ref_logprob)[0, active]
    assert torch.allclose(out.token_loss[0, active], k1, rtol=1e-5, atol=1e-6)
    if not backend.slow:
        plain = run_loss(backend, a.map(backend.to))
        assert all((t == 0).all() for t in (plain.row_loss, plain.token_loss, plain.grad_logits))


def test_overflowing_ratio_drops_its_row_alone(backend: Backend) -> None:
    a = batch(OBJECTIVES["ppo unbounded"], torch.float32, seed=80)
    clean = run_loss(backend, a.map(backend.to))
    old = a.old_logprob.clone()
    old[0, 1] = -300.0
    out = run_loss(backend, cases.replace(a, old_logprob=old).map(backend.to))
    assert out.token_loss[0, 1] == 0 and out.row_loss[0, 1] == 0
    assert (out.grad_logits[0, 1] == 0).all() and torch.isfinite(out.logprob).all()
    others = torch.arange(a.targets.numel()) != 1
    assert_same_bits([t[:, others] for t in out], [t[:, others] for t in clean])


def test_nonfinite_row_inputs_drop_their_rows_alone(backend: Backend) -> None:
    a = with_terms(batch(Objective.ppo(), torch.float32, seed=90), kl_kind=2)
    clean = run_loss(backend, a.map(backend.to))
    spoiled = a.map(Tensor.clone)
    names = ("old_logprob", "advantage", "importance", "ref_logprob")
    for row, name in enumerate(names):
        getattr(spoiled, name)[0, 2 * row], getattr(spoiled, name)[0, 2 * row + 1] = NAN, INF
    out = run_loss(backend, spoiled.map(backend.to))
    assert torch.isfinite(out.row_loss).all() and torch.isfinite(out.token_loss).all()
    assert torch.isfinite(out.grad_logits).all()
    dropped = torch.arange(a.targets.numel()) < 2 * len(names)
    dropped[1] = False  # old_logprob = inf is a ratio of e^-20, a finite loss
    assert (out.row_loss[0, dropped] == 0).all() and (out.grad_logits[0, dropped] == 0).all()
    assert (clean.grad_logits[0, dropped] != 0).any(-1).all()
    others = torch.arange(a.targets.numel()) >= 2 * len(names)
    assert_same_bits([t[:, others] for t in out], [t[:, others] for t in clean])


def test_zero_advantage_does_not_hide_a_nan_ratio(backend: Backend) -> None:
    a = with_terms(batch(Objective.ppo(), torch.float32, seed=90), kl_kind=2)
    a.advantage[:] = 0
    clean = run_loss(backend, a.map(backend.to))
    old = a.old_logprob.clone()
    old[0, 1] = NAN
    out = run_loss(backend, cases.replace(a, old_logprob=old).map(backend.to))
    assert out.token_loss[0, 1] == 0 and (out.grad_logits[0, 1] == 0).all()
    assert (clean.grad_logits[0, 1] != 0).any()
    others = torch.arange(a.targets.numel()) != 1
    assert_same_bits([t[:, others] for t in out], [t[:, others] for t in clean])


@pytest.mark.parametrize("name", ["cap and dual clip", "dppo_kl"])
def test_hyper_parameters_as_tensors_equal_floats(backend: Backend, name: str) -> None:
    a = with_terms(batch(OBJECTIVES[name], torch.float32, seed=100), kl_kind=3)
    if backend.slow:
        a = a.rows(list(range(0, a.targets.numel(), 3)))
    expected = run_loss(backend, a.map(backend.to))
    numbers = torch.tensor(a.values).unsqueeze(-1)
    for hyper in (numbers, numbers.expand(9, a.targets.numel()).contiguous()):
        other = cases.replace(a, hyper=hyper, values=(NAN,) * 9)
        assert_same_bits(run_loss(backend, other.map(backend.to)), expected)


def test_hyper_parameters_per_row(backend: Backend) -> None:
    """Each row has the bounds of another objective."""
    a = with_terms(batch(Objective.ppo(), torch.float32, seed=110), kl_kind=3)
    n = a.targets.numel()
    hyper = torch.tensor(a.values).unsqueeze(-1).expand(9, n).clone()
    row = torch.arange(n)
    hyper[0], hyper[1] = torch.where(row % 3 == 0, 0.0, 0.8), torch.where(row % 4 == 0, INF, 1.2)
    hyper[2] = torch.where(row % 5 == 0, 3.0, INF)
    hyper[6], hyper[7] = 0.1 * (row % 4), 0.2 * (row % 3)
    check_loss(backend, cases.replace(a, hyper=hyper, values=(NAN,) * 9).map(backend.to))


def test_importance_multiplies_the_policy_term_alone(backend: Backend) -> None:
    a = with_terms(batch(Objective.ppo(), torch.float32, seed=120), kl_kind=1)
    a = cases.replace(a, importance=torch.zeros_like(a.weight)).map(backend.to)
    out = check_loss(backend, a)
    active = (a.weight != 0).cpu()
    k1 = out.logprob - a.ref_logprob.cpu()
    assert torch.allclose(out.token_loss[active], 0.3 * k1[active], rtol=1e-5, atol=1e-6)


# ---- the simulated CUDA kernels in other launch shapes


ORDERS = ("forward", "reverse", "random")


def in_launch_shapes(backend: Backend, objectives: Iterable[Objective], **launch: Any) -> None:
    if backend.name != "cuda-sim":
        pytest.skip("launch shapes are the simulator's")
    using = importlib.import_module("cuda_sim.backend").using
    for o in objectives:
        for resident in (True, False):
            with using(**launch, resident=resident):
                check_loss(backend, with_terms(batch(o, torch.float32, vocab=301), kl_kind=3))


@pytest.mark.parametrize("order", ORDERS)
def test_thread_orders(backend: Backend, order: str) -> None:
    chosen = [OBJECTIVES[name] for name in ("cap and dual clip", "gppo", "dppo_kl")]
    in_launch_shapes(backend, chosen, order=order, slices=4)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_every_objective_in_every_launch_shape(backend: Backend, order: str, slices: int) -> None:
    in_launch_shapes(backend, OBJECTIVES.values(), order=order, slices=slices)
