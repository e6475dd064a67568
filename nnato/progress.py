"""Progress as bars, in a terminal or a notebook, and as one line about how long a stage will take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnato.statistics import Progress

WORTH_SAYING = 30.0
"""Seconds that a stage has to have before it for a line about them."""


@contextlib.contextmanager
def progress_bar(say: Callable[[str], None] | None = None) -> Iterator[Progress]:
    """A progress callback that draws a bar on stderr, one per stage; none where nobody watches.

    Args:
        say: Told in one line how long a stage will take, estimated from its first step; by default nobody is.

    Example:
        >>> from nnato.progress import progress_bar
        >>> with progress_bar() as progress:  # accumulate(model, progress=progress)
        ...     progress("forward passes", 1, 2)
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        tasks: dict[str, Any] = {}
        estimate = Estimate()

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            ended = total is not None and done >= total
            bar.update(tasks[stage], completed=total if ended else done, total=total)
            if say is not None and (line := estimate.line(stage, done, total)):
                say(line)

        yield update


class Estimate:
    """How long each stage will take, from its first step.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun: dict[str, tuple[float, int] | None] = {}

    def line(self, stage: str, done: int, total: int | None) -> str | None:
        """What to say when a stage has come so far: once for each stage, and only if it is long."""
        if stage not in self.begun:
            self.begun[stage] = self.clock(), done
        begun = self.begun[stage]
        if begun is None or total is None or done <= begun[1]:
            return None
        self.begun[stage] = None
        left = (total - done) * (self.clock() - begun[0]) / (done - begun[1])
        if left < WORTH_SAYING:
            return None
        return f"{stage}: about {in_time(left)} for the {total - done:,} left of {total:,}, by the first"


def in_time(seconds: float) -> str:
    """Seconds in words, with two digits at most: 40 s, 5 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
