"""What the sampler may draw against transformers' warpers, and what it says of that law."""

from __future__ import annotations

import pytest
import torch
from speculation_cases import Rows, generator
from torch.distributions import Categorical

import reasonkern as rk
from reasonkern.speculation.reference_row import Filters, scores

pytestmark = pytest.mark.peers
VOCAB, ROWS = 4000, 24


def processed(logits, temperature, top_k, top_p, min_p):
    t = pytest.importorskip("transformers")
    warpers = t.LogitsProcessorList([t.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(t.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(t.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(t.MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())


def near_a_boundary(logits, temperature, top_k, top_p, min_p):
    """(R,): a token lies so near the edge of top-p or min-p that rounding decides."""
    z = (logits.double() / temperature).sort(-1, descending=True).values
    p = z[:, : top_k or None].softmax(-1)
    mass = (p.cumsum(-1) - top_p).abs().amin(-1) < 1e-5
    ratio = (p / p[:, :1] - min_p).abs().amin(-1) < 1e-6
    return (mass & (top_p < 1)) | (ratio & (min_p > 0))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.02), (300, 0.7, 0.0),
        (50, 0.95, 0.1),
    ],
)  # fmt: skip
def test_support_and_entropy_are_those_of_the_warpers(temperature, top_k, top_p, min_p):
    g = generator(top_k)
    spread = torch.linspace(0.5, 4, ROWS).unsqueeze(-1)
    quantiles = torch.linspace(-0.9995, 0.9995, VOCAB).erfinv()
    logits = torch.stack([quantiles[torch.randperm(VOCAB, generator=g)] for _ in range(ROWS)])
    logits *= spread
    assert all(len(row.unique()) == VOCAB for row in logits)
    law = processed(logits, temperature, top_k, top_p, min_p)
    clear = ~near_a_boundary(logits, temperature, top_k, top_p, min_p)
    assert clear.sum() > ROWS // 2
    fill = lambda x, dtype: torch.full((ROWS,), x, dtype=dtype)  # noqa: E731
    r = Rows(
        fill(temperature, torch.float32), fill(top_k, torch.int64), fill(top_p, torch.float32),
        fill(min_p, torch.float32), torch.arange(ROWS), fill(0, torch.int64),
    )  # fmt: skip
    ours = scores(logits, None, Filters(*r.args()[:4])).value > -torch.inf
    assert torch.equal(ours[clear], torch.isfinite(law)[clear])
    expected = Categorical(logits=law.double()).entropy()
    for position in range(20):
        out = rk.sample_controlled(
            logits, None, None, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seed=torch.arange(ROWS), position=position,
        )  # fmt: skip
        assert torch.isfinite(law.gather(-1, out.token.unsqueeze(-1)))[clear].all()
        torch.testing.assert_close(
            out.entropy.double()[clear], expected[clear], rtol=1e-5, atol=1e-6
        )
