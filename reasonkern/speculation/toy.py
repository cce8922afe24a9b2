"""The toy models of `check_verifier`: laws over a small vocabulary, after the last token."""

from __future__ import annotations

import torch
from torch import Tensor

IMPOSSIBLE = 6  # every sixth token after some tokens has probability 0


class Toy:
    """A target and a drafter whose laws depend on the depth and the last token.

    The drafter knows `entry` tokens, among them impossible ones; its law is a noisy copy of the
    target's. Laws are float64 softmaxes of the float32 logits.
    """

    def __init__(self, vocab: int, children: int, depth: int, seed: int) -> None:
        self.vocab, self.children, self.depth, self.seed = vocab, children, depth, seed
        self.entry = max(children, (vocab + 1) // 2)
        g = torch.Generator("cpu").manual_seed(seed)
        shape = (depth + 1, vocab, vocab)
        self.logits = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=g)
        self.logits *= 1.2
        noisy = self.logits + 0.8 * torch.empty_like(self.logits).normal_(generator=g)
        q, self.q_ids = noisy.topk(self.entry, dim=-1)
        self.q_logprob = q.log_softmax(-1)
        """(D + 1, V, entry) float32 log-probabilities of `q_ids` after each token."""
        cell = torch.arange(vocab * vocab, device="cpu").view(vocab, vocab)
        impossible = (cell + cell // vocab) % IMPOSSIBLE == 1
        self.logits.masked_fill_(impossible & (cell % vocab > 0), -torch.inf)
        self.target = self.logits.double().softmax(-1)
        """(D + 1, V, V) the law of the next token after each token."""
        q = self.q_logprob.double().softmax(-1)
        self.draft = torch.zeros_like(self.target).scatter(-1, self.q_ids, q)
        """(D + 1, V, V) the law that drafts are drawn from."""
        self.target_lists, self.draft_lists = self.target.tolist(), self.draft.tolist()

    def continued(self, tokens: tuple[int, ...]) -> Tensor:
        """Law of the tokens that the target itself emits after `tokens`, up to depth D."""
        law = self.target.new_ones(())
        for j in range(len(tokens), self.depth + 1):
            step = self.target[j, tokens[-1]] if law.ndim == 0 else self.target[j]
            law = law.unsqueeze(-1) * step
        return law

    def joint(self, tokens: int) -> Tensor:
        """(V^tokens,) law of the first tokens after token 0."""
        law = self.target[0, 0]
        for j in range(1, tokens):
            law = (law.view(-1, self.vocab, 1) * self.target[j]).reshape(-1)
        return law
