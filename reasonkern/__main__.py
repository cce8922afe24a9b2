"""The command line: ``python -m reasonkern {info,demo,tune,--version}``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__

# add_parser of a group of sub-commands
AddParser = Callable[..., argparse.ArgumentParser]


def _add_info(add: AddParser) -> None:
    about = "which backend serves which op on this machine, and why others do not"
    add("info", help=about, description=about).set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from ._load import format_info

    print(format_info())
    return 0


def _add_demo(add: AddParser) -> None:
    about = "train a small transformer on reasoning traces, then let it solve problems"
    demo = add("demo", help=about, description=about)
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--traces",
        type=Path,
        metavar="FILE",
        help="JSONL, plain or gzip, one object per line with problem_id, prompt, text and correct "
        "(default: generated arithmetic)",
    )
    demo.add_argument(
        "--objective",
        default="dapo",
        metavar="NAME",
        help="a named constructor of Objective: dapo, gppo, bapo, gtpo, … (default: %(default)s)",
    )
    demo.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for results.json and the plots (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument(
        "--steps",
        type=_at_least(4),
        default=60,
        help="steps of stage 1, at least 4, and of stage 2 about as many (default: %(default)s)",
    )
    demo.add_argument(
        "--minutes",
        type=_minutes,
        default=4.5,
        help="time budget; a slow machine takes fewer steps, and some 15 seconds or more are "
        "the least (default: %(default)s)",
    )
    demo.add_argument(
        "--batch", type=_at_least(1), default=4, help="windows per step (default: %(default)s)"
    )
    demo.add_argument(
        "--window",
        type=_at_least(8),
        default=256,
        help="tokens in a window (default: %(default)s)",
    )


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {text}")
        return value

    parse.__name__ = "int"
    return parse


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return value


_minutes.__name__ = "float"  # what argparse calls it


def _demo(args: argparse.Namespace) -> int:
    if __name__ == "__main__":
        _shorten_spins()
    from . import demo

    settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("run", "command")}
    try:
        return demo.run(demo.Config(**settings))
    except (demo.DemoError, demo.TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _shorten_spins() -> None:
    """Restarts the command with a shorter spin of libgomp's waiting threads, which is read once.

    On busy cores, threads that spin for the default time hold up those they wait for, in every
    small operation; on idle ones a short spin costs nothing. Not where another program owns the
    process, as under ``%run -m`` of a notebook.
    """
    own = "reasonkern" in sys.orig_argv
    if own and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _add_tune(add: AddParser) -> None:
    about = "replay traces through a draft table and fit the draft tree to them"
    tune = add("tune", help=about, description=about)
    tune.set_defaults(run=_tune)
    tune.add_argument(
        "traces",
        type=Path,
        metavar="TRACES.jsonl[.gz]",
        help="one object per line with text or tokens (ids), of which tokens win; optional: prompt "
        "or prompt_tokens, likewise, problem_id (trajectories of one problem), topk_ids and "
        "topk_logprobs",
    )
    tune.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes, mistral-common, a tokenizer.json or the folder of one, or a tekken*.json "
        "(default: %(default)s)",
    )
    tune.add_argument(
        "--nodes",
        type=_at_least(1),
        default=80,
        help="size of the tree, the root included (default: %(default)s)",
    )
    tune.add_argument(
        "--orders",
        type=_orders,
        default=(4, 3, 2),
        metavar="4,3,2",
        help="context lengths of the table, the longest first (default: 4,3,2)",
    )
    tune.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="tree.json",
        help="where to write the tree (default: only shown)",
    )
    tune.add_argument(
        "--png", type=Path, metavar="FILE", help="draws the tree and the results; needs matplotlib"
    )


def _orders(text: str) -> tuple[int, ...]:
    try:
        orders = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers like 4,3,2, got {text}") from None
    if list(orders) != sorted(set(orders), reverse=True) or not 1 <= orders[-1] <= orders[0] <= 8:
        raise argparse.ArgumentTypeError(f"expected descending integers in [1, 8], got {text}")
    if len(orders) > 4:
        raise argparse.ArgumentTypeError(f"expected at most 4 orders, got {text}")
    return orders


def _tune(args: argparse.Namespace) -> int:
    from .speculation import cli

    settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("run", "command")}
    try:
        return cli.run(cli.TuneConfig(**settings))
    except (cli.TuneError, cli.TraceError, cli.TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# One entry per sub-command.
COMMANDS: tuple[Callable[[AddParser], None], ...] = (_add_info, _add_demo, _add_tune)


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command; the exit status is 2 after a mistake of the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m reasonkern")
    parser.add_argument("--version", action="version", version=f"reasonkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command(commands.add_parser)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `info | head`: nobody reads on, and the exit would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
