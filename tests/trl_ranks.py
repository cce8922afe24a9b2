"""One rank of the two-process run: loss and gradients under DDP, by both trainers.

torchrun --nproc_per_node 2 tests/trl_ranks.py MODEL_FOLDER OUT_FILE
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import trl_cases as cases
from trl.trainer.grpo_trainer import GRPOTrainer

import examples.trl_grpo as example
from reasonkern.integrations import trl as ours


def main(model_folder: Path, out: Path) -> None:
    results = {}
    for name, options in cases.RANKED.items():
        for owner, kind in (("ours", ours.GRPOTrainer), ("trl", GRPOTrainer)):
            with tempfile.TemporaryDirectory() as folder:
                trainer = cases.make_trainer(kind, example, model_folder, Path(folder), **options)
            rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
            whole = cases.add_logprobs(trainer, cases.make_batch())
            share = {k: v.chunk(ranks)[rank] if v.ndim else v for k, v in whole.items()}
            wrapped = trainer.accelerator.prepare(trainer.model)
            assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
            loss = trainer.compute_loss(wrapped, share)
            trainer.accelerator.backward(loss)
            loss = trainer.accelerator.reduce(loss.detach(), "mean")
            gradients = {n: p.grad for n, p in trainer.model.named_parameters()}
            metrics = dict(trainer._metrics["train"])
            if owner == "ours":
                rows = trainer._row_metrics["train"].all_reduce().compute()
                metrics["rows"] = [rows["rows_active"].item()]
            results[owner, name] = (loss, gradients, metrics)
    if rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
