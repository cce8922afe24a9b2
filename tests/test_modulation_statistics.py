"""What `sample_controlled` and `verify_controlled` say about a row, against float64 definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import assert_same_bits
from modulation_sampler_cases import call
from speculation_cases import (
    DTYPES,
    INF,
    Rows,
    generator,
    random_logits,
    random_mask,
    random_step,
    rows,
)
from test_speculation_sample import bad_rows
from test_speculation_verify import OUTPUTS
from tolerance import ulp
from torch import Tensor
from torch.distributions import Categorical

import reasonkern as rk
from reasonkern import _load
from reasonkern.speculation.reference_row import Filters, scores, unpack_mask

NAMES = ("logprob", "entropy", "entropy_raw", "confidence", "max_prob")
NO_CONTROL = (None, [])


def call_or_skip(backend, op: str, *args):
    try:
        backend.function(op)
    except (RuntimeError, StopIteration) as error:
        pytest.skip(f"{backend.name}: {error}")
    return call(backend, op, *args)


def interpreted(backend) -> bool:
    """Filters take seconds a row there."""
    return backend.name == "triton" and backend.slow


def allowed(logits: Tensor, mask: Tensor | None) -> Tensor:
    bits = unpack_mask(mask, logits.shape[-1])
    return logits.float() if bits is None else logits.float().masked_fill(~bits, -INF)


def kept(logits: Tensor, mask: Tensor | None, r: Rows) -> tuple[Tensor, Tensor]:
    """z/T in fp32 with what the filters drop at -inf (arg-max alone when greedy); bad rows."""
    s = scores(logits, mask, Filters(*r.args()[:4]))
    top = torch.zeros_like(s.value).scatter(-1, s.value.argmax(-1, keepdim=True), 1).bool()
    greedy = (r.temperature == 0).unsqueeze(-1)
    return torch.where(greedy & ~top, -INF, s.value), s.bad


def definition(logits, mask, r: Rows, token: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every statistic by torch in `dtype`; -inf in bad rows."""
    x = allowed(logits, mask).to(dtype)
    value, bad = kept(logits, mask, r)
    raw = logits.float().to(dtype)
    unsound = ~torch.isfinite(raw.amax(-1))
    value, x = (torch.where(bad.unsqueeze(-1), 0, t).to(dtype) for t in (value, x))
    raw = torch.where(unsound.unsqueeze(-1), 0, raw)
    logp = x.log_softmax(-1)
    top = logp.topk(min(20, logp.shape[-1]), -1).values
    finite = torch.isfinite(top)
    out = {
        "logprob": logp.gather(-1, token.clamp_min(0).unsqueeze(-1)).squeeze(-1),
        "entropy": Categorical(logits=value).entropy(),
        "entropy_raw": Categorical(logits=raw).entropy(),
        "confidence": -torch.where(finite, top, 0).sum(-1) / finite.sum(-1),
        "max_prob": logp.exp().amax(-1),
    }
    missing = {name: unsound if name == "entropy_raw" else bad for name in out}
    return {name: torch.where(missing[name], -INF, x) for name, x in out.items()}


def check_statistics(logits, mask, r: Rows, token: Tensor, got: dict[str, Tensor]) -> None:
    """Twice the error of plain fp32 torch plus two ulp, of 1 where a value is a sum around 1."""
    truth = definition(logits, mask, r, token, torch.float64)
    plain = definition(logits, mask, r, token, torch.float32)
    for name in NAMES:
        t, g = truth[name], got[name]
        assert g.dtype == torch.float32
        assert torch.equal(g == -INF, t == -INF) and not torch.isnan(g).any(), name
        base = (plain[name].double() - t).abs()
        bound = 2 * base + 2 * ulp(t.abs().clamp_min(1), torch.float32)
        error = (g.double() - t).abs()
        assert (error <= bound)[t > -INF].all(), (name, error, bound)


def sample_everywhere(backend, logits, mask, r: Rows) -> dict[str, Tensor]:
    """The token is that of `sample`; the statistics are checked."""
    token, *statistics = call_or_skip(
        backend, "sample_controlled", logits, mask, *r.args(), *NO_CONTROL
    )
    assert_same_bits(token, _load.implementation("sample", "reference")(logits, mask, *r.args()))
    got = dict(zip(NAMES, statistics[:5], strict=True))
    check_statistics(logits, mask, r, token, got)
    assert not statistics[5].any()
    return got


@pytest.mark.parametrize("filters", ["off", "mixed"])
@pytest.mark.parametrize("masked", [False, True])
def test_random_rows(backend, filters, masked):
    batch = 3 if interpreted(backend) else 6
    for seed in range(1 if backend.slow else 16):
        vocab = (137, 1, 2, 31, 515, 2081, 5000, 21000)[seed % 8]
        logits = random_logits((batch, vocab), seed)
        mask = random_mask(logits.shape, seed) if masked else None
        sample_everywhere(backend, logits, mask, rows(batch, vocab, seed, filters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    sample_everywhere(backend, random_logits((5, 1333), 3, dtype), None, rows(5, 1333, 3, "off"))


@pytest.mark.parametrize("filters", ["off", "mixed"])
def test_bad_rows_have_no_statistics(backend, filters):
    if interpreted(backend) and filters == "mixed":
        pytest.skip("interpreted filters are slow; bad rows do not reach them")
    got = sample_everywhere(backend, bad_rows(70), None, rows(9, 70, 2, filters))
    assert (got["logprob"][[0, 1, 2, 3, 5, 7]] == -INF).all()
    assert got["logprob"][[4, 8]].tolist() == [0, 0] == got["entropy_raw"][[4, 8]].tolist()


def test_a_masked_nan_spoils_the_raw_entropy_alone(backend):
    x = random_logits((2, 40), 1)
    x[0, 33], x[1, 0] = float("nan"), INF
    mask = torch.full((2, 2), -1, dtype=torch.int32)
    mask[0, 1] = -1 & ~2
    mask[1, 0] = -1 & ~1
    got = sample_everywhere(backend, x, mask, rows(2, 40, 3, "off"))
    assert (got["entropy_raw"] == -INF).all() and torch.isfinite(got["entropy"]).all()


@pytest.mark.parametrize("shift", [0.0, -300.0, 5e4])
def test_sums_do_not_depend_on_the_level(backend, shift):
    """lse - sum p z would be off by 0.1 nat at 5e4."""
    count = 2 if interpreted(backend) else 6
    x = (random_logits((count, 3000), 5) * 2).round() / 2 + shift
    level = rows(count, 3000, 5, "off")
    level = replace(level, temperature=torch.full((count,), 0.5))
    moved = sample_everywhere(backend, x, None, level)
    still = sample_everywhere(backend, x - shift, None, level)
    for name in NAMES:
        torch.testing.assert_close(moved[name], still[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [3.0, 20.0, 47.0, 60.0, 90.0, 200.0])
def test_a_token_far_above_the_rest(backend, gap):
    """Most of the row counts for little, or for nothing; the tile of the top holds no other."""
    if interpreted(backend) and gap not in (20.0, 200.0):
        pytest.skip("a row is interpreted for seconds")
    x = torch.randn(4, 9000, generator=generator(3)).clamp(-3, 3) - 3 - gap
    x[:, 4567] = 0
    x[2:, 4096:5120] = -INF
    x[2:, 4567] = 0
    r = replace(rows(4, 9000, 1, "off"), temperature=torch.tensor([1.0, 0.6, 1.0, 2.0]))
    got = sample_everywhere(backend, x, None, r)
    assert (got["confidence"] > gap * 0.9).all()


def test_filters_change_the_entropy_of_the_draw_alone(backend):
    count = 2 if interpreted(backend) else 4
    x = random_logits((count, 900), 2) * 0.3
    wide = rows(count, 900, 2, "off")
    wide = replace(wide, temperature=torch.full((count,), 0.7))
    top_k = torch.tensor([0, 7, 0, 300])[:count]
    narrow = replace(wide, top_p=torch.full((count,), 0.5), top_k=top_k)
    a, b = (sample_everywhere(backend, x, None, r) for r in (wide, narrow))
    assert (b["entropy"] < a["entropy"] - 0.1).all()
    for name in ("entropy_raw", "confidence", "max_prob"):
        assert torch.equal(a[name], b[name])


# ---- along a tree


@pytest.mark.parametrize("rejection", [False, True])
@pytest.mark.parametrize("limits", [False, True])
def test_a_walk_describes_its_rows(backend, rejection, limits):
    """Same outputs as verify_tree; statistics of each row are those of sampling it."""
    if rejection and backend.name == "triton":
        pytest.skip("the Triton backend has the equality rule only")
    sample = _load.implementation("sample_controlled", "reference")
    visited = 0
    for seed in range(1 if backend.slow else 8):
        step = random_step(
            seed, batch=6, vocab=(211, 1030)[seed % 2], rejection=rejection, limits=limits,
            filters="off" if interpreted(backend) else "mixed",
        )  # fmt: skip
        out = call_or_skip(backend, "verify_controlled", *step.args(), *NO_CONTROL, True)
        expected = _load.implementation("verify_tree", "reference")(*step.args())
        for name, g, e in zip(OUTPUTS, out, expected, strict=False):
            if name == "lse":
                torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
            else:
                assert_same_bits(g, e)
        length, path = out[1], out[2]
        statistics = dict(zip(NAMES, out[7:12], strict=True))
        for b in range(6):
            r = [a[b : b + 1] for a in step.rows.args()]
            n = int(length[b])
            visited += n
            assert all((x[b, n:] == -INF).all() for x in statistics.values())
            for j in range(n):
                node = path[b, j]
                mask = None if step.node_mask is None else step.node_mask[b, node][None]
                row = step.logits[b, node][None]
                at = Rows(*r[:5], r[5] + j)
                token = out[0][b, j][None]
                if not rejection:
                    assert sample(row, mask, *at.args(), *NO_CONTROL)[0] == token
                got = {name: x[b, j][None] for name, x in statistics.items()}
                check_statistics(row, mask, at, token, got)
    assert visited > (5 if backend.slow else 40)


def test_statistics_do_not_change_what_the_table_learns():
    """Bit for bit, the log-sum-exp included: a table must not depend on who asks for more."""
    for dtype in DTYPES:
        step = random_step(5, batch=6, vocab=5000, dtype=dtype)
        plain = torch.ops.reasonkern.verify_tree(*step.args())
        asked = torch.ops.reasonkern.verify_controlled(*step.args(), *NO_CONTROL, True)
        assert_same_bits(asked[:7], plain)
        assert all(
            x.shape == (6, 0)
            for x in torch.ops.reasonkern.verify_controlled(*step.args(), *NO_CONTROL, False)[7:]
        )


def test_verify_tree_returns_them():
    step = random_step(2, batch=4, limits=False, bad=False)
    draft = rk.Draft(step.tokens, step.valid)
    filters = dict(zip(("temperature", "top_k", "top_p", "min_p", "seed", "position"),
                       step.rows.args(), strict=True))  # fmt: skip
    plain = rk.verify_tree(step.logits, draft, step.tree, **filters)
    asked = rk.verify_tree(step.logits, draft, step.tree, **filters, stats=True)
    assert_same_bits(asked[:7], plain[:7])
    assert all(x is None for x in plain[7:])
    used = torch.arange(step.tree.depth + 1) < asked.length.unsqueeze(-1)
    assert torch.equal(torch.isfinite(asked.logprob), used)
    assert torch.equal(torch.isfinite(asked.entropy_raw), used)
