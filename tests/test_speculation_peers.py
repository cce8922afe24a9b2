"""`check_verifier` on a foreign verifier: the chain verifier of transformers."""

from __future__ import annotations

import pytest
import torch

import reasonkern as rk

pytestmark = pytest.mark.peers


def transformers_chain(logits, draft, tree, temperature, seed, position):
    """One request at a time; its q is the drafter's softmax, as an assistant model's would be."""
    utils = pytest.importorskip("transformers.generation.utils")
    batch, nodes, vocab = logits.shape
    k = nodes - 1
    tokens = torch.full((batch, nodes), -1)
    q = torch.full((batch, k, vocab), -torch.inf)
    q.scatter_(2, draft.q_ids[:, :k], draft.q_logprob[:, :k])
    for b in range(batch):
        torch.manual_seed(int(seed[b]) % 2**62)
        emitted, matches = utils._speculative_sampling(
            draft.tokens[b : b + 1], q[b : b + 1], k, logits[b : b + 1]
        )
        n = int(matches) + 1
        tokens[b, :n] = emitted[0, -n:]
    return tokens, (tokens >= 0).sum(-1)


def test_transformers_chain_verifier():
    report = rk.check_verifier(transformers_chain, vocab=8, children=1, depth=2, draws=2**13)
    assert report, str(report)


def test_a_mistake_in_its_place_is_found():
    """The same verifier told a draft law that was not drawn from (q of another temperature)."""

    def flattened(logits, draft, *rest):
        law = (draft.q_logprob / 2).log_softmax(-1)
        return transformers_chain(logits, draft._replace(q_logprob=law), *rest)

    report = rk.check_verifier(flattened, vocab=8, children=1, depth=2, draws=2**13)
    assert not report and "marginal" in report.broken, str(report)
