"""Collectives over NCCL, as far as one GPU goes: a group of one rank changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import reasonkern as rk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_vocabulary_parallel_loss(group):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 9, 257, generator=g)).cuda().requires_grad_()
    targets = torch.randint(257, (2, 9), generator=g).cuda()
    rows = torch.ones(2, 9, device="cuda")
    results = []
    for parallel in (None, rk.Parallel(vocab_group=group)):
        out = rk.policy_loss(
            logits, targets, old_logprob=-2 * rows, advantage=rows[:, 0], weight=rows / 18,
            objective=rk.Objective.dapo(0.8, 1.28, entropy_coef=0.01), parallel=parallel,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, logits)
        results.append([out.loss.detach(), out.logprob.detach(), gradient])
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=2e-7)


def test_table_of_all_ranks(group):
    g = torch.Generator().manual_seed(1)
    context = torch.randint(5, (40, 4), generator=g).cuda()
    ids = torch.randint(100, (40, 3), generator=g).cuda()
    logits = torch.randn(40, 3, generator=g).log_softmax(-1).cuda()
    tables = [rk.NgramTable(256, vocab_size=100, device="cuda") for _ in range(2)]
    for table, among in zip(tables, (None, group), strict=True):
        table.update(context, ids, logits, process_group=among)
    one, all_ranks = (table.state_dict() for table in tables)
    assert len(tables[0]) > 0
    for name, expected in one.items():
        if isinstance(expected, torch.Tensor):
            assert torch.equal(all_ranks[name], expected), name
