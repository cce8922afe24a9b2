"""`sample_controlled` and `verify_tree(control=)`: control exact under speculation, what the table
sees, windows against a literal loop."""

from __future__ import annotations

import re
import statistics
from collections import deque
from functools import partial

import pytest
import torch
from contract import assert_same_bits, run_contract
from modulation_sampler_cases import (
    END,
    EOS,
    SETS,
    VOCAB,
    Engine,
    call,
    decode_both_ways,
    random_requests,
)
from speculation_cases import generator, random_logits, random_mask, random_step, rows

import reasonkern as rk
from reasonkern.modulation import layout

SLOW_SEED = 108  # of a few requests among which one is stopped
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def sampler(backend):
    """A backend with a sampler under control."""
    for op in ("sample_controlled", "verify_controlled", "modulate_logits_", "commit_"):
        try:
            backend.function(op)
        except (RuntimeError, StopIteration) as error:
            pytest.skip(f"{backend.name} has no {op}: {error}")
    return backend


def interpreted(backend) -> bool:
    """A row takes tenths of a second there."""
    return backend.name == "triton" and backend.slow


def effort(backend, slow: int, reference: int, fast: int) -> int:
    return slow if backend.slow else reference if backend.name == "reference" else fast


# ---- exact under speculation


def test_a_tree_says_what_single_steps_say(sampler):
    """Tokens and the bits of every statistic, for every control, over trees and chains."""
    accepted, triggers, stopped, forced = 0, 0, 0, 0
    count, steps = (3, 8) if sampler.slow else (8, 24)
    for seed in (SLOW_SEED,) if sampler.slow else range(effort(sampler, 0, 3, 40)):
        plain, by_trees, more = decode_both_ways(sampler, count, steps, seed)
        accepted += more
        for b in range(count):
            assert by_trees.text[b][:steps] == plain.text[b], (seed, plain.requests[b])
            assert by_trees.told[b][:steps] == plain.told[b], (seed, plain.requests[b])
            triggers += sum(row[-1] for row in plain.told[b])
            forced += sum(row[0] == 0 for row in plain.told[b])  # logprob 0
        stopped += int(plain.state.stopped.sum())
    assert accepted > 10 and triggers > 0 and forced > 3 and stopped > 0


def test_a_walk_leaves_the_state_alone(sampler):
    count = 2 if sampler.slow else 6
    engine = Engine(random_requests(count, 3), sampler, list(range(count)))
    for _ in range(count):
        engine.step()
    before = [t.clone() for t in engine.state.tensors]
    commits, engine.commit = engine.commit, lambda *args: None
    engine.speculate(rk.DraftTree.chain(count), [[]] * count, 0)
    engine.step()
    assert_same_bits(list(engine.state.tensors), before)
    engine.commit = commits
    engine.step()
    assert not torch.equal(engine.state.tensors.records, before[0])


# ---- the row under control


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_token_is_that_of_sampling_modulated_logits(sampler, dtype, masked):
    """... in float32, where the control adds; the raw row is not changed."""
    changed = 0
    if dtype not in sampler.dtypes:
        pytest.skip(f"{sampler.name} does not take {dtype}")
    if interpreted(sampler) and masked == (dtype != torch.float32):
        pytest.skip("rows are interpreted for seconds: one of each kind")
    count = 4 if interpreted(sampler) else 9
    first = int(interpreted(sampler) and dtype == torch.bfloat16)  # other requests than fp32's
    for seed in range(first, first + effort(sampler, 1, 4, 30)):
        engine = Engine(random_requests(count, seed), sampler, list(range(count)))
        for _ in range(seed % 12):
            engine.step()
        state, slot = engine.state, torch.tensor([*range(count), -1, count])
        vocab = (VOCAB, 1500, 4099)[seed % (2 if sampler.slow else 3)]
        logits = random_logits((count + 2, vocab), seed, dtype)
        mask = (
            random_mask(logits.shape, seed) | random_mask(logits.shape, ~seed) if masked else None
        )
        r = rows(count + 2, vocab, seed, "off" if interpreted(sampler) else "mixed")
        before = logits.clone()
        token, *told = engine.op("sample_controlled", logits, mask, *r.args(), slot,
                                 list(state.tensors))  # fmt: skip
        assert torch.equal(logits, before)
        z = logits.float().clone()
        if mask is not None:
            allowed = (mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
            z = torch.where(allowed.flatten(-2)[:, :vocab].bool(), z, -torch.inf)
        z = sampler.to(z)
        engine.op("modulate_logits_", z, slot, None, None, None, r.temperature, *state.tensors,
                  True)  # fmt: skip
        z = z.cpu()
        assert_same_bits(token, engine.op("sample", z, None, *r.args()))
        again, *expected = engine.op("sample_controlled", z, None, *r.args(), None, [])
        assert_same_bits(again, token)
        for index in (0, 1, 3, 4):  # entropy_raw is of the raw row
            assert_same_bits(told[index], expected[index])
        raw = engine.op("sample_controlled", logits, None, *r.args(), None, [])
        assert_same_bits(told[2], raw[3])
        changed += int((token != raw[0]).sum())
    assert changed > 0


def test_a_ban_may_take_the_top_and_the_rest_still_counts(sampler):
    """What is below the sums' horizon of the raw row is the whole law once the top is banned."""
    state = rk.ModulationState(1, rk.TokenSets.from_ids({"top": [3000]}))
    state.add(0, rk.Modulation(ban=rk.Ban("top")), prompt_tokens=[])
    logits = torch.randn(1, 5000, generator=generator(0))
    expected = logits.clone()
    expected[0, 3000] = -torch.inf
    logits[0, 3000] = 500.0
    r = rows(1, 5000, 4, "off")
    op = partial(call, sampler, "sample_controlled")
    _, *got = op(logits, None, *r.args(), torch.tensor([0]), list(state.tensors))
    _, *want = op(expected, None, *r.args(), None, [])
    for index in (0, 1, 3, 4):
        torch.testing.assert_close(got[index], want[index], rtol=1e-6, atol=1e-6)
    assert got[2].item() < 1e-6 < 6 < got[1].item()


def test_control_may_overflow(sampler):
    """A logit that control makes +inf spoils the law and not what is said of the raw row."""
    state = rk.ModulationState(1, SETS)
    spec = rk.Modulation(constant=rk.Constant(3e38, set="reflect"))
    state.add(0, spec, prompt_tokens=[])
    logits, tree = random_logits((1, 2, VOCAB), 1), rk.DraftTree.chain(2)
    logits[0, 0, 3] = 3e38
    slot, tensors = torch.tensor([0]), list(state.tensors)
    r, more = rows(1, VOCAB, 1, "off").args(), (None, None, None, None, 1, 1, 4)
    draft = torch.tensor([[0, 11]]), torch.ones(1, 2).bool(), None, None
    token, *told = call(sampler, "sample_controlled", logits[:, 0], None, *r, slot, tensors)
    assert token.item() == 8 and told[2].item() == 0.0
    assert [x.item() for x in (*told[:2], *told[3:5])] == [-torch.inf] * 4
    given = logits, *draft, *tree.children, *r, *more
    out = call(sampler, "verify_controlled", *given, slot, tensors, True)
    assert out[0].tolist() == [[8, -1]] and out[6].item() == rk.Status.BAD_ROW
    expected = call(sampler, "verify_tree", *given)
    for index in (3, 4, 5):
        assert_same_bits(out[index][:, 0], expected[index][:, 0])
    assert_same_bits([x[:, 0] for x in out[7:]], told)


# ---- the table


def test_the_table_never_learns_of_control():
    """The same text with and without control, which moves every row: the same table, bit by bit."""
    torch.manual_seed(0)
    vocab, nodes, batch = 3000, 5, 4
    text = torch.randint(100, vocab, (batch, nodes))
    logits = torch.randn(batch, nodes, vocab)
    logits.scatter_(-1, text.unsqueeze(-1), 30.0)
    logits[..., 5] = 9.0  # banned, always second
    sets = rk.TokenSets.from_ids({"reflect": range(50), "ban": [5, 7]})
    state = rk.ModulationState(batch, sets)
    spec = rk.Modulation(cyclic=rk.Cyclic(5.0, 8, shift=0.1), ban=rk.Ban("ban"))
    tables = []
    for control in (None, (state, torch.arange(batch))):
        if control is not None:
            for b in range(batch):
                state.add(b, spec, prompt_tokens=[1])
        table = rk.NgramTable(1 << 12, orders=(2, 1), topk=12)
        draft = rk.Draft(torch.cat((text[:, :1], text[:, :-1]), 1), torch.ones(batch, nodes).bool())
        out = rk.verify_tree(logits, draft, rk.DraftTree.chain(nodes), temperature=0.6, top_p=0.95,
                             seed=torch.arange(batch), position=0, control=control)  # fmt: skip
        assert torch.equal(out.tokens, text) and (out.topk_ids[..., 1] == 5).all()
        table.update_verified(text[:, :2].flip(1).contiguous(), out)
        tables.append(table.state_dict())
    for key, value in tables[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, tables[1][key]), key
    z = logits[:, 1].clone()
    rk.modulate_logits_(z, state, torch.arange(batch))
    assert torch.isinf(z[:, 5]).all()  # control was at work


# ---- windows


class Literal:
    """A request's windows as its code would keep them in Python."""

    def __init__(self, deepconf: rk.DeepConf, trigger: rk.EntropyTrigger) -> None:
        self.deepconf, self.trigger = deepconf, trigger
        self.confidence: deque[float] = deque(maxlen=deepconf.window)
        self.entropy: deque[float] = deque(maxlen=trigger.window)
        self.stopped = False

    def push(self, entropy: float, confidence: float) -> None:
        self.entropy.append(entropy)
        self.confidence.append(confidence)
        full = len(self.confidence) == self.deepconf.window
        if full and sum(self.confidence) / self.deepconf.window < self.deepconf.threshold:
            self.stopped = True

    def threshold(self) -> float:
        t = self.trigger
        if len(self.entropy) < t.window:
            return t.first
        spread = max(statistics.stdev(self.entropy), t.min_std)
        return max(t.floor, statistics.mean(self.entropy) + t.k * spread)


@pytest.mark.parametrize("window", [2048, 37])
def test_windows_equal_a_literal_loop(sampler, window):
    """5,000 steps of up to four accepted rows, the rest rejected; every stop and every trigger."""
    steps, batch = effort(sampler, 40, 300, 5000), 3
    if interpreted(sampler):
        steps, window = 5, 3 if window < 100 else window  # one that fills, one that does not
    deepconf = [rk.DeepConf(x, window) for x in (11.9, 12.02, 0.0)]
    trigger = [rk.EntropyTrigger(25, 2.0, 1.0, 0.1, 2.0), rk.EntropyTrigger(), rk.EntropyTrigger(2)]
    state = rk.ModulationState(batch + 1, device=sampler.device)  # without sets
    literal = [Literal(d, t) for d, t in zip(deepconf, trigger, strict=True)]
    slot = torch.tensor([2, 0, 3])
    for s, d, t in zip(slot.tolist(), deepconf, trigger, strict=True):
        state.add(s, rk.Modulation(deepconf=d, entropy_trigger=t), prompt_tokens=[])
    g = generator(1)
    drift = torch.sin(torch.arange(steps) / 300)
    entropy = torch.rand(steps, batch, 4, generator=g) ** 3 * 3
    confidence = 12 + torch.randn(steps, batch, 4, generator=g) + drift[:, None, None]
    length = torch.randint(0, 5, (steps, batch), generator=g)
    tokens = torch.randint(8, VOCAB, (batch, 4), generator=g)
    logits = torch.randn(batch, VOCAB, generator=g)
    r = rows(batch, VOCAB, 1, "off")
    commit, sample = (partial(call, sampler, x) for x in ("commit_", "sample_controlled"))
    seen = {"triggers": 0, "stops": 0}
    for i in range(steps):
        row = logits * (0.2 + 3 * (i % 17) / 17)
        _, _, h, _, _, _, got = sample(row, None, *r.args(), slot, list(state.tensors))
        bounds = [x.threshold() for x in literal]
        for b in range(batch):
            if abs(float(h[b]) - bounds[b]) > 1e-9:
                assert bool(got[b]) == (float(h[b]) > bounds[b]), (i, b)
        seen["triggers"] += int(got.sum())
        commit(slot, tokens, length[i], entropy[i], confidence[i], *state.tensors)
        for b in range(batch):
            for j in range(int(length[i, b])):
                literal[b].push(float(entropy[i, b, j]), float(confidence[i, b, j]))
        assert state.stopped.cpu()[slot].tolist() == [x.stopped for x in literal], i
    seen["stops"] = sum(x.stopped for x in literal)
    assert seen["triggers"] > steps / 250
    if steps == 5000:
        assert seen["stops"] == 2


def test_a_stopped_request_gets_its_end_in_the_same_step(sampler):
    """The second row of a step is forced when the first one's confidence stops the request."""
    state = rk.ModulationState(1)
    deepconf = rk.DeepConf(10.0, window=1, eos=EOS)  # flat rows have a confidence of ln V
    state.add(0, rk.Modulation(deepconf=deepconf), prompt_tokens=[])
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, :, 11] = 1e-3
    tree = rk.DraftTree.chain(4)
    r = [x.clone() for x in rows(1, VOCAB, 1, "off").args()]
    r[0].zero_()
    out = call(
        sampler, "verify_controlled", logits, torch.tensor([[0, 11, EOS, EOS]]),
        torch.ones(1, 4).bool(), None, None, *tree.children, *r, None, None, None, None, tree.depth,
        tree.max_children, 1, torch.tensor([0]), list(state.tensors), True,
    )  # fmt: skip
    assert out[0].tolist() == [[11, EOS, EOS, EOS]] and not state.stopped[0]
    assert out[7][0, 1] == 0  # logprob of a forced token


# ---- the fronts


def small_state() -> rk.ModulationState:
    state = rk.ModulationState(3, SETS)
    spec = rk.Modulation(
        cyclic=rk.Cyclic(3.0, 8, shift=0.25), budget=rk.Budget(6, [10, END], rk.SoftBudget(0.2)),
        min_think=rk.MinThink(3, 1, [7, 14]), deepconf=rk.DeepConf(3.0, 2, eos=EOS),
        entropy_trigger=rk.EntropyTrigger(2, 0.0, 0.1, 0.1, 0.5), think_end=END,
    )  # fmt: skip
    state.add(0, spec, prompt_tokens=[1], generated_tokens=[3, 4, 8, 9])
    state.add(2, rk.Modulation(ban=rk.Ban(), tip=rk.TIP(2.0, 3)), prompt_tokens=[1])
    return state


def test_the_fronts_call_the_operators():
    state, slot = small_state(), torch.tensor([0, -1, 2])
    logits = random_logits((3, VOCAB), 1)
    r = rows(3, VOCAB, 1)
    keys = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    filters = dict(zip(keys, r.args(), strict=True))
    out = rk.sample_controlled(logits, state, slot, **filters)
    direct = torch.ops.reasonkern.sample_controlled(
        logits, None, *r.args(), slot, list(state.tensors)
    )
    assert_same_bits(list(out), direct)
    step = random_step(2, batch=3, vocab=VOCAB, limits=False)
    draft = rk.Draft(step.tokens, step.valid)
    filters = dict(zip(keys, step.rows.args(), strict=True))
    got = rk.verify_tree(step.logits, draft, step.tree, **filters, topk=4, control=(state, slot),
                         stats=True)  # fmt: skip
    expected = torch.ops.reasonkern.verify_controlled(*step.args(), slot, list(state.tensors), True)
    assert_same_bits(list(got), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": 3}, "state: expected a ModulationState beside a slot, got int"),
        ({"state": None}, "state: expected a ModulationState beside a slot, got NoneType"),
        ({"slot": None}, "slot: expected a (R,) tensor beside a state, got None"),
        ({"slot": torch.tensor([0, 1])}, "slot: expected shape (R,) = (3,)"),
        ({"slot": torch.tensor([0, 1, 2], dtype=torch.int32)}, "slot: expected dtype torch.int64"),
        ({"slot": torch.tensor([0, 1, 3])}, "slot: expected values in [-1, 3), got 3 at (2,)"),
        ({"slot": torch.tensor([0, -2, 1])}, "slot: expected values in [-1, 3), got -2 at (1,)"),
        ({"logits": torch.zeros(3, 20)}, "logits: expected a vocabulary that holds the state's "
         "ids, up to 21, got (3, 20)"),
        ({"logits": torch.zeros(3, 2, VOCAB)}, "logits: expected shape (R, V)"),
        ({"temperature": -1.0}, "temperature: expected finite values >= 0, got -1.0"),
        ({"mask": torch.zeros(3, 1)}, "mask: expected dtype torch.int32"),
    ],
)  # fmt: skip
def test_errors_of_the_sampler(changes, message):
    args = {
        "logits": torch.zeros(3, VOCAB), "state": small_state(), "slot": torch.tensor([0, -1, 2]),
        "temperature": 1.0, "seed": 0, "position": 0,
    }  # fmt: skip
    args |= changes
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        rk.sample_controlled(**args)


def verify(**changes):
    step = random_step(2, batch=3, nodes=3, vocab=VOCAB, limits=False)
    args = {
        "logits": step.logits, "draft": rk.Draft(step.tokens, step.valid), "tree": step.tree,
        "temperature": 1.0, "seed": 0, "position": 0, "stats": True,
    }  # fmt: skip
    return rk.verify_tree(**(args | changes))


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (lambda s: s, "control: expected a tuple"),
        (lambda s: (s,), "control: expected a tuple"),
        (lambda s: (s, torch.tensor([0])), "slot: expected shape"),
        (lambda s: (None, torch.tensor([0, 1, 2])), "state: expected a ModulationState"),
    ],
)
def test_errors_of_control(control, message):
    with pytest.raises(ValueError, match="^" + message):
        verify(control=control(small_state()))


def test_windows_need_statistics():
    with pytest.raises(ValueError, match="^stats: expected True for requests with a DeepConf or "):
        verify(control=(small_state(), torch.tensor([0, -1, 2])), stats=False)
    plain = rk.ModulationState(3, SETS)
    plain.add(1, rk.Modulation(ban=rk.Ban()), prompt_tokens=[])
    out = verify(control=(plain, torch.tensor([0, 1, 2])), stats=False)
    assert out.logprob is None


# ---- the operator contract


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(dtype):
    state = list(small_state().tensors)
    logits, slot = random_logits((3, VOCAB), 1, dtype), torch.tensor([2, -1, 0])
    small = {"batch": 3, "nodes": 5, "vocab": VOCAB, "dtype": dtype}
    plain = random_step(2, limits=False, **small)
    run_contract(
        torch.ops.reasonkern.sample_controlled.default,
        [
            (logits, None, *rows(3, VOCAB, 1).args(), None, []),
            (logits, random_mask((3, VOCAB), 2), *rows(3, VOCAB, 2).args(), slot, state),
            (logits[:0], None, *rows(0, VOCAB, 4).args(), slot[:0], state),
        ],
    )
    run_contract(
        torch.ops.reasonkern.verify_controlled.default,
        [
            (*plain.args(), None, [], True),
            (*plain.args(), slot, state, True),
            (*random_step(3, rejection=True, **small).args(), slot, state, False),
        ],
    )


def test_the_operators_refuse_a_state_of_another_layout():
    state, slot = list(small_state().tensors), torch.tensor([0, 1, 2])
    args = (random_logits((3, VOCAB), 1), None, *rows(3, VOCAB, 1).args())
    for index, name in enumerate(layout.Storage._fields):
        for other in (lambda t: t[..., :39].contiguous(), torch.Tensor.double):
            broken = [other(t) if i == index else t for i, t in enumerate(state)]
            with pytest.raises(RuntimeError, match=name):
                torch.ops.reasonkern.sample_controlled(*args, slot, broken)
    with pytest.raises(RuntimeError, match="two tensors"):
        torch.ops.reasonkern.sample_controlled(*args, slot, state[:1])
