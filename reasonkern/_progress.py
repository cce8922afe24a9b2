"""What commands say: a progress bar that does without tqdm where there is none, counts."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


def counted(number: int, noun: str) -> str:
    """The number with its noun, "1 trace" or "2,000 traces"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Update(Protocol):
    """Advances the bar by some steps and puts a note behind it."""

    def __call__(self, note: str, steps: int = 1, /) -> None:
        """See the class."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Update]:
    """A tqdm bar; without tqdm, a plain line about ten times per stage."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield _plain(title, total)
        return
    with tqdm(total=total, desc=title, ncols=100) as bar:

        def update(note: str, steps: int = 1, /) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(steps)

        yield update


def _plain(title: str, total: int) -> Update:
    begin = time.perf_counter()
    done = 0
    interval = max(1, total // 10)

    def update(note: str, steps: int = 1, /) -> None:
        nonlocal done
        before, done = done, done + steps
        if done == total or done // interval > before // interval:
            seconds = time.perf_counter() - begin
            print(f"{title}: {done}/{total} [{seconds:.0f} s] {note}", flush=True)

    return update
