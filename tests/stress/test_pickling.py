"""Public objects survive pickle, copy.deepcopy and torch.save."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reasonkern as rk
from reasonkern import scaling
from reasonkern.demo.model import Decoding, seeded
from reasonkern.generation import generate
from reasonkern.modulation import layout as at

X, Y = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3).long()


def loss() -> rk.PolicyLossOutput:
    weight = rk.token_weights(torch.ones(2, 3))
    objective = rk.Objective.dapo()
    return rk.policy_loss(X, Y, advantage=torch.ones(2), weight=weight, objective=objective)


def table() -> rk.NgramTable:
    made = rk.NgramTable(64, vocab_size=5, orders=(2, 1), topk=3)
    made.update(Y[:, :2], Y[:, :1], torch.zeros(2, 1))
    return made


def draft() -> rk.Draft:
    given = {"temperature": 1.0, "seed": 0, "position": 0}
    return table().draft(Y[:, :2], rk.DraftTree.default(3), **given)


def verified() -> rk.Verified:
    given = {"temperature": 1.0, "seed": 0, "position": 0}
    return rk.verify_tree(X, draft(), rk.DraftTree.default(3), **given)


def controlled() -> rk.ModulationState:
    sets = rk.TokenSets.from_ids({"reflect": [1, 3]})
    state = rk.ModulationState(2, sets)
    state.add(1, rk.Modulation(ban=rk.Ban(), budget=rk.Budget(4, [2, 4])), [1], [3, 2])
    return state


def sampled(state: rk.ModulationState) -> rk.Sampled:
    given = {"temperature": 1.0, "seed": 0, "position": 0}
    return rk.sample_controlled(X[0].clone(), state, torch.tensor([1, -1, 0]), **given)


def decoded() -> Any:
    model = Decoding(seeded(5, 16, 8, 1, 0))
    return generate(model, [[1, 2]], temperature=0.0, max_new_tokens=3, table=table())


def frontier() -> scaling.AStarFrontier:
    search = scaling.AStarFrontier(9)
    search.push(["a", "b"], [0.2, 0.5])
    return search


OBJECTS: dict[str, Callable[[], Any]] = {
    "Objective": lambda: rk.Objective.gspo(kl=rk.KL("k3", 0.1), entropy_coef=torch.tensor(0.1)),
    "Objective.bapo": lambda: rk.Objective.bapo(),
    "Objective of a function": lambda: rk.Objective.custom(torch.add),
    "Parallel": lambda: rk.Parallel(vocab_size=5),
    "PolicyLossOutput": loss,
    "PolicyMetrics": lambda: loss().metrics,
    "MismatchMetrics": lambda: rk.rollout_mismatch(X[..., 0], X[..., 1], Y),
    "TokenStats": lambda: rk.token_stats(X, Y),
    "NgramTable": table,
    "DraftTree": lambda: rk.DraftTree([-1, 0, 0, 1]),
    "Draft": draft,
    "Verified": verified,
    "Status": lambda: rk.Status.EOS | rk.Status.CAPPED,
    "Modulation": lambda: rk.Modulation(cyclic=rk.Cyclic(5.0, 9), think_end=4),
    "TokenSets": lambda: controlled().sets,
    "ModulationState": controlled,
    "Sampled": lambda: sampled(controlled()),
    "Generated": decoded,
    "LawReport": lambda: rk.LawReport((rk.Law("joint", True, 0.0),)),
    "AStarFrontier": frontier,
    "Vote": lambda: scaling.vote(["a", "a", None]),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda x: saved(x),
}


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def parts(x: Any) -> list[Any]:
    """What an object consists of, tensors as nested lists."""
    if isinstance(x, Tensor):
        return [x.dtype, x.tolist()]
    if isinstance(x, (list, tuple)):
        return [parts(item) for item in x]
    if isinstance(x, dict):
        return [[key, parts(value)] for key, value in x.items()]
    fields = {k: v for k, v in getattr(x, "__dict__", {}).items() if k != "_tensors"}
    return [type(x), parts(fields)] if fields and not callable(x) else [x]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", OBJECTS)
def test_a_copy_is_equal(name: str, how: str) -> None:
    thing = OBJECTS[name]()
    twin = COPIES[how](thing)
    assert type(twin) is type(thing) and parts(twin) == parts(thing)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_table_drafts_the_same_and_is_its_own(how: str) -> None:
    own, tree = table(), rk.DraftTree.default(3)
    twin = COPIES[how](own)
    given = {"temperature": 0.0, "seed": 0, "position": 0}
    expected = own.draft(Y[:, :2], COPIES[how](tree), **given)
    assert torch.equal(twin.draft(Y[:, :2], tree, **given).tokens, expected.tokens)
    twin.clear()
    assert len(own) and not len(twin)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_state_controls_the_same_and_is_its_own(how: str) -> None:
    own = controlled()
    twin = COPIES[how](own)
    assert all(torch.equal(a, b) for a, b in zip(sampled(twin), sampled(own), strict=True))
    twin.remove(1)
    assert own.uses(at.BAN) and not twin.uses(at.BAN)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_objective_gives_the_same_loss(how: str) -> None:
    for objective in (rk.Objective.ce_gppo(opsm=0.1), rk.Objective.bapo("code")):
        given = {
            "advantage": torch.ones(2),
            "weight": torch.ones(2, 3),
            "rollout_logprob": X[..., 0],
        }
        own = rk.policy_loss(X, Y, objective=objective, **given).loss
        assert torch.equal(
            rk.policy_loss(X, Y, objective=COPIES[how](objective), **given).loss, own
        )
