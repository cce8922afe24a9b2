"""`python -m benchmarks [FAMILY]`: measures, prints a table, keeps a result file, checks gates."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import engine, families, machine, report
from benchmarks.case import DTYPES, Case, Family

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


NONE = Case("", (), "float32", "cpu", passes=0, providers=())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("family", nargs="?", choices=families.NAMES, help="default: all")
    add("--case", action="append", help="part of a case's id (see --list); may be repeated")
    add("--provider", action="append", help="only these; the first named is what ratios refer to")
    add("--dtype", type=lambda d: SHORT_DTYPES.get(d, d), choices=list(DTYPES))
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--quick", action="store_true", help="small cases alone, few pairs: a first impression")
    add("--list", action="store_true", help="print the cases and their gates, measure nothing")
    add("--json", type=Path, metavar="FILE", help="write results here, after every case")
    add("--resume", action="store_true", help="keep FILE's cases and run the missing ones")
    add("--check", action="store_true", help="run the gated cases; exit 1 when a gate fails")
    add("--plot", type=Path, metavar="FILE", help="draw the results (needs matplotlib)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads instead of the cases' own; their gates fall away",
    )
    return parser.parse_args(arguments)


def select(family: Family, options: argparse.Namespace, device: str) -> list[Case]:
    """The cases of the command line, with its threads and providers put in."""
    chosen: dict[str, Case] = {}
    for case in family.cases:
        if case.device != device or (options.dtype and case.dtype != options.dtype):
            continue
        own, case = case, engine.with_threads(case, options.threads)
        if case.threads != own.threads:
            case = dataclasses.replace(case, gates=())
        if options.case:
            wanted = any(part in case.id for part in options.case)
        else:
            wanted = not options.check or bool(case.gates)
        wanted = wanted and (case.quick or not options.quick)
        # With --threads two cases can become one: the one with more providers says more.
        if wanted and len(case.providers) > len(chosen.get(case.id, NONE).providers):
            chosen[case.id] = restrict(case, options)
    return list(chosen.values())


def restrict(case: Case, options: argparse.Namespace) -> Case:
    """Leaves out providers nobody asked for; with `--check` those that no gate refers to."""
    if options.provider:
        named = tuple(dict.fromkeys(options.provider))
        kept = tuple(p for p in named if p in case.providers)
    elif options.check:
        needed = {case.providers[0], engine.CEILING, *(g.against for g in case.gates)}
        kept = tuple(p for p in case.providers if p in needed)
    else:
        return case
    same_subject = kept[:1] == case.providers[:1]
    gates = tuple(g for g in case.gates if same_subject and (not g.against or g.against in kept))
    return dataclasses.replace(case, providers=kept, gates=gates)


def list_cases(cases: list[Case]) -> None:
    """Ids, providers and gates."""
    for case in cases:
        print(f"{case.id}{'  (quick)' if case.quick else ''}\n    {' '.join(case.providers)}")
        for gate in case.gates:
            needs = f" (enforced with {gate.needs})" if gate.needs else ""
            print(f"    gate {gate.text()}{needs}")


def run(selected: list[tuple[Family, Case]], options: argparse.Namespace) -> engine.Store:
    """Measures the cases and prints each as soon as it is done."""
    facts = machine.describe()
    print(machine.line(facts), flush=True)
    print("time and memory only for results that match a float64 reference (✗: mismatch);")
    print("× first: time in units of the first provider's, median over interleaved pairs\n")
    print(report.head(), flush=True)
    store = engine.Store(options.json, facts, options.resume)
    effort = engine.QUICK if options.quick else engine.Effort()
    todo = [(f, c) for f, c in selected if not store.done(c.id)]
    with progress_bar(len(todo)) as (step, note, say):
        for family, case in todo:
            record = measure(family, case, effort, facts, note)
            store.add(record)
            say(report.table(record))
            step()
    return store


def measure(
    family: Family,
    case: Case,
    effort: engine.Effort,
    facts: dict[str, Any],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """One case; whatever goes wrong in its set-up becomes a record too."""
    try:
        return engine.run_case(family, case, effort, facts, lambda m: note(f"{case.id}: {m}"))
    except Exception as error:
        return engine.failed_case(family, case, error, facts)


class progress_bar:  # noqa: N801 - used like a function
    """tqdm on stderr where it is installed and somebody watches; silence otherwise."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="case", dynamic_ncols=True)

    def __enter__(self) -> tuple[Callable[[], None], Callable[[str], None], Callable[[str], None]]:
        if self.bar is None:
            return (lambda: None), (lambda _: None), (lambda text: print(text, flush=True))
        return self.bar.update, self.bar.set_postfix_str, self.bar.write

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 for a failed gate under --check, 2 for nothing to do, 130 for Ctrl-C."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    if options.plot and find_spec("matplotlib") is None:  # before hours of measuring
        print("--plot needs matplotlib (pip install 'reasonkern[bench]')", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [options.family] if options.family else list(families.NAMES)
    selected = [(f, case) for f in map(families.load, names) for case in select(f, options, device)]
    if options.list:
        list_cases([case for _, case in selected])
        return 0
    if not selected:
        print("no case matches; see --list", file=sys.stderr)
        return 2
    try:
        store = run(selected, options)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished cases are in {options.json or 'the table above'}")
        return 130
    return finish(store, options)


def finish(store: engine.Store, options: argparse.Namespace) -> int:
    """Draws, and says whether the gates hold."""
    if options.plot:
        from benchmarks import plot

        plot.draw(store.content(), options.plot, (options.json or options.plot).name)
        print(f"picture: {options.plot}")
    return check(store) if options.check else 0


def check(store: engine.Store) -> int:
    """The gates again, in one place."""
    judged = [(record["id"], gate) for record in store.records for gate in record["gates"]]
    if not judged:
        print("no gate belongs to these cases", file=sys.stderr)
        return 2
    print()
    for case_id, gate in judged:
        print(f"{case_id}: {report.gate_line(gate)}")
    held = engine.gates_hold(store.records)
    print("all gates hold" if held else "a gate FAILED")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
