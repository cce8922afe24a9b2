"""The table on the terminal."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("op", -33), ("shape", -13), ("dtype", -9), ("provider", -11), ("median", 10),
    ("p20–p80", 19), ("GB/s", 8), ("% copy", 7), ("peak memory", 12), ("× first", 8), ("pairs", 6),
)  # fmt: skip


def head() -> str:
    """Column names."""
    return _line([name for name, _ in COLUMNS])


def table(record: dict[str, Any]) -> str:
    """The rows of one case and its gates."""
    where = "x".join(map(str, record["shape"]))
    threads = f" {record['threads']}t" if record["threads"] else ""
    op = f"{record['op']} {record['label']}".strip()[: -COLUMNS[0][1]]
    lines = []
    for row in record["providers"]:
        start = [op, where, record["dtype"] + threads, row["name"]]
        if "seconds" in row and row["status"] == "ok":
            lines.append(_line(start + _numbers(row)) + _about(row))
        else:
            mark = {"mismatch": "✗", "failed": "failed"}.get(row["status"], "–")
            lines.append(_line([*start, mark]) + f"  {row.get('reason', '')[:100]}".rstrip())
        op = where = ""
    return "\n".join(lines + [f"    {gate_line(g)}" for g in record["gates"]])


def _about(row: dict[str, Any]) -> str:
    """What a provider says of itself."""
    if "backend" in row:
        return f"  [{row['backend']}]"
    if "flips" in row:
        return f"  {row['flips']} of {row['tokens']} tokens flip"
    return f"  {row['accepted']:.2f} tokens per step" if "accepted" in row else ""


def _numbers(row: dict[str, Any]) -> list[str]:
    took, ratio = row["seconds"], row["ratio"]["median"]
    share = f"{row['copy_share']:.0%}" if "copy_share" in row else ""
    peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f} MiB"
    return [
        duration(took["median"]),
        f"{duration(took['p20'])}–{duration(took['p80'])}",
        rate(row),
        share,
        peak,
        f"{ratio:.3g}",
        str(row["pairs"]),
    ]


def rate(row: dict[str, Any]) -> str:
    """GB/s; FLOP/s where matrix products are what is measured."""
    if "flop_rate" in row:
        tera = row["flop_rate"] / 1e12
        return f"{tera:.3g} TF" if tera >= 1 else f"{1e3 * tera:.3g} GF"
    return f"{row['bandwidth'] / 1e9:.1f}"


def gate_line(gate: dict[str, Any]) -> str:
    """Bound, value and verdict of a gate."""
    value = "–" if gate["value"] is None else f"{gate['value']:.3g}"
    pairs = f" ({gate['pairs']} pairs)" if gate["pairs"] else ""
    note = f" ({gate['note']})" if "note" in gate else ""
    return f"gate {gate['text']}: {value}{pairs} — {gate['status']}{note}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _line(cells: list[str]) -> str:
    widths = [width for _, width in COLUMNS]
    padded = [
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(cells, widths, strict=False)
    ]
    return " ".join(padded).rstrip()
