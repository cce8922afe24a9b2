"""`verify_tree` on every backend against the definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import assert_same_bits
from speculation_cases import (
    DTYPES,
    INF,
    Step,
    cases,
    generator,
    on,
    random_logits,
    random_step,
    random_tree,
    rows,
)
from tolerance import ulp
from torch import Tensor

from reasonkern import DraftTree, Status, _load
from reasonkern.speculation.tree import MAX_NODES

OUTPUTS = ("tokens", "length", "path", "topk_ids", "topk_logits", "lse", "status")


def check_lse(step: Step, path: Tensor, got: Tensor, expected: Tensor) -> None:
    """Twice the error of torch.logsumexp in fp32, plus two ulp."""
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(got), finite)
    vocab = step.logits.shape[-1]
    x = step.logits.gather(1, path.clamp_min(0).unsqueeze(-1).expand(-1, -1, vocab)).float()
    truth = x.double().logsumexp(-1)
    base = (x.logsumexp(-1).double() - truth).abs()
    bound = 2 * base + 2 * ulp(truth, torch.float32)
    assert ((got.double() - truth).abs() <= bound)[finite].all()


def verify_everywhere(backend, step: Step):
    expected = _load.implementation("verify_tree", "reference")(*step.args())
    got = backend("verify_tree", *on(backend, step.args()))
    for name, g, e in zip(OUTPUTS, got, expected, strict=True):
        if name == "lse":
            check_lse(step, expected[2], g.cpu(), e)
        else:
            assert_same_bits(g.cpu(), e)
    return dict(zip(OUTPUTS, expected, strict=True))


@pytest.mark.parametrize("rejection", [False, True])
@pytest.mark.parametrize("limits", [False, True])
def test_verify_random_steps(backend, rejection, limits):
    if rejection and backend.name == "triton":
        pytest.skip("the Triton backend has the equality rule only")
    seen = 0
    for seed in cases(backend, 2, 30):
        vocab = (211, 24, 1030, 5, 1032)[seed % 5]  # on CUDA whole words of rows are drawn abreast
        step = random_step(
            seed, batch=7, vocab=min(vocab, 300) if backend.slow else vocab, nodes=4 + seed % 20,
            rejection=rejection, limits=limits,
            filters="off" if backend.name == "triton" and backend.slow else "mixed",
        )  # fmt: skip
        out = verify_everywhere(backend, step)
        seen |= int(out["status"].max()) | (8 if int(out["length"].max()) > 2 else 0)
    assert seen >= (14 if limits else 10) or backend.slow


def test_draft_laws_are_normalised(backend):
    if backend.name == "triton":
        pytest.skip("the Triton backend has the equality rule only")
    longest = 0
    for seed in cases(backend, 1, 6):
        step = random_step(seed, batch=7, rejection=True, limits=False, filters="off")
        shifted = replace(step, q_logprob=step.q_logprob - 1)
        out, other = (verify_everywhere(backend, s) for s in (step, shifted))
        assert torch.equal(out["tokens"], other["tokens"])
        longest = max(longest, int(out["length"].max()))
    assert longest > 1 or backend.slow


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_dtypes(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    verify_everywhere(backend, random_step(3, dtype=dtype, filters="off"))


def test_verify_strided_logits(backend):
    step = random_step(4, vocab=64, filters="off")
    wide = torch.nn.functional.pad(step.logits, (3, 9, 1, 2), value=7.0)
    verify_everywhere(backend, replace(step, logits=wide[:, 1:-2, 3:-9]))


def test_the_walk_follows_sample(backend):
    """tokens[j] is what `sample` gives for row path[j] at position + j: the definition."""
    sample = _load.implementation("sample", "reference")
    for seed in cases(backend, 1, 10):
        step = random_step(
            seed, batch=6, limits=False, bad=False, filters="off" if backend.slow else "mixed"
        )
        out = verify_everywhere(backend, step)
        for b in range(6):
            r = [a[b : b + 1] for a in step.rows.args()]
            n = int(out["length"][b])
            for j in range(n):
                row = step.logits[b, out["path"][b, j]][None]
                token = sample(row, None, *r[:5], r[5] + j)
                assert token.item() == out["tokens"][b, j]
            assert (out["tokens"][b, n:] == -1).all() and (out["path"][b, max(n, 1) :] == -1).all()


def test_drafts_do_not_change_the_text(backend):
    """Two drafts of the same rows emit the same tokens, as far as both go."""
    tree = random_tree(8, 0)
    x = random_logits((4, 1, 50), 0).expand(4, 8, 50).contiguous()  # rows that ignore the prefix
    r = rows(4, 50, 0, "off")
    outs = []
    for seed in range(2 if backend.slow else 6):
        tokens = torch.randint(0, 50, (4, 8), generator=generator(seed))
        step = Step(x, tokens, torch.ones(4, 8, dtype=torch.bool), tree, r)
        # A tree that holds the right tokens somewhere is followed further.
        if seed:
            right = outs[0]["tokens"][:, 0]
            step.tokens[:, 1] = right
        outs.append(verify_everywhere(backend, step))
    for out in outs[1:]:
        both = torch.minimum(out["length"], outs[0]["length"])
        for b in range(4):
            n = int(both[b])
            assert out["tokens"][b, :n].tolist() == outs[0]["tokens"][b, :n].tolist()
    assert max(int(o["length"].max()) for o in outs) > 1


def chain(tokens, vocab=6):
    """A greedy chain whose rows prefer `tokens`, drafted in full."""
    n = len(tokens)
    logits = torch.zeros(1, n, vocab)
    logits[0, torch.arange(n), torch.tensor(tokens)] = 5.0
    drafted = torch.tensor([[0, *tokens[:-1]]])
    r = replace(rows(1, vocab, 0, "off"), temperature=torch.zeros(1))
    return Step(logits, drafted, torch.ones(1, n, dtype=torch.bool), DraftTree.chain(n), r, topk=2)


def test_a_whole_path(backend):
    out = verify_everywhere(backend, chain([3, 1, 4]))
    assert out["tokens"].tolist() == [[3, 1, 4]] and out["length"].item() == 3
    assert out["path"].tolist() == [[0, 1, 2]] and out["status"].item() == 0


def test_eos_inside_the_path_cuts_after_it(backend):
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), eos=torch.tensor([5, 1])))
    assert out["tokens"].tolist() == [[3, 1, -1]] and out["length"].item() == 2
    assert out["status"].item() == Status.EOS


def test_eos_of_no_token_ends_nothing(backend):
    """Nor does one whose lowest bits are a token's."""
    eos = torch.tensor([-1, 1 - (1 << 32), 1 + (1 << 32)])
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), eos=eos))
    assert out["length"].item() == 3 and out["status"].item() == 0


def test_the_largest_logits_of_one_lane(backend, monkeypatch):
    """They lie a multiple of Triton's block apart, beyond 128 of them, with ties and below zero."""
    if backend.name == "triton":
        monkeypatch.setattr("reasonkern.speculation.triton_verify.BLOCK", 16)
    step = replace(chain([5], vocab=16 * 131 + 8), topk=12)
    step.logits.fill_(-50.0)
    at = 5 + 16 * torch.tensor([130, 0, 129, 128, 127, 64, 63, 2, 1])
    step.logits[0, 0, at] = torch.tensor([9.0, 9, 8, 7, 7, 1, 0, -1, -2])
    out = verify_everywhere(backend, step)
    expected = [*at[[1, 0, 2, 4, 3, 5, 6, 7, 8]].tolist(), 0, 1, 2]
    assert out["topk_ids"][0, 0].tolist() == expected


@pytest.mark.parametrize("limit", [2 - (1 << 32), 0, 1, 2, 3, 4])
def test_max_length(backend, limit):
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), max_length=torch.tensor([limit])))
    length = min(max(limit, 0), 3)
    assert out["length"].item() == length
    assert out["status"].item() == (Status.CAPPED if limit <= 3 else 0)
    assert (out["topk_ids"][0, length:] == -1).all()


def test_padding_requests_emit_nothing(backend):
    step = chain([3, 1, 4])
    step.valid[0, 0] = False
    out = verify_everywhere(backend, step)
    assert out["length"].item() == 0 and out["status"].item() == 0
    assert out["path"].tolist() == [[0, -1, -1]]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_num_nodes_keeps_a_prefix(backend, kept):
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), num_nodes=torch.tensor([kept])))
    assert out["length"].item() == kept


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_bad_row_on_the_path(backend, value):
    step = chain([3, 1, 4])
    step.logits[0, 1, 5] = value
    out = verify_everywhere(backend, step)
    assert out["tokens"].tolist() == [[3, 1, 4]] and out["status"].item() == Status.BAD_ROW
    assert (out["topk_ids"][0, 1] == -1).all() and out["lse"][0, 1] == -INF


@pytest.mark.parametrize("node", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), -INF])
def test_a_row_without_a_finite_logit_ends_the_step_before_it(backend, node, value):
    step = chain([3, 1, 4])
    step.logits[0, node] = value
    out = verify_everywhere(backend, step)
    assert out["length"].item() == node and out["status"].item() == Status.BAD_ROW


def test_a_mask_without_a_token_ends_the_step_before_it(backend):
    mask = torch.full((1, 3, 1), -1, dtype=torch.int32)
    mask[0, 1] = 0
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), node_mask=mask))
    assert out["length"].item() == 1 and out["status"].item() == Status.BAD_ROW


def test_node_masks_belong_to_nodes(backend):
    mask = torch.full((1, 3, 1), -1, dtype=torch.int32)
    mask[0, 1] = 0b110000
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), node_mask=mask))
    assert out["tokens"].tolist() == [[3, 4, -1]]


@pytest.mark.parametrize("token", [-1, 6, 2**40, -(2**40)])
def test_ids_out_of_range_are_never_entered(backend, token):
    step = chain([3, 1, 4])
    step.tokens[0, 1] = token
    assert verify_everywhere(backend, step)["length"].item() == 1


def test_statistics_are_of_the_raw_row(backend):
    mask = torch.full((1, 3, 1), 0b110111, dtype=torch.int32)
    r = replace(chain([3, 1, 4]).rows, temperature=torch.tensor([0.5]))
    out = verify_everywhere(backend, replace(chain([3, 1, 4]), node_mask=mask, rows=r))
    assert out["topk_ids"][0, 0].tolist() == [3, 0]
    assert out["topk_logits"][0, 0].tolist() == [5.0, 0.0]
    assert out["lse"][0, 0].item() == pytest.approx(torch.tensor([5.0] + [0.0] * 5).logsumexp(0))


def test_statistics_where_a_part_of_the_row_is_empty(backend):
    """Far below 0: the empty part's sum of 0 must not be weighted as if its top were 0."""
    step = chain([3, 260, 4], vocab=300)
    step.logits[:] -= 1000
    step.logits[0, 0, 40:] = -INF
    step.logits[0, 1, :250] = -INF
    out = verify_everywhere(backend, step)
    assert out["length"].item() == 3 and (out["lse"][0] < -990).all()


def test_more_statistics_than_tokens(backend):
    out = verify_everywhere(backend, replace(chain([1, 0], vocab=2), topk=5))
    assert out["topk_ids"][0, 0].tolist() == [1, 0, -1, -1, -1]


def test_one_node_and_no_request(backend):
    verify_everywhere(backend, chain([2]))
    step = random_step(0, batch=1)
    empty = replace(
        step, logits=step.logits[:0], tokens=step.tokens[:0], valid=step.valid[:0],
        rows=replace(step.rows, **{k: v[:0] for k, v in vars(step.rows).items()}),
        max_length=None, num_nodes=None, node_mask=None,
    )  # fmt: skip
    assert backend("verify_tree", *on(backend, empty.args()))[0].shape == (0, step.tree.depth + 1)


def test_more_nodes_than_a_tree_has_are_refused(backend):
    def args(nodes: int) -> list[object]:
        """A chain, of which a step of depth 0 visits the root."""
        grid, index = (1, nodes), torch.arange(nodes + 1, dtype=torch.int32)
        drafts = torch.zeros(grid, dtype=torch.int64), torch.ones(grid, dtype=torch.bool)
        tree, requests = (index.clamp(max=nodes - 1), index[1:nodes]), rows(1, 3, 0, "off").args()
        return [torch.zeros(*grid, 3), *drafts, None, None, *tree, *requests, *[None] * 4, 0, 1, 1]

    assert backend("verify_tree", *on(backend, args(MAX_NODES)))[1].tolist() == [1]
    match = f"logits: expected rows of at most {MAX_NODES} nodes, got {MAX_NODES + 1}"
    meta = (x.to("meta") if isinstance(x, Tensor) else x for x in args(MAX_NODES + 1))
    with pytest.raises(ValueError, match=match):
        torch.ops.reasonkern.verify_tree(*meta)
    if backend.name != "cuda-sim":  # which starts kernels without their operators' checks
        with pytest.raises((ValueError, RuntimeError), match=match):
            backend("verify_tree", *on(backend, args(MAX_NODES + 1)))


def test_batch_order_does_not_matter(backend):
    step = random_step(6, batch=6, limits=False, filters="off")
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    moved = replace(
        step, logits=step.logits[order], tokens=step.tokens[order], valid=step.valid[order],
        rows=replace(step.rows, **{k: v[order] for k, v in vars(step.rows).items()}),
    )  # fmt: skip
    first = backend("verify_tree", *on(backend, step.args()))
    second = backend("verify_tree", *on(backend, moved.args()))
    assert_same_bits([x.cpu() for x in second], [x.cpu()[order] for x in first])
