"""One listener for all that a job tells while it runs: it passes it on to the console, the events and the status."""

from typing import Self

from distributed_adaround.report.console import Progress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.status import JobStatus
from distributed_adaround.solve.record import LayerFigures


class JobLog:
    """A context manager: progress is shown inside. Each part that is not given stays silent."""

    def __init__(
        self, progress: Progress | None = None, events: EventLog | None = None, status: JobStatus | None = None
    ) -> None:
        self._progress, self._status = progress, status
        self._events = events or EventLog(None, 0)
        self._num_layers, self._layers_done = 0, 0

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.__exit__()

    def job_started(self, num_layers: int, layers_done: int, **facts: object) -> None:
        """The output is open. layers_done: found committed; facts: JSON values."""
        self._num_layers = num_layers
        self._events.write("start", finished=layers_done, **facts)
        self._events.flush()
        if self._status is not None:
            self._status.running(layers_done)

    def layer_started(self, name: str, num_steps: int) -> None:
        """num_steps: 0 where nothing is learned."""
        if self._progress is not None:
            self._progress.layer(self._layers_done, name, num_steps)

    def step(self, step: int, loss: float) -> None:
        """`step` steps of the current layer are done."""
        if self._progress is not None:
            self._progress.step(step, loss)

    def layer_done(self, figures: LayerFigures) -> None:
        """The current layer is committed, or was found so."""
        self._layers_done += 1
        if self._progress is not None:
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
