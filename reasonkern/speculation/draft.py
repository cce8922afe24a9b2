"""`Draft`: the drafted tokens of a batch, as `verify_tree` takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._fields import documented


@documented
class Draft(NamedTuple):
    """One tree of drafted tokens per request: what `NgramTable.draft` returns.

    External drafters fill ``tokens`` and ``valid`` themselves and verify in an equality mode.

    Attributes:
        tokens: (B, N) int64: row b is the forward pass's input; column 0 the last committed token.
            Nodes that are not valid repeat it.
        valid: (B, N) bool: the node holds a draft (the root: the request is not padding).
        q_ids: (B, N, K) int64, rejection mode only: the tokens that the children of a node were
            drawn from; -1 = empty.
        q_logprob: (B, N, K) float32, rejection mode only: their log-probabilities after
            temperature, normalised over the entry; -inf = empty or of no mass.
    """

    tokens: Tensor
    valid: Tensor
    q_ids: Tensor | None = None
    q_logprob: Tensor | None = None
