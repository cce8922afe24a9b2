"""Draws a result file: `python -m benchmarks.plot RESULT.json PICTURE [--case PART …]`.

The picture names the file and the machine, so that a number in a README can be traced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import duration

COLOURS = {
    "reasonkern": "#1b7837",
    "ours-cuda": "#1b7837",
    "ours-triton": "#7fbf7b",
    "copy": "#bdbdbd",
    "logsumexp": "#d9d9d9",
    "eager": "#4575b4",
    "compile": "#74add1",
    "trl": "#f46d43",
    "liger": "#fdae61",
    "prompt-lookup": "#f46d43",
    "arctic": "#4575b4",
}


def draw(content: dict[str, Any], target: Path, source: str, parts: Sequence[str] = ()) -> None:
    """One row of panels per case: time on a logarithmic axis; peak extra memory, or how the tokens
    per step of generation grow with the trajectories of a problem.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [c for c in content["cases"] if not parts or any(part in c["id"] for part in parts)]
    cases = [c for c in cases if any("seconds" in row for row in c["providers"])]
    if not cases:
        raise ValueError(f"{source}: no measured case to draw")
    heights = [len(timed(c)) + 1.5 for c in cases]
    figure, panels = pyplot.subplots(
        len(cases),
        2,
        figsize=(10, 0.34 * sum(heights) + 0.8),
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2]},
        squeeze=False,
        layout="constrained",
    )
    for case, (left, right) in zip(cases, panels, strict=True):
        _time_panel(left, case)
        (_growth_panel if case["op"] == "accepted" else _memory_panel)(right, case)
    figure.supxlabel(caption(content["machine"], source), fontsize=8, color="0.35")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def timed(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a time, in the order of the table from the bottom up."""
    return [row for row in reversed(case["providers"]) if "seconds" in row]


def caption(machine: dict[str, Any], source: str) -> str:
    """Where the numbers come from."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{source} · {device} · torch {machine['torch']} · reasonkern {machine['commit']}"
        f" · {machine['date'][:10]}"
    )


def _time_panel(axes: Any, case: dict[str, Any]) -> None:
    rows = timed(case)
    bars = axes.barh(
        [row["name"] for row in rows],
        [row["seconds"]["median"] for row in rows],
        color=[COLOURS.get(row["name"], "0.5") for row in rows],
    )
    texts = [f" {duration(r['seconds']['median'])} · {r['ratio']['median']:.3g} ×" for r in rows]
    axes.bar_label(bars, texts, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.35)
    threads = f", {case['threads']} threads" if case["threads"] else ""
    shape = " × ".join(map(str, case["shape"]))
    title = f"{case['op']} {case['label']} [{shape}] {case['dtype']}{threads}"
    axes.set_title(f"{title} — time, logarithmic", fontsize=9, loc="left")
    _tidy(axes)
    axes.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    axes.minorticks_off()


def _memory_panel(axes: Any, case: dict[str, Any]) -> None:
    rows = [row for row in timed(case) if row.get("peak_bytes") is not None]
    sizes = [row["peak_bytes"] / 2**20 for row in rows]
    colours = [COLOURS.get(row["name"], "0.5") for row in rows]
    bars = axes.barh([row["name"] for row in rows], sizes, color=colours)
    axes.bar_label(bars, [f" {size:,.1f} MiB" for size in sizes], fontsize=8)
    axes.set_xlim(0, 1.3 * max([1.0, *sizes]))
    axes.xaxis.set_visible(False)
    axes.set_title("peak extra memory", fontsize=9, loc="left")
    _tidy(axes)


def _growth_panel(axes: Any, case: dict[str, Any]) -> None:
    for row in timed(case):
        steps = row["accepted_by_trajectory"]
        axes.plot(range(1, len(steps) + 1), steps, "o-", color=COLOURS.get(row["name"], "0.5"))
        axes.annotate(f"  {row['name']}", (len(steps), steps[-1]), va="center", fontsize=8)
    axes.margins(x=0.2, y=0.15)
    axes.set_xticks([n for n in (1, 2, 4, 8, 16) if n <= len(steps)])
    axes.set_title("tokens per step, by trajectories so far", fontsize=9, loc="left")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--case", action="append", default=[], help="part of a case's id")
    options = parser.parse_args()
    content = json.loads(options.result.read_text())
    results = Path(__file__).resolve().parent / "results"
    path = options.result.resolve()
    inside = path.is_relative_to(results)
    source = path.relative_to(results).as_posix() if inside else path.name
    try:
        draw(content, options.picture, source, options.case)
    except ValueError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
