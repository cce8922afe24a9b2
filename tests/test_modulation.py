"""`modulate_logits_` and `commit_`: rows against the literal loop, the wave, edges."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from contract import bits
from modulation_cases import (
    END,
    SETS,
    START,
    VOCAB,
    commit,
    make_state,
    modulate,
    one,
    random_prompt,
    random_spec,
    row_of,
    state_of,
)
from modulation_literal import Literal

import reasonkern as rk
from reasonkern.modulation import layout as at
from reasonkern.modulation import reference

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- rows


def random_rows(count: int, seed: int, dtype: torch.dtype):
    """(requests, tokens so far, logits, temperatures)."""
    r = random.Random(seed)
    requests = [(random_spec(r), random_prompt(r)) for _ in range(count)]
    likely = [0, 1, 2, 3, 7, 8, 9] * 4 + [END, START]
    tokens = [[r.choice(likely) for _ in range(r.randint(0, 20))] for _ in range(count)]
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, VOCAB, generator=g)
    logits[torch.rand(logits.shape, generator=g) < 0.1] = -INF
    heat = torch.tensor([r.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(count)])
    return requests, tokens, logits.to(dtype), heat


def test_rows_are_the_literal_ones(backend, dtype):
    count = 64 if backend.slow else 400
    requests, tokens, logits, heat = random_rows(count, 3, dtype)
    state = make_state(count)
    expected = torch.empty(count, VOCAB, dtype=torch.float64)
    forced = 0
    for i, (spec, prompt) in enumerate(requests):
        state.add(i, spec, prompt, tokens[i])
        literal = Literal(spec, SETS, prompt, tokens[i])
        row = literal.row(logits[i].tolist(), float(heat[i]))
        expected[i] = torch.tensor(row, dtype=torch.float64)
        forced += literal.forced() is not None
    got = modulate(backend, logits, state, torch.arange(count), temperature=heat)
    assert got.dtype == dtype
    finite = expected.isfinite()
    assert torch.equal(got.double()[~finite], expected[~finite])
    # One rounding of the sum to float32, one to the row's type, where it is not float64.
    rounding = {torch.float64: 1e-13, torch.float32: 2**-22}.get(dtype, torch.finfo(dtype).eps)
    error = (got.double() - expected)[finite].abs()
    assert (error <= rounding * expected[finite].abs().clamp_min(8.0)).all()
    changed = bits(got) != bits(logits)
    assert forced > count // 20 and changed.any(-1).float().mean() > 0.5


def test_rows_of_a_draft_are_rows_of_the_longer_text(backend):
    """Chain and tree rows, with a -1 that ends the fold, against a state that has the tokens."""
    parents = [-1, 0, 1, 1, 2, 0]
    paths = {0: [], 1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 2, 4], 5: [5]}
    count = 6 if backend.slow else 60
    requests, tokens, logits, heat = random_rows(count, 5, torch.float32)
    state = make_state(count)
    for i, (spec, prompt) in enumerate(requests):
        state.add(i, spec, prompt, tokens[i])
    g = torch.Generator().manual_seed(1)
    drafts = torch.randint(-1, VOCAB, (count, len(parents)), generator=g)
    rows = logits.repeat_interleave(len(parents), 0)
    hot = heat.repeat_interleave(len(parents))
    tree = torch.tensor(parents, dtype=torch.int32)
    got = modulate(backend, rows, state, torch.arange(count), None, drafts, tree, temperature=hot)
    chain = [0, 1, 2, 4]
    index = torch.arange(count)[:, None] * len(parents) + torch.tensor(chain)
    slots = torch.arange(count).repeat_interleave(len(chain))
    local = torch.arange(len(chain)).repeat(count)
    chained = modulate(
        backend, rows[index.flatten()], state, slots, local, drafts[:, chain].flatten(), None,
        temperature=hot[index.flatten()],
    )  # fmt: skip
    assert torch.equal(bits(chained), bits(got[index.flatten()]))
    for i, (spec, prompt) in enumerate(requests):
        for node, path in paths.items():
            text = [int(drafts[i, n]) for n in path]
            text = text[: text.index(-1)] if -1 in text else text
            row = row_of(backend, spec, logits[i], tokens[i] + text, prompt, float(heat[i]))
            assert torch.equal(bits(row), bits(got[i * len(parents) + node]))


def test_padding_and_free_slots_are_left_alone(backend):
    state = make_state(3)
    state.add(1, rk.Modulation(constant=rk.Constant(1.0)), [])
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    got = modulate(backend, logits, state, torch.tensor([-1, 0, 1, 2]))
    assert torch.equal(bits(got[[0, 1, 3]]), bits(logits[[0, 1, 3]]))
    assert not torch.equal(got[2], logits[2])
    before = state.tensors.progress.clone()
    tokens = torch.tensor([[1], [1], [1]])
    commit(backend, state, torch.tensor([-1, 2, 1]), tokens, torch.tensor([1, 1, 1]))
    before[1, [at.T, at.SPENT]] += 1
    assert torch.equal(state.tensors.progress, before)
    empty = modulate(backend, logits[:0], state, torch.tensor([], dtype=torch.int64))
    assert empty.shape == (0, VOCAB)


@pytest.mark.parametrize("stale", [-7, 3, 1000, 2**31 - 8, 2**40])
def test_padding_may_hold_any_position(backend, stale):
    state = state_of(rk.Modulation(constant=rk.Constant(1.0)))
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    slot, drafts = torch.tensor([0, 0, -1, -1, -1]), torch.zeros(5, dtype=torch.int64)
    got, expected = (
        modulate(backend, logits, state, slot, torch.tensor([0, 1, 0, x, x]), drafts, None)
        for x in (stale, 0)
    )
    assert torch.equal(bits(got), bits(expected)) and not torch.equal(got[:2], logits[:2])


def test_a_chain_of_more_than_the_rows(backend):
    """Refused where an operator looks at values; else it counts none of them."""
    spec = rk.Modulation(min_think=rk.MinThink(2, wait=[7]), think_end=END)
    state = state_of(spec)

    def last_row(local: int) -> torch.Tensor:
        chain = torch.tensor([0, 1, local]), torch.ones(3, dtype=torch.int64), None
        return modulate(backend, torch.zeros(3, VOCAB), state, torch.zeros(3).long(), *chain)[2]

    assert not torch.equal(last_row(2), last_row(0))
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match="local_pos: got 1099511627776 at 2"):
            last_row(2**40)
    else:
        assert torch.equal(last_row(2**40), last_row(0))


# ---- the wave


def exact_wave(amplitude: float, period: float, shift: float, t: int) -> Fraction:
    a, c, s = Fraction(amplitude), Fraction(period), Fraction(shift)
    return a * abs(4 * ((t + s * c - c / 4) % c) / c - 2) - a


@pytest.mark.parametrize("period", [1200, 600, 7, 1, 12.1, 0.3, 1e-3, 1e6 + 1 / 3])
@pytest.mark.parametrize("shift", [0.0, 0.25, -0.1, 0.999, 1e6 + 0.3, -1e-18])
def test_the_wave_is_exact(period, shift):
    r = random.Random(0)
    times = [*range(20), 2**31 - 1, 2**31, *(r.randrange(2**31) for _ in range(200))]
    times += [int(k * period / 4) for k in range(20)]
    # What the state keeps of the shift is its fraction, so that is what the law is about.
    numbers = one(rk.Modulation(cyclic=rk.Cyclic(5.0, period, shift))).tensors.numbers[0]
    kept = [numbers[k] for k in (at.AMPLITUDE, at.PERIOD, at.SHIFT)]
    got = reference.wave(*kept, torch.tensor(times)).tolist()
    for t, value in zip(times, got, strict=True):
        assert abs(Fraction(value) - exact_wave(5.0, period, float(kept[2]), t)) <= 1e-12
    whole = Fraction(shift) - Fraction(float(kept[2]))
    assert abs(whole - round(whole)) <= 1e-16 * max(1.0, abs(shift))


def test_the_operator_adds_the_wave(backend):
    """Late times, windows and periods that are not whole, through the operator."""
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    cases = [
        (5.0, 1200.0, 0.0, None), (3.0, 12.1, 0.3, None), (-2.0, 0.7, -0.4, None),
        (1.5, 1e-6, 0.3, None), (4.0, 600.0, 0.5, [(0, 10), (2**31 - 5, 2**31)]),
    ]  # fmt: skip
    times = [0, 1, 9, 10, 300, 900, 10**6 + 7, 2**31 - 6, 2**31 - 1, 2**31]
    state = make_state(len(cases) * len(times))
    expected = []
    for n, (amplitude, period, shift, windows) in enumerate(cases):
        for m, t in enumerate(times):
            slot = n * len(times) + m
            state.add(slot, rk.Modulation(cyclic=rk.Cyclic(amplitude, period, shift, windows)), [])
            state.tensors.progress[slot, at.T] = t
            inside = windows is None or any(low <= t < high for low, high in windows)
            kept = float(state.tensors.numbers[slot, at.SHIFT])
            expected.append(float(exact_wave(amplitude, period, kept, t)) if inside else 0.0)
    rows = torch.zeros(len(expected), VOCAB, dtype=dtype)
    got = modulate(backend, rows, state, torch.arange(len(expected))).double()
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    assert (got[:, 1] - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bound
    assert torch.equal(got[:, 1], got[:, 3]) and not got[:, 4:].any()
    assert sum(x == 0 for x in expected) >= 6


def test_landmarks_of_the_wave():
    t = torch.tensor([0, 300, 600, 900, 1200])
    a, c, s = torch.tensor([5.0, 1200.0, 0.0], dtype=torch.float64)
    assert reference.wave(a, c, s, t).tolist() == [0, 5, 0, -5, 0]
    assert reference.wave(-a, c, s, t).tolist() == reference.wave(a, c, s + 0.5, t).tolist()


def test_a_schedule_is_numpy_interp(backend):
    points = [(3, 1.0), (7, -2.0), (8, 4.0), (20, 4.5)]
    times = list(range(25))
    state = make_state(len(times))
    for slot in times:
        state.add(slot, rk.Modulation(schedule=rk.Schedule(points)), [], [0] * slot)
    got = modulate(backend, torch.zeros(len(times), VOCAB), state, torch.tensor(times))
    expected = np.interp(times, *zip(*points, strict=True)).astype(np.float32)
    assert got[:, 1].tolist() == expected.tolist()


# ---- edges


def test_an_amplitude_of_zero_changes_no_bit(backend, dtype):
    z = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[1], z[2], z[3] = -0.0, NAN, -INF
    spec = rk.Modulation(cyclic=rk.Cyclic(0.0, 7), constant=rk.Constant(0.0, "other"))
    for generated in ([], [0, 0], [5, 3, 1]):
        assert torch.equal(bits(row_of(backend, spec, z, generated)), bits(z))
    assert not torch.equal(bits(z + 0), bits(z))  # adding would have changed one
    opposite = rk.Modulation(
        constant=rk.Constant(1.0, "reflect"), schedule=rk.Schedule([(0, -1.0)], "other")
    )
    assert row_of(backend, opposite, -torch.zeros(VOCAB, dtype=dtype))[3].signbit()


def test_sums_of_overlapping_sets_are_rounded_once(backend):
    """Two additions of a third of an ulp each, and more, of parts with a common id."""
    third = 2.0**-25 / 3 * 4
    spec = rk.Modulation(
        constant=rk.Constant(third, "reflect"), schedule=rk.Schedule([(0, third)], "other")
    )
    z = torch.ones(VOCAB)
    got = row_of(backend, spec, z)
    single, double = torch.tensor(1 + third).float(), torch.tensor(1 + 2 * third).float()
    assert single == 1.0 and double > 1.0
    assert got[1] == single and got[4] == single and got[3] == double


def test_minus_infinity_and_nan_stay(backend, dtype):
    z = torch.zeros(VOCAB, dtype=dtype)
    z[1], z[2], z[6] = -INF, NAN, NAN
    spec = rk.Modulation(constant=rk.Constant(2.0), ban=rk.Ban("words"))
    got = row_of(backend, spec, z)
    assert got[1] == -INF and got[2].isnan() and got[6].isnan() and got[3] == 2


def test_a_ban_that_leaves_nothing_finite_is_not_applied(backend, dtype):
    spec = rk.Modulation(ban=rk.Ban("words"), constant=rk.Constant(1.0, "words"))
    z = torch.full((VOCAB,), -INF, dtype=dtype)
    z[6], z[0] = 1.0, NAN
    assert row_of(backend, spec, z)[6] == 2.0
    beside = replace(spec, constant=rk.Constant(1.0, "reflect"))  # which is at -inf, banned or not
    assert row_of(backend, beside, z)[6] == 1.0
    z[15] = INF  # not finite
    assert row_of(backend, spec, z)[6] == 2.0
    z[15] = 0.0
    assert row_of(backend, spec, z)[6] == -INF


def test_a_set_ends_where_the_next_one_begins(backend):
    """The first id of the next one is not its own, though larger than all of them."""
    sets = rk.TokenSets.from_ids({"first": [1], "second": [5], "third": [6]})
    state = rk.ModulationState(2, sets)
    state.add(0, rk.Modulation(ban=rk.Ban("first")), [])
    state.add(1, rk.Modulation(tip=rk.TIP(3.0, 2, "second")), [], [8, 8, 8, 6])  # no switch
    z = torch.full((2, VOCAB), -INF)
    z[:, [1, 5]] = 0.0
    got = modulate(backend, z, state, torch.arange(2))
    assert got[0, 1] == -INF and got[0, 5] == 0.0 and torch.equal(got[1], z[1])


def test_a_force_is_all_that_happens(backend, dtype):
    spec = rk.Modulation(
        constant=rk.Constant(1.0), ban=rk.Ban("words"), budget=rk.Budget(0, [6]),
    )  # fmt: skip
    z = torch.linspace(-1, 1, VOCAB).to(dtype)
    got = row_of(backend, spec, z)
    expected = z.clone()
    expected[6] = 3e4
    assert torch.equal(got, expected) and got.isfinite().all()
    for blocked in (-INF, NAN):
        z[6] = blocked
        got = row_of(backend, spec, z)
        assert got[1] == z[1] + 1 and got[2] == -INF and not got[6] > -INF


def test_forces_by_rank(backend):
    """The end of a stopped trace before the budget's phrase before the minimum's."""
    spec = rk.Modulation(
        budget=rk.Budget(2, [8, END]), min_think=rk.MinThink(0, 9, [0, 7, 7]), think_end=END,
        deepconf=rk.DeepConf(1.0, 1, eos=9),
    )  # fmt: skip
    z = torch.zeros(VOCAB)
    assert row_of(backend, spec, z, [0]).argmax() == 7
    assert row_of(backend, spec, z, [0, 7]).argmax() == 8
    state = one(spec, (), [0, 7])
    state.tensors.progress[0, at.STOPPED] = 1
    assert modulate(backend, z[None], state, torch.tensor([0])).argmax() == 9
    assert state.stopped.tolist() == [True]
    state.remove(0)
    assert state.stopped.tolist() == [False]
    state = one(replace(spec, deepconf=rk.DeepConf(1.0, 1)), (), [0, 7])  # without an end
    state.tensors.progress[0, at.STOPPED] = 1
    assert modulate(backend, z[None], state, torch.tensor([0])).argmax() == 8
    z[9] = -INF  # then nothing is forced, the phrase of the next rank neither
    state = one(spec, (), [0, 7])
    state.tensors.progress[0, at.STOPPED] = 1
    assert modulate(backend, z[None], state, torch.tensor([0])).max() < 3e4


def test_the_phrase_goes_on_after_the_end_of_thinking(backend):
    """[7, END, 8]: 8 is forced outside the thinking phase; a token between gives it up."""
    spec = rk.Modulation(budget=rk.Budget(1, [7, END, 8]), think_end=END)
    z = torch.zeros(VOCAB)
    for generated, forced in (
        ([0], 7), ([0, 7], END), ([0, 7, END], 8), ([0, 7, END, 8], None),
        ([0, 7, END, 7], None), ([0, END], None), ([END], None), ([0, 7, 7], END),
    ):  # fmt: skip
        got = row_of(backend, spec, z, generated)
        assert (got.max() == 3e4) == (forced is not None)
        assert forced is None or got.argmax() == forced


@pytest.mark.parametrize("phrase", [[7, 7, 9], [7, 7, 7, 9], [7, 8, 7, 7, 8, 7, 9], [7]])
def test_phrases_are_matched_as_the_text_says(backend, phrase):
    """Forced and interrupted at random, against the longest beginning that the text ends with."""
    r = random.Random(len(phrase))
    slots, steps = (4, 12) if backend.slow else (64, 40)
    spec = rk.Modulation(budget=rk.Budget(2, phrase))
    state = make_state(slots)
    texts: list[list[int]] = [[] for _ in range(slots)]
    for slot in range(slots):
        state.add(slot, spec, [])
    fallbacks = 0
    for _ in range(steps):
        got = modulate(backend, torch.zeros(slots, VOCAB), state, torch.arange(slots))
        for slot, text in enumerate(texts):
            place = Literal(spec, SETS, [], text).budget_next() if len(text) >= 2 else None
            assert (got[slot].max() == 3e4) == (place is not None)
            assert place is None or got[slot].argmax() == phrase[place]
            honoured = place is not None and r.random() < 0.5
            text.append(phrase[place] if honoured else r.choice(phrase))
            after = Literal(spec, SETS, [], text).budget_next() if len(text) > 2 else None
            fallbacks += place is not None and after is not None and 0 < after <= place
        commit(backend, state, torch.arange(slots), torch.tensor([[t[-1]] for t in texts]),
               torch.ones(slots, dtype=torch.int64))  # fmt: skip
    assert fallbacks > 0 or len(phrase) == 1


# ---- minimum thinking


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_waiting_is_replacing_the_end(backend, temperature):
    """softmax(z / T) with the end's mass moved to the wait, exactly."""
    if torch.float64 not in backend.dtypes:
        pytest.skip("the law is compared in float64")
    spec = rk.Modulation(
        min_think=rk.MinThink(2, 0, [0, 7]), think_end=END, constant=rk.Constant(1.5),
        cyclic=rk.Cyclic(3.0, 9, 0.2, set="other"),
    )  # fmt: skip
    g = torch.Generator().manual_seed(2)
    temperature = float(torch.tensor(temperature))  # what float32 holds
    for case in range(20):
        z = 4 * torch.randn(VOCAB, generator=g, dtype=torch.float64)
        z[torch.rand(VOCAB, generator=g) < 0.2] = -INF
        if case < 3:
            z[END], z[0] = ((0.0, 0.0), (80.0, -80.0), (-80.0, 80.0))[case]
        if z[0] == -INF:
            continue
        plain = Literal(rk.Modulation(constant=spec.constant, cyclic=spec.cyclic), SETS, [])
        p = (torch.tensor(plain.row(z.tolist(), 1.0), dtype=torch.float64) / temperature).softmax(
            -1
        )
        p[0], p[END] = p[0] + p[END], 0.0
        got = row_of(backend, spec, z, temperature=temperature)
        assert ((got / temperature).softmax(-1) - p).abs().sum() / 2 < 1e-12


def test_waiting_at_every_distance(backend):
    """T log(1 + e^(-d / T)) itself: the likelier of the two has a logit of 0."""
    wide = torch.float64 in backend.dtypes
    distance = torch.cat((torch.zeros(1), torch.logspace(-12, 2.8, 149))).double().repeat(4)
    heat = torch.tensor([0.03, 0.6, 1.0, 100.0]).repeat_interleave(150)
    share = distance / heat.double()
    assert (share < 1e-9).sum() > 50 and (share > 750).sum() > 10
    kept = (share < 700) | (share > 750)  # between them lie numbers of fewer bits
    if backend.name == "triton" and backend.slow:  # a row takes tens of milliseconds
        kept &= torch.arange(len(share)) % 5 == 0
    distance, heat, share = distance[kept], heat[kept], share[kept]
    logits = torch.zeros(len(share), VOCAB, dtype=torch.float64 if wide else torch.float32)
    logits[:, END] = -distance.to(logits.dtype)
    logits[::2] = -logits[::2] - distance[::2, None].to(logits.dtype)  # the wait is the less likely
    logits[::2, END] = 0.0
    state = one(rk.Modulation(min_think=rk.MinThink(2, 0, [0]), think_end=END))
    slot = torch.zeros(len(share), dtype=torch.int64)
    got = modulate(backend, logits, state, slot, temperature=heat)[:, 0].double()
    expected = heat.double() * torch.log1p(torch.exp(-share))
    slack = 4e-15 if wide else 3e-7
    torch.testing.assert_close(got, expected, rtol=slack, atol=0 if wide else 1e-40)


def test_waiting_greedily_and_where_it_is_not_allowed(backend):
    spec = rk.Modulation(min_think=rk.MinThink(2, 0, [0]), think_end=END)
    z = torch.zeros(VOCAB)
    z[END], z[0] = 3.0, 1.0
    got = row_of(backend, spec, z, temperature=0.0)
    assert got[0] == 3.0 and got[END] == -INF and got.argmax() == 0
    z[0] = -INF
    assert torch.equal(row_of(backend, spec, z, temperature=0.0), z)
    for heat in (0.0, 1.0):
        for pair in ((NAN, 1.0), (1.0, NAN), (INF, INF)):
            z[0], z[END] = pair
            got, expected = row_of(backend, spec, z, temperature=heat)[0], z[0] + z[END]
            assert torch.equal(got, expected) or got.isnan() and expected.isnan()
    z[0], z[END] = 1.0, 3.0
    bare = modulate(backend, z[None], one(spec), torch.tensor([0]))[0]  # no temperature
    assert torch.equal(bits(bare), bits(row_of(backend, spec, z)))
    z[0], z[END] = 1.0, -INF
    assert torch.equal(row_of(backend, spec, z), z)
    assert row_of(backend, spec, torch.zeros(VOCAB), [4, 4])[END] == 0


def test_each_wait_uses_up_an_end(backend):
    """Natural or not, and the rest of its phrase is forced; [0, 0] counts once."""
    spec = rk.Modulation(min_think=rk.MinThink(0, 2, [0, 0, 8]), think_end=END)
    state = one(spec)
    expected = [(0, 1, 1), (0, 2, 1), (8, 0, 1), (3, 0, 1), (0, 1, 0), (0, 2, 0), (8, 0, 0)]
    for token, place, left in expected:
        commit(backend, state, torch.tensor([0]), torch.tensor([[token]]), torch.tensor([1]))
        progress = state.tensors.progress[0]
        assert (progress[at.WAIT_AT], progress[at.IGNORE]) == (place, left)
    got = modulate(backend, torch.zeros(1, VOCAB), state, torch.tensor([0]))
    assert got[0, END] == 0


# ---- soft budgets


def test_a_soft_budget_ramps_and_stays_below_the_top(backend, dtype):
    spec = rk.Modulation(budget=rk.Budget(10, [7, END], rk.SoftBudget(0.5)), think_end=END)
    z = torch.zeros(VOCAB, dtype=dtype)
    z[4], z[7], z[3] = 8.0, -8.0, INF  # an infinity is no target
    values = [float(row_of(backend, spec, z, [1] * n)[7]) for n in range(11)]
    ramp = [-8.0 + 15.75 * k / 5 for k in range(5)]
    assert values[:6] == [-8.0] * 6 and values[10] == torch.tensor(3e4).to(dtype)
    error = max(abs(a - b) for a, b in zip(values[5:10], ramp, strict=True))
    assert error <= 8 * torch.finfo(dtype).eps
    assert row_of(backend, spec, z, [1] * 7 + [7])[END] > 0  # the next id of the phrase
    sooner = rk.Modulation(budget=rk.Budget(10, [7, END], rk.SoftBudget(0.45)), think_end=END)
    assert row_of(backend, sooner, z, [1] * 5)[7] > row_of(backend, sooner, z, [1] * 4)[7]
    early = rk.Modulation(budget=rk.Budget(10, [END, 7], rk.SoftBudget(0.5)), think_end=END)
    assert torch.equal(row_of(backend, early, z, [1] * 9 + [END]), z)  # the budget is not spent
    assert torch.equal(row_of(backend, spec, z, [1] * 9, dense=False), z)
    z[7] = 8.0
    assert torch.equal(row_of(backend, spec, z, [1] * 9), z)
    z[7] = -INF
    assert torch.equal(row_of(backend, spec, z, [1] * 9), z)
    z[:] = -8.0
    z[4] = -4.0
    assert row_of(backend, spec, z, [1] * 9)[7] == -8.0 + 0.8 * 3.75
