"""The demo: train a small transformer on reasoning traces, then let it solve problems."""

from __future__ import annotations

import time

from .context import Config, Context, DemoError, prepare
from .control import control_reflection
from .cost import measure_loss
from .report import DEVIATION_LIMIT, can_plot, summary, table, write_json, write_plots
from .solve import solve_problems
from .traces import TraceError
from .train import fine_tune, learn_policy

__all__ = ["Config", "DemoError", "TraceError", "run"]

STAGES = (fine_tune, learn_policy, solve_problems, control_reflection, measure_loss)
INTERRUPTED = 130


def run(config: Config) -> int:
    """All stages, then the report; Ctrl-C skips to the report of what there is.

    Returns the exit status: 0, 1 when the results deviate from the eager formulation, or 130.
    """
    begin = time.perf_counter()
    context = prepare(config)
    plots = can_plot()
    status = 0
    try:
        for stage in STAGES:
            stage(context)
    except KeyboardInterrupt:
        print("\ninterrupted; writing the results so far", flush=True)
        status = INTERRUPTED
    context.results["budget"] = 60 * config.minutes
    context.results["seconds"] = time.perf_counter() - begin
    context.results["complete"] = status == 0
    _report(context, plots)
    if status == 0 and summary(context.results)["deviation"]["worst"] > DEVIATION_LIMIT:
        status = 1
    return status


def _report(context: Context, plots: bool) -> None:
    """JSON first: no failure of a plot takes the results along."""
    out = context.config.out
    written = [write_json(context.results, context.config, out / "results.json")]
    if plots:
        written += write_plots(context.results, out)
    print(table(context.results))
    print("written: " + ", ".join(map(str, written)), flush=True)
