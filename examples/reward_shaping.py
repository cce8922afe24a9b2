"""Shapes the rewards of logged reasoning traces: LASER-D, overlong penalty, GTPO's entropy filter.

    python examples/reward_shaping.py [TRACES.jsonl[.gz]]

A trace is one JSON object per line with `problem_id`, `prompt`, `text` and `correct`; without a
file the demo's generated arithmetic is used. Lengths are counted in bytes. Logged traces carry no
logits, so a byte model with four bytes of context, fitted to the same traces, stands in for the
policy whose entropies the filter needs: in training they come from `policy_loss` or `token_stats`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import reasonkern as rk
from reasonkern.demo.arithmetic import generate
from reasonkern.demo.traces import Trace, TraceError, load_traces

CONTEXT = 4


def entropies(texts: Sequence[bytes]) -> list[Tensor]:
    """Entropy of the byte model before every byte of every text, nats."""
    contexts, following = [], []
    for text in texts:
        padded = torch.tensor(list(bytes(CONTEXT) + text))
        window = padded.unfold(0, CONTEXT, 1)[:-1]
        contexts.append((window * 256 ** torch.arange(CONTEXT)).sum(1))
        following.append(padded[CONTEXT:])
    _, row = torch.cat(contexts).unique(return_inverse=True)
    target = torch.cat(following)
    rows = int(row.max()) + 1
    counts = torch.bincount(row * 256 + target, minlength=rows * 256).view(rows, 256)
    # log of a count of 0 is -inf: token_stats gives such a byte no probability.
    stats = rk.token_stats(counts.float().log(), torch.zeros(rows, dtype=torch.int64))
    return list(stats.entropy[row].split([len(text) for text in texts]))


def shape(traces: Sequence[Trace], max_entropy: float) -> dict[str, Tensor]:
    """Every stage of the reward, one number per trace."""
    # JSON may hold lone surrogates, which strict UTF-8 refuses.
    texts = [trace.text.encode("utf-8", "surrogatepass") for trace in traces]
    numbers = {problem: i for i, problem in enumerate(dict.fromkeys(t.problem_id for t in traces))}
    group = torch.tensor([numbers[trace.problem_id] for trace in traces])
    correct = torch.tensor([trace.correct for trace in traces])
    length = torch.tensor([len(text) for text in texts])
    longest = int(length.max())
    step = max(longest // 16, 1)

    samples = int(group.bincount().min())  # answers that every problem has
    targets = rk.shaping.adaptive_length_targets(
        length, correct, group, lower=step, upper=longest, step=step, rollouts=samples
    )
    parts = {
        "LASER-D": rk.shaping.laser_d(length, correct, group, targets=targets),
        "overlong": rk.shaping.overlong_penalty(
            length, max_length=longest, buffer=max(longest // 4, 1)
        ),
    }
    reward = rk.shaping.mix_rewards(parts, {"LASER-D": 1.0, "overlong": 0.5})
    advantage = rk.shaping.group_advantages(reward, group, scale="none")

    entropy = pad_sequence(entropies(texts), batch_first=True)
    mask = torch.arange(entropy.shape[1]) < length[:, None]
    mean_entropy = (entropy * mask).sum(1) / length
    filtered = rk.shaping.entropy_filter(advantage, entropy, mask, max_entropy=max_entropy)
    return {"bytes": length, **parts, "reward": reward, "advantage": advantage,
            "entropy": mean_entropy, "filtered": filtered, "targets": targets}  # fmt: skip


def table(traces: Sequence[Trace], stages: dict[str, Tensor]) -> str:
    """One line per trace, problems apart."""
    names = [name for name in stages if name != "targets"]
    lines = ["problem     right " + "".join(f"{name:>10}" for name in names)]
    previous = None
    for i, trace in enumerate(traces):
        if trace.problem_id != previous:
            lines.append("-" * len(lines[0]))
        previous = trace.problem_id
        cells = [f"{'yes' if trace.correct else 'no':>5} "]
        for name in names:
            value = stages[name][i].item()
            cells.append(f"{value:10d}" if name == "bytes" else f"{value:10.3f}")
        lines.append(f"{trace.problem_id!s:<11} {''.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="?", help="JSONL file, plain or gzip (default: generated)")
    parser.add_argument(
        "--max-entropy", type=float, default=math.log(2), help="nats (default: ln 2)"
    )
    options = parser.parse_args(arguments)
    path = options.traces
    try:
        traces = load_traces(path) if path else generate(problems=4, samples=5)
        traces = sorted(traces, key=lambda trace: str(trace.problem_id))
        stages = shape(traces, options.max_entropy)
    except (TraceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(traces, stages))
    high, medium, low = stages["targets"].tolist()
    print(f"\nlength targets by accuracy: high {high}, medium {medium}, low {low} bytes")
    dropped = int(((stages["filtered"] == 0) & (stages["entropy"] > 0)).sum())
    limit = f"{options.max_entropy:.3f}"
    print(f"GTPO drops {dropped} of {len(traces)} traces: those of mean entropy above {limit} nats")
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on, and the exit would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
