"""Peers as drafters of the decoding loop: transformers' prompt lookup, Arctic's suffix tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.case import Skip
from reasonkern.generation import Proposal, chain_proposal

DEPTH = 64  # tokens of context of the suffix tree


class PromptLookup:
    """What followed the last n-gram when it first occurred in the request's own text."""

    def __init__(self, nodes: int) -> None:
        try:
            from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
        except ImportError as error:
            raise Skip(f"transformers: {error}") from error
        # Ten tokens are transformers' default; more of a chain are hardly ever accepted.
        self._lookup = PromptLookupCandidateGenerator(
            num_output_tokens=min(10, nodes - 1), max_matching_ngram_size=3, max_length=1 << 30
        )

    def open(self, run: int) -> None:
        """A new call of the loop begins."""

    def __call__(self, requests: Sequence[int], texts: Sequence[list[int]]) -> list[Proposal]:
        found = [self._lookup.get_candidates(torch.tensor([text]))[0][0] for text in texts]
        pairs = zip(found, texts, strict=True)
        return [chain_proposal(ids[len(text) :].tolist()) for ids, text in pairs]


class SuffixTree:
    """Trees from suffix trees of the request and of all finished ones.

    The whole budget, whatever the match's length: it is what accepts most. Without a budget the
    number of tokens follows the match, as it does by default.
    """

    def __init__(self, nodes: int | None) -> None:
        try:
            from arctic_inference.suffix_decoding import SuffixDecodingCache
        except ImportError as error:
            raise Skip(f"arctic-inference: {error}") from error
        self._cache: Any = SuffixDecodingCache(max_tree_depth=DEPTH, max_cached_requests=-1)
        self._options = {"max_spec_tokens": (nodes or 80) - 1, "use_tree_spec": True}
        if nodes is not None:
            self._options |= {"max_spec_factor": float(nodes), "min_token_prob": 0.0}
        self._known: dict[int, int] = {}  # request -> tokens of it that the tree has
        self._run = 0

    def open(self, run: int) -> None:
        for request in self._known:
            self._cache.stop_request(request)
        self._known.clear()
        self._run = run

    def __call__(self, requests: Sequence[int], texts: Sequence[list[int]]) -> list[Proposal]:
        found: list[Proposal] = []
        for index, text in zip(requests, texts, strict=True):
            request = self._run * 1000 + index
            if request not in self._known:
                self._cache.start_request(request, np.array(text, np.int32))
            elif self._known[request] < len(text):
                self._cache.add_active_response(request, text[self._known[request] :])
            self._known[request] = len(text)
            context = np.array(text[-DEPTH:], np.int32)
            draft = self._cache.speculate(request, context, **self._options)
            found.append((draft.token_ids, draft.parents))
        return found
