"""Places in the state's two tensors; csrc/modulation/modulation.h has the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._fields import documented

LAYOUT = 1  # of saved states; another one once a place moves
MAX_SETS = 32
MAX_WINDOWS, MAX_POINTS = 8, 32  # of a cyclic part, of a schedule
MAX_END, MAX_WAIT = 64, 32  # ids of a budget's and of a minimum's phrase
MAX_CONFIDENCE, MAX_ENTROPY = 2048, 64  # values of a window

# Bits of PARTS. A slot without ACTIVE is free: its rows are left alone, its tokens not counted.
ACTIVE, CYCLIC, TIP, CONSTANT, SCHEDULE, BAN = 1, 2, 4, 8, 16, 32
BUDGET, SOFT, MIN_THINK, DEEPCONF, TRIGGER = 64, 128, 256, 512, 1024
ADDERS = (CYCLIC, TIP, CONSTANT, SCHEDULE)  # parts in the order of ADDED_SETS

# records (S, RECORD_WIDTH) int64: a row per slot. Columns marked "double" hold the bits of a
# float64. What every row of logits reads is in the first lines of 64 bytes.

# What the committed tokens have made of it.
T, SPENT, SWITCH, PHASE, PHRASE, WAIT_AT, IGNORE, STOPPED = 0, 1, 2, 3, 4, 5, 6, 7
CONFIDENCE_PUSHED, ENTROPY_PUSHED = 8, 9
CONFIDENCE_SUM = 10  # of the confidences in the ring; double
PROGRESS_WIDTH = 11

# What was asked for. An absent id is -1.
PARTS, MAX_ID = 11, 12  # MAX_ID: the largest id that is written to, beside those of the sets
THINK_END, WINDOWS, POINTS = 13, 14, 15
ADDED_SETS = 16  # one of each of ADDERS
BAN_SET, TIP_SPAN, BUDGET_TOKENS, MIN_TOKENS = 20, 21, 22, 23
AMPLITUDE, PERIOD, SHIFT, ALPHA, BIAS, SOFT_FROM, SOFT_MARGIN = range(24, 31)  # double
WAIT = 31  # the minimum's phrase
TRACK_FROM, THINK_START, END_LENGTH, WAIT_LENGTH, EOS = range(WAIT + MAX_WAIT, WAIT + MAX_WAIT + 5)
CONFIDENCE_WINDOW, ENTROPY_WINDOW = 68, 69
CONFIDENCE_THRESHOLD, ENTROPY_FACTOR, ENTROPY_FLOOR, ENTROPY_STD, ENTROPY_FIRST = range(70, 75)
WINDOW = 80  # MAX_WINDOWS pairs low, high
POINT = WINDOW + 2 * MAX_WINDOWS  # MAX_POINTS pairs t, d; d is double
END = POINT + 2 * MAX_POINTS  # the budget's phrase
FAILURE = END + MAX_END  # of its Knuth-Morris-Pratt automaton
ROW_WIDTH = FAILURE + MAX_END

# Rings of float32, two to a column: push number n is at n modulo the window.
CONFIDENCE_RING = ROW_WIDTH
ENTROPY_RING = CONFIDENCE_RING + MAX_CONFIDENCE // 2
RECORD_WIDTH = ENTROPY_RING + MAX_ENTROPY // 2

# sets (SET_ENTRIES + K,) int64: bounds, of which s and s + 1 are where the entries of set s begin
# and end; the largest id of all sets and requests; from SET_ENTRIES on the K entries, ids ascending
# within a set: the id, and bit SET_BITS + s where set s holds it.
LARGEST_ID, SET_ENTRIES, SET_BITS = MAX_SETS + 1, 40, 32

BEFORE, THINKING, CLOSED = 0, 1, 2  # PHASE
DONE = -1  # PHRASE, once the budget's phrase is complete or given up


@documented
class Storage(NamedTuple):
    """Tensors of a state of S slots over sets with K entries, and views of what they hold.

    Attributes:
        records: (S, RECORD_WIDTH) int64, a row per slot: counts and places in tokens, ids, and the
            bits of float64 numbers, in the columns that this module names; a free slot has 0 in
            PARTS.
        sets: (SET_ENTRIES + K,) int64, shared by the slots: MAX_SETS + 1 bounds, in entries; the
            largest id; the entries, ids in bits 0 to 31 and the sets that hold them from SET_BITS.
    """

    records: Tensor
    sets: Tensor

    @property
    def progress(self) -> Tensor:
        """(S, PROGRESS_WIDTH) int64: what the committed tokens have made of each request."""
        return self.records[:, :PROGRESS_WIDTH]

    @property
    def numbers(self) -> Tensor:
        """(S, RECORD_WIDTH) float64: the columns that are double."""
        return self.records.view(torch.float64)

    @property
    def confidence(self) -> Tensor:
        """(S, MAX_CONFIDENCE) float32 ring of confidences, in nats."""
        return self.records[:, CONFIDENCE_RING:ENTROPY_RING].view(torch.float32)

    @property
    def entropy(self) -> Tensor:
        """(S, MAX_ENTROPY) float32 ring of entropies, in nats."""
        return self.records[:, ENTROPY_RING:].view(torch.float32)

    @property
    def set_ids(self) -> Tensor:
        """(K,) int64: the entries' token ids, ascending within a set."""
        return self.sets[SET_ENTRIES:] & ((1 << SET_BITS) - 1)

    @property
    def set_member(self) -> Tensor:
        """(K,) int64: bit s is set where set s holds the entry's id."""
        return (self.sets[SET_ENTRIES:] >> SET_BITS) & ((1 << MAX_SETS) - 1)
