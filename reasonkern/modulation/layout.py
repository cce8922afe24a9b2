"""Columns of the state's tensors, one row per slot; csrc/modulation/modulation.h has the same."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_SETS = 32
MAX_WINDOWS, MAX_POINTS = 8, 32  # of a cyclic part, of a schedule
MAX_END, MAX_WAIT = 64, 32  # ids of a budget's and of a minimum's phrase
MAX_CONFIDENCE, MAX_ENTROPY = 2048, 64  # values of a window

# Bits of PARTS. A slot without ACTIVE is free: its rows are left alone, its tokens not counted.
ACTIVE, CYCLIC, TIP, CONSTANT, SCHEDULE, BAN = 1, 2, 4, 8, 16, 32
BUDGET, SOFT, MIN_THINK, DEEPCONF, TRIGGER = 64, 128, 256, 512, 1024
ADDERS = (CYCLIC, TIP, CONSTANT, SCHEDULE)  # parts in the order of ADDED_SETS

# spec (S, SPEC_WIDTH) int64: what was asked for. An absent id is -1.
PARTS, THINK_START, THINK_END = 0, 1, 2
ADDED_SETS = 3  # one of each of ADDERS
BAN_SET = 7
TIP_SPAN, BUDGET_TOKENS, TRACK_FROM, END_LENGTH, MIN_TOKENS, WAIT_LENGTH = 8, 9, 10, 11, 12, 13
WINDOWS, POINTS, EOS, CONFIDENCE_WINDOW, ENTROPY_WINDOW = 14, 15, 16, 17, 18
MAX_ID = 19  # the largest id that the request writes to, beside those of the sets
WINDOW = 24  # MAX_WINDOWS pairs low, high
POINT_T = WINDOW + 2 * MAX_WINDOWS
END = POINT_T + MAX_POINTS
FAILURE = END + MAX_END  # of the Knuth-Morris-Pratt automaton of END
WAIT = FAILURE + MAX_END
SPEC_WIDTH = WAIT + MAX_WAIT

# numbers (S, NUMBERS_WIDTH) float64
AMPLITUDE, PERIOD, SHIFT, ALPHA, BIAS, SOFT_FROM, SOFT_MARGIN = 0, 1, 2, 3, 4, 5, 6
CONFIDENCE_THRESHOLD, ENTROPY_FACTOR, ENTROPY_FLOOR, ENTROPY_STD, ENTROPY_FIRST = 7, 8, 9, 10, 11
POINT_VALUE = 16
NUMBERS_WIDTH = POINT_VALUE + MAX_POINTS

# progress (S, PROGRESS_WIDTH) int64: what the committed tokens have made of it
T, SPENT, SWITCH, PHASE, PHRASE, WAIT_AT, IGNORE, STOPPED = 0, 1, 2, 3, 4, 5, 6, 7
CONFIDENCE_PUSHED, ENTROPY_PUSHED = 8, 9
PROGRESS_WIDTH = 16

BEFORE, THINKING, CLOSED = 0, 1, 2  # PHASE
DONE = -1  # PHRASE, once the budget's phrase is complete or given up


class Storage(NamedTuple):
    """Tensors of a state of S slots over sets with K entries."""

    spec: Tensor
    """(S, SPEC_WIDTH) int64."""
    numbers: Tensor
    """(S, NUMBERS_WIDTH) float64."""
    progress: Tensor
    """(S, PROGRESS_WIDTH) int64."""
    set_offsets: Tensor
    """(sets + 1,) int32: set s has the entries ``set_offsets[s] : set_offsets[s + 1]``."""
    set_ids: Tensor
    """(K,) int32, ascending within a set."""
    set_member: Tensor
    """(K,) int64: bit s is set where set s holds this entry's id."""
    confidence: Tensor
    """(S, MAX_CONFIDENCE) float32 ring: push number n is at n mod CONFIDENCE_WINDOW."""
    entropy: Tensor
    """(S, MAX_ENTROPY) float32 ring: push number n is at n mod ENTROPY_WINDOW."""
    confidence_sum: Tensor
    """(S,) float64 sum of the confidences in the ring."""
