"""Progress of a job for the person who waits: a bar on a terminal, one log line per finished layer anywhere else."""

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from distributed_adaround.errors import shorten
from distributed_adaround.solve.record import LayerFigures

logger = logging.getLogger(__name__)


class Progress:
    """Shows where the job is and how long it will take. A context manager, inside which the bar is on the terminal.

    costs: expected cost of each layer in any unit, by which the time left is weighed; equal when left out.
    clock: seconds that only grow.
    """

    def __init__(
        self,
        num_layers: int,
        stream: TextIO | None = None,
        *,
        costs: Sequence[float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs = [1.0] * num_layers if costs is None else list(costs)
        assert len(self._costs) == num_layers
        self._clock = clock
        self._index, self._name, self._num_steps, self._share = 0, "", 0, 0.0
        self._started = clock()
        # Seconds and cost of layers solved in this run; committed layers take no time and would spoil the rate.
        self._seconds, self._cost = 0.0, 0.0
        self._bar: Bar | None = None
        self._task = TaskID(0)
        stream = sys.stderr if stream is None else stream
        console = Console(file=stream, force_terminal=stream.isatty())
        if console.is_terminal and not console.is_dumb_terminal:
            name, share = (
                TextColumn(text, markup=False, table_column=Column(no_wrap=True))
                for text in ("{task.description}", "{task.percentage:3.0f}%")
            )
            self._bar = Bar(name, BarColumn(bar_width=20), share, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=sum(self._costs) or 1.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def layer(self, index: int, name: str, num_steps: int) -> None:
        """Layer `index` (from 0) begins and will take `num_steps` steps (0 where nothing is learned)."""
        self._index, self._name, self._num_steps, self._share = index, name, num_steps, 0.0
        self._started = self._clock()
        self._show("")

    def step(self, step: int, loss: float) -> None:
        """`step` steps of the current layer are done. Call it rarely, about every 100 steps."""
        self._share = step / self._num_steps if self._num_steps else 0.0
        self._show(f" step {step}/{self._num_steps} loss {loss:.3e}")

    def done(self, report: LayerFigures) -> None:
        """The current layer is finished, or was found committed."""
        self._share = 1.0
        if not report.resumed:
            self._seconds += self._clock() - self._started
            self._cost += self._costs[self._index]
        self._started = self._clock()
        if self._bar is not None:
            self._show("")
            return
        what = "from a commit" if report.resumed else f"in {report.seconds:.1f} s"
        error, nearest = report.hard_error, report.nearest_error
        count = f"layer {self._index + 1} of {len(self._costs)}"
        left = _duration(self.seconds_left)
        logger.info("%s %s: %s, error %.2e, nearest %.2e, %s left", count, report.name, what, error, nearest, left)

    @property
    def seconds_left(self) -> float:
        """Time the rest of the job will take at the pace of this run; NaN before there is one."""
        seconds, cost = self._seconds, self._cost
        running = self._costs[self._index] * self._share if self._share < 1 else 0.0
        if running:
            seconds, cost = seconds + self._clock() - self._started, cost + running
        left = sum(self._costs[self._index :]) - self._costs[self._index] * self._share
        if left <= 0:
            return 0.0
        return left * seconds / cost if cost else math.nan

    def _show(self, detail: str) -> None:
        if self._bar is not None:
            count = f"layer {self._index + 1}/{len(self._costs)}"
            text = f"{count} {shorten(self._name, 32)}{detail}, {_duration(self.seconds_left)} left"
            done = sum(self._costs[: self._index]) + self._costs[self._index] * self._share
            self._bar.update(self._task, description=text, completed=done)


def _duration(seconds: float) -> str:
    return "?" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
