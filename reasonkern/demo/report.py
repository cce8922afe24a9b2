"""What the demo leaves behind: results.json, the PNG plots and the final table."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._progress import counted
from .context import Config

DEVIATION_LIMIT = 1e-4
Results = dict[str, Any]


def summary(results: Results) -> Results:
    """The figures of the final table; a stage that has not run leaves its part empty."""
    deviations = results.get("deviations", [])
    worst = {key: _worst(entry[key] for entry in deviations) for key in ("loss", "gradient")}
    steps = results.get("policy", {}).get("steps", [])
    values = [value for metrics in steps for value in metrics.values()]
    return {
        "sft": _ends(results.get("sft", {}).get("loss", [])),
        "policy": {
            "steps": len(steps),
            "nonfinite": sum(not math.isfinite(value) for value in values),
        },
        "deviation": {
            **worst,
            "steps": len(deviations),
            "worst": max(worst.values()),
            "limit": DEVIATION_LIMIT,
        },
    }


def _worst(values: Iterable[float]) -> float:
    """The maximum; NaN, which max() may drop, is the worst of all."""
    return max((value if math.isfinite(value) else math.inf for value in values), default=0.0)


def _ends(series: list[float], share: float = 0.1) -> Results:
    """First value and the mean of the last tenth: single batches are noisy."""
    if not series:
        return {}
    tail = series[-max(1, round(len(series) * share)) :]
    return {"first": series[0], "last": sum(tail) / len(tail), "steps": len(series)}


def write_json(results: Results, config: Config, path: Path) -> Path:
    """Strict JSON: a value that is not finite becomes null."""
    content = {
        "config": {key: _plain(value) for key, value in asdict(config).items()},
        "summary": summary(results),
        **results,
    }
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def can_plot() -> bool:
    """Whether matplotlib is there; a message where it is not, at the start, when it can be had."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        print(
            "no plots: matplotlib is not installed (pip install 'reasonkern[demo]'); "
            "all results will be in results.json",
            flush=True,
        )
        return False
    return True


def write_plots(results: Results, out: Path) -> list[Path]:
    """One PNG per stage that has results."""
    plots = importlib.import_module(f"{__package__}.plots")
    written: list[Path] = plots.draw_all(results, out)
    return written


def table(results: Results) -> str:
    """The final table."""
    figures = summary(results)
    rows = [
        *_data_rows(results["data"]),
        *_training_rows(results, figures),
        *_solve_rows(results.get("solve")),
        *_control_rows(results.get("control")),
        *_cost_rows(results.get("cost")),
        *_deviation_rows(figures["deviation"]),
        ("total time", _total_time(results["seconds"], results["budget"])),
    ]
    width = max(len(name) for name, _ in rows)
    rule = "─" * 88
    return "\n".join([rule, *(f"{name:<{width}}  {text}" for name, text in rows), rule])


def _data_rows(data: Results) -> list[tuple[str, str]]:
    traces = f"{counted(data['traces'], 'trace')} of {counted(data['problems'], 'problem')}"
    return [
        (
            "data",
            f"{data['source']}: {traces}, {data['correct']} correct, {data['tokens']:,} tokens",
        ),
        (
            "model",
            f"{data['parameters'] / 1e6:.1f} M parameters, vocabulary {data['vocabulary']:,} "
            f"({data['learnt_pieces']:,} learnt pieces)",
        ),
    ]


def _training_rows(results: Results, figures: Results) -> list[tuple[str, str]]:
    rows = []
    asked = results.get("shortened", {})
    if ends := figures["sft"]:
        count = _steps(ends["steps"], asked.get("sft"))
        text = f"{count}, loss {ends['first']:.3f} → {ends['last']:.3f} nats/token"
        rows.append(("stage 1, fine-tuning", text))
    policy = results.get("policy", {})
    if policy.get("steps"):
        finite = figures["policy"]["nonfinite"]
        verdict = "all metrics finite" if not finite else f"{finite} metric values not finite"
        count = _steps(len(policy["steps"]), asked.get("policy"))
        rows.append((f"stage 2, {policy['objective']}", f"{count}, {verdict}"))
    if margins := policy.get("margin", []):
        text = " → ".join(f"{entry['nats']:+.3f}" for entry in margins)
        when = " → ".join(str(entry["step"]) for entry in margins)
        text = f"log-prob, right minus wrong traces: {text} nats/token after {when} steps"
        rows.append(("", text))
    return rows


def _steps(done: int, asked: int | None) -> str:
    return counted(done, "step") if asked is None else f"{done} of {asked} steps in the time budget"


def _solve_rows(solved: Results | None) -> list[tuple[str, str]]:
    if not solved or "outcomes" not in solved:
        return []
    runs = [(f"{run['trajectories']} per problem", run) for run in solved["outcomes"]]
    if last := solved.get("at_once"):
        runs.append((f"{last['trajectories']} at once", last))
    rows = []
    for name, run in runs:
        plain, fast = (run["tokens_per_second"][way] for way in ("plain", "speculation"))
        speed = f"{plain:,.0f} tokens/s plain → {fast:,.0f} with speculation"
        rows.append((f"stage 3, {name}", f"{run['tokens_per_step']:.2f} tokens per step, {speed}"))
    rows += _slower_rows([run for _, run in runs])
    texts = f"{solved['equal']} of {solved['texts']} texts equal with and without speculation"
    if solved["texts"] < solved["asked"]:
        texts += f" ({solved['asked']} without the time budget)"
    if not solved["correct"]:
        return [*rows, ("", f"{texts}; none correct: the form is learnt first")]
    return [*rows, ("", f"{texts}, {solved['correct']} correct")]


def _slower_rows(runs: list[Results]) -> list[tuple[str, str]]:
    """Why speculation does not pay with few answers, where it does not."""
    for run in runs:
        plain, fast = (run["tokens_per_second"][way] for way in ("plain", "speculation"))
        if 0 < fast < plain:
            length = run["tokens_per_step"]
            text = (
                f"a step with table and drafts takes {length * plain / fast:.2f} × a plain one's "
                f"time: with {length:.2f} tokens it is slower, until the table has seen more texts"
            )
            return [("", text)]
    return []


def _total_time(seconds: float, budget: float) -> str:
    if seconds <= budget:
        return f"{seconds:.0f} s"
    return f"{seconds:.0f} s, over the budget of {budget:.0f} s: each stage does its least"


def _control_rows(controlled: Results | None) -> list[tuple[str, str]]:
    runs = [] if controlled is None else controlled["runs"]
    return [
        (
            f"stage 4, {run['name']}",
            f"{run['tokens']:.0f} tokens, {run['thinking']:.0f} thinking, "
            f"{run['reflections']:.1f} reflections per text, {run['entropy']:.2f} nats/token, "
            f"{run['correct']} of {run['texts']} correct",
        )
        for run in runs
    ]


def _cost_rows(cost: Results | None) -> list[tuple[str, str]]:
    if cost is None:
        return []
    rows = []
    for name in ("fused", "eager"):
        seconds = cost["seconds"][name]
        extra = cost["extra_bytes"][name]
        memory = "memory not measurable here" if extra is None else f"{_size(extra)} extra"
        text = f"median {statistics.median(seconds) * 1e3:.1f} ms, {memory}"
        rows.append((f"loss + gradient, {name}", text))
    batch, length, vocabulary = cost["shape"]
    logits = f"{batch}×{length} rows, vocabulary {vocabulary:,}, {cost['dtype']}"
    threads = "1 thread" if cost["threads"] == 1 else f"{cost['threads']} threads"
    size = f"logits {cost['logits_bytes'] / 2**20:.0f} MiB, {threads}"
    pairs = f"{cost['speedup']:.1f} times faster (median of {len(seconds)} interleaved pairs)"
    return [*rows, ("", f"{pairs}; {logits}, {size}")]


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _deviation_rows(deviation: Results) -> list[tuple[str, str]]:
    if not deviation["steps"]:
        return []
    verdict = "within" if deviation["worst"] <= deviation["limit"] else "ABOVE"
    text = (
        f"max |Δloss| {deviation['loss']:.1e}, max |Δgrad| / max |grad| "
        f"{deviation['gradient']:.1e} at {deviation['steps']} training steps"
    )
    return [("deviation from eager", f"{text}: {verdict} {deviation['limit']:.0e}")]
