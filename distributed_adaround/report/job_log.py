"""One listener for all that a job tells while it runs: it passes it on to the console, the events and the status."""

from types import TracebackType
from typing import Self

from distributed_adaround.report.console import SilentProgress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.status import JobStatus
from distributed_adaround.solve.record import LayerFigures


class JobLog:
    """A context manager: progress is shown inside. Without arguments it is silent."""

    def __init__(
        self,
        progress: SilentProgress | None = None,
        events: EventLog | None = None,
        status: JobStatus | None = None,
    ) -> None:
        self._progress = progress or SilentProgress()
        self._events = events or EventLog.null()
        self._status = status
        self._num_layers, self._layers_done = 0, 0

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def job_started(self, num_layers: int, layers_done: int, **facts: object) -> None:
        """The output is open. layers_done: found committed; facts: JSON values."""
        self._num_layers = num_layers
        self._events.write("start", finished=layers_done, **facts)
        self._events.flush()
        if self._status is not None:
            self._status.running(layers_done)

    def layer_started(self, name: str, num_steps: int) -> None:
        """A layer begins, and will take so many steps (0 where nothing is learned)."""
        self._progress.layer(self._layers_done, name, num_steps)

    def step(self, step: int, loss: float) -> None:
        """`step` steps of the current layer are done."""
        self._progress.step(step, loss)

    def layer_done(self, figures: LayerFigures) -> None:
        """The current layer is committed, or was found so."""
        self._layers_done += 1
        self._progress.done(figures)
        self._events.write("layer", index=self._layers_done, of=self._num_layers, **figures.to_dict())
        self._events.flush()
        if self._status is not None and not figures.resumed:
            self._status.running(self._layers_done)

    def job_done(self, seconds: float, output_error: float) -> None:
        """The results are written."""
        self._events.write("done", seconds=seconds, output_error=output_error)
        self._events.flush()
        if self._status is not None:
            self._status.done()
