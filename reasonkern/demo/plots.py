"""The PNG plots; imported only when matplotlib is installed."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

from .._progress import counted  # noqa: E402

Results = dict[str, Any]
Lines = dict[str, str]  # label → metric

# Panel title, y label, lines. Units: log-probabilities, entropies and KL are in nats.
POLICY_PANELS: tuple[tuple[str, str, Lines], ...] = (
    ("Loss", "loss", {"step": "loss"}),
    (
        "Entropy",
        "nats per token",
        {"all tokens": "entropy", "A > 0": "entropy_pos", "A < 0": "entropy_neg"},
    ),
    (
        "Tokens outside the ratio bounds",
        "% of tokens",
        {
            "A > 0, above": "clip_frac_pos_high",
            "A > 0, below": "clip_frac_pos_low",
            "A < 0, above": "clip_frac_neg_high",
            "A < 0, below": "clip_frac_neg_low",
        },
    ),
    (
        "KL (k3 estimator)",
        "nats per token",
        {"to the old policy": "kl_old_k3", "to the reference": "kl_ref_k3"},
    ),
    ("Effective sample size", "% of tokens", {"ESS / tokens": "ess_frac"}),
    (
        "Probability ratio to the old policy",
        "ratio",
        {"max": "ratio_max", "mean": "ratio_mean", "min": "ratio_min"},
    ),
)


def draw_all(results: Results, out: Path) -> list[Path]:
    """Draw what the results hold."""
    written = []
    if results.get("sft", {}).get("loss"):
        written.append(_save(_fine_tuning(results), out / "stage1_fine_tuning.png"))
    if results.get("policy", {}).get("steps"):
        written.append(_save(_policy(results["policy"]), out / "stage2_policy.png"))
    if results.get("solve", {}).get("outcomes"):
        written.append(_save(_solve(results["solve"]), out / "stage3_speculation.png"))
    if results.get("control", {}).get("runs"):
        written.append(_save(_control(results["control"]), out / "stage4_control.png"))
    if "cost" in results:
        written.append(_save(_cost(results["cost"]), out / "loss_cost.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _figure(rows: int, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    size = (4.4 * columns, 3.2 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.suptitle(title, weight="bold", parse_math=False)  # a file may be called $x$
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panels = list(axes.flat)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.ticklabel_format(useOffset=False)
    return figure, panels


def _fine_tuning(results: Results) -> Figure:
    series, data = results["sft"], results["data"]
    title = f"Stage 1: fine-tuning on {data['source']}, vocabulary {data['vocabulary']:,}"
    figure, panels = _figure(1, 3, title)
    shown = (
        ("Negative log-likelihood", "nats per token", series["loss"]),
        ("Entropy of the model", "nats per token", series["entropy"]),
        ("Top-1 accuracy", "% of tokens", [100 * value for value in series["top1"]]),
    )
    for panel, (name, unit, values) in zip(panels, shown, strict=True):
        panel.plot(range(1, len(values) + 1), values, lw=1.6)
        panel.set(title=name, xlabel="optimiser step", ylabel=unit, ylim=(0, None))
    return figure


def _policy(policy: Results) -> Figure:
    steps = policy["steps"]
    title = (
        f"Stage 2: {policy['objective']} on the logged groups "
        f"({policy['batches']} batches per epoch; dotted: a new snapshot of the old policy)"
    )
    figure, panels = _figure(2, 3, title)
    snapshots = [entry["step"] for entry in policy["margin"] if 0 < entry["step"] < len(steps)]
    _epoch_means(panels[0], [metrics["loss"] for metrics in steps], policy["batches"])
    for panel, (name, unit, lines) in zip(panels, POLICY_PANELS, strict=True):
        scale = 100 if unit.startswith("%") else 1
        for label, key in lines.items():
            values = [scale * metrics[key] for metrics in steps]
            if key in ("entropy_pos", "entropy_neg"):  # 0 stands for a batch without such tokens
                values = [value or math.nan for value in values]
            panel.plot(range(1, len(values) + 1), values, lw=1.4, label=label)
        for step in snapshots:
            panel.axvline(step + 0.5, color="0.5", lw=1, ls=":")
        panel.set(title=name, xlabel="optimiser step", ylabel=unit)
        if unit == "ratio":
            _log_scale_if_wide(panel)
        if len(panel.lines) > len(snapshots) + 1:
            panel.legend(fontsize="small", framealpha=0.7)
    return figure


def _epoch_means(panel: Axes, values: list[float], length: int) -> None:
    """At ratio 1 the loss of a batch is minus its mean advantage: only epochs compare."""
    starts = range(0, len(values) - length + 1, length)
    means = [statistics.mean(values[start : start + length]) for start in starts]
    middles = [start + (length + 1) / 2 for start in starts]
    panel.plot(middles, means, "o-", color="C3", lw=2, zorder=3, label="mean of an epoch")


def _log_scale_if_wide(panel: Axes) -> None:
    """A narrow range would show a single tick on a log axis."""
    low, high = panel.dataLim.intervaly
    if low > 0 and high / low > 8:
        panel.set(yscale="log", ylabel="ratio (log scale)")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _solve(solved: Results) -> Figure:
    runs = solved["outcomes"]
    title = (
        f"Stage 3: {counted(solved['problems'], 'problem')} at temperature "
        f"{solved['temperature']}, plain and with speculation"
    )
    figure, (left, right) = _figure(1, 2, title)
    counts = [str(run["trajectories"]) for run in runs]
    left.plot(counts, [run["tokens_per_step"] for run in runs], "o-", label="speculation")
    left.axhline(1, color="0.5", lw=1, ls="--", label="plain")
    left.set(title="Accepted length", ylabel="tokens per step", ylim=(0, None))
    left.set_xlabel("trajectories of a problem, one after another")
    left.legend(fontsize="small")
    labels = [*counts]
    if last := solved.get("at_once"):
        runs = [*runs, last]
        labels.append(f"{last['trajectories']} at once")
    places = range(len(runs))
    for shift, name, color in ((-0.2, "plain", "0.6"), (0.2, "speculation", "C0")):
        values = [run["tokens_per_second"][name] for run in runs]
        bars = right.bar([p + shift for p in places], values, width=0.4, color=color, label=name)
        right.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2, size="small")
    right.set(title="Speed", ylabel="tokens per second", xlabel="trajectories of a problem")
    right.set_xticks(list(places), labels)
    right.legend(fontsize="small")
    return figure


def _control(controlled: Results) -> Figure:
    runs, width = controlled["runs"], controlled["bin"]
    amplitude, period = controlled["amplitude"], controlled["period"]
    title = (
        f"Stage 4: {runs[0]['texts']} texts per setting; CyclicReflex with amplitude "
        f"{amplitude:g}, period {period}; budget of {controlled['budget']} thinking tokens"
    )
    figure, (left, middle, right) = _figure(1, 3, title)
    for run in runs[:2]:
        places = [width * (index + 0.5) for index in range(len(run["tokens_at"]))]
        pairs = zip(run["reflections_at"], run["tokens_at"], strict=True)
        left.plot(places, [100 * a / b for a, b in pairs], lw=1.6, label=run["name"])
        right.plot(places, run["entropy_at"], lw=1.6, label=run["name"])
    wave = left.twinx()
    span = range(width * max(len(run["tokens_at"]) for run in runs[:2]) + 1)
    heights = [amplitude * (abs((4 * t / period - 1) % 4 - 2) - 1) for t in span]
    wave.plot(span, heights, color="0.6", lw=1, ls="--")
    wave.set(ylabel="wave, logits (dashed)")
    left.set(title="Reflection tokens", ylabel="% of tokens", xlabel="position in the text")
    right.set(title="Entropy of the model", ylabel="nats per token", xlabel="position in the text")
    _lengths(middle, runs)
    for panel in (left, right):
        panel.set_ylim(0, 1.25 * panel.dataLim.y1 or 1)  # room for the legend
        panel.legend(fontsize="small", loc="upper right")
    return figure


def _lengths(panel: Axes, runs: list[Results]) -> None:
    places = range(len(runs))
    panel.bar(places, [run["tokens"] for run in runs], width=0.6, color="0.8", label="all")
    thinking = [run["thinking"] for run in runs]
    panel.bar(places, thinking, width=0.6, color="C0", label="thinking")
    for place, run in zip(places, runs, strict=True):
        panel.annotate(
            f"{run['correct']} correct", (place, run["tokens"]), ha="center", va="bottom"
        )
    panel.set_xticks(list(places), [run["name"].replace(" ", "\n") for run in runs])
    panel.set(title="Length and accuracy", ylabel="tokens per text")
    panel.margins(y=0.15)
    panel.legend(fontsize="small", loc="lower right")


def _cost(cost: Results) -> Figure:
    batch, length, vocabulary = cost["shape"]
    title = (
        f"Loss and gradient of {batch}×{length} rows, vocabulary {vocabulary:,}, "
        f"{cost['dtype']}, {cost['threads']} threads"
    )
    figure, (left, right) = _figure(1, 2, title)
    names = ("fused", "eager")
    labels = ("reasonkern\n(gradient in place)", "eager torch\n(log_softmax, autograd)")
    medians = [1e3 * statistics.median(cost["seconds"][name]) for name in names]
    _bars(left, labels, medians, "Time", "ms (median)")
    extra = [cost["extra_bytes"][name] for name in names]
    if None in extra:
        right.set_axis_off()
        right.text(0.5, 0.5, "memory not measurable here", ha="center")
    else:
        mebibytes = [value / 2**20 for value in extra]
        logits = cost["logits_bytes"] / 2**20
        _bars(right, labels, mebibytes, "Peak memory beyond the logits", "MiB")
        right.axhline(logits, color="0.4", lw=1, ls="--")
        right.text(0.5, logits, f"logits\n{logits:.0f} MiB", va="bottom", ha="center", size="small")
    return figure


def _bars(panel: Axes, labels: tuple[str, ...], values: list[float], name: str, unit: str) -> None:
    bars = panel.bar(labels, values, color=["C0", "0.6"], width=0.55)
    panel.bar_label(bars, [f"{value:,.1f}" for value in values], padding=2)
    panel.set(title=name, ylabel=unit, xlim=(-0.5, len(values) - 0.5))
    panel.margins(y=0.15)
