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
from distributed_adaround.report.time_left import LayerCost, Rates, fit
from distributed_adaround.solve.record import LayerFigures

logger = logging.getLogger(__name__)


class Progress:
    """Shows where the job is and how long it will take. A context manager, inside which the bar is on the terminal.

    costs: of each layer; the layers solved so far show what they mean in seconds. Equal when left out. clock: seconds
    that only grow.
    """

    def __init__(
        self,
        num_layers: int,
        stream: TextIO | None = None,
        *,
        costs: Sequence[LayerCost] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs = [LayerCost(1.0)] * num_layers if costs is None else list(costs)
        assert len(self._costs) == num_layers
        self._clock = clock
        self._index, self._name, self._num_steps, self._share = 0, "", 0, 0.0
        self._started = clock()
        # Of layers solved in this run; committed layers take no time and would spoil the rate.
        self._measured: list[tuple[LayerCost, float]] = []
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
            self._task = self._bar.add_task("starting", total=1.0)

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
            self._measured.append((self._costs[self._index], self._clock() - self._started))
        self._started = self._clock()
        if report.warning:
            logger.warning("layer %s: %s", report.name, report.warning)
        if self._bar is not None:
            self._show("")
            return
        what = "from a commit" if report.resumed else f"in {report.seconds:.1f} s"
        count = f"layer {self._index + 1} of {len(self._costs)}"
        errors = f"error {report.hard_error:.2e}, nearest {report.nearest_error:.2e}"
        if not math.isnan(report.held_out_error):
            errors += f", on other data {report.held_out_error:.2e}"
        logger.info("%s %s: %s, %s, %s left", count, report.name, what, errors, _duration(self.seconds_left))

    @property
    def seconds_left(self) -> float:
        """Time the rest of the job will take at the pace of this run; NaN before there is one."""
        if self._index + 1 == len(self._costs) and self._share == 1:
            return 0.0
        rates = self._rates
        if rates is None:
            return math.nan
        left = rates.seconds(self._costs[self._index]) * (1 - self._share)
        return left + sum(map(rates.seconds, self._costs[self._index + 1 :]))

    @property
    def _rates(self) -> Rates | None:
        """From the layers before and from the part of the running one that is done."""
        measured, running = self._measured, self._costs[self._index] if self._costs else LayerCost(0.0)
        if 0 < self._share < 1:
            part = LayerCost(running.data * self._share, running.products * self._share)
            measured = [*measured, (part, self._clock() - self._started)]
        return fit(measured)

    def _show(self, detail: str) -> None:
        if self._bar is not None:
            count = f"layer {self._index + 1}/{len(self._costs)}"
            text = f"{count} {shorten(self._name, 32)}{detail}, {_duration(self.seconds_left)} left"
            rates = self._rates or Rates(1.0, 1.0)
            seconds = list(map(rates.seconds, self._costs))
            done = sum(seconds[: self._index]) + seconds[self._index] * self._share
            self._bar.update(self._task, description=text, completed=done / (sum(seconds) or 1.0))


def _duration(seconds: float) -> str:
    return "?" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
