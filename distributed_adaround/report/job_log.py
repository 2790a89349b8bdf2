"""One listener for all that a job tells while it runs: it passes it on to the console, the events and the status.

The events are JSON lines, `<output>/events/rank-<r>.jsonl`, one file per rank. Object stores cannot append, so the
lines are kept in memory and `flush` writes the whole file again. A job that starts again adds to its old file.
"""

import json
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Self

from distributed_adaround.errors import redact
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.metrics.figures import MetricFigures
from distributed_adaround.report.console import Progress
from distributed_adaround.report.status import JobStatus
from distributed_adaround.solve.record import LayerFigures

logger = logging.getLogger(__name__)


class EventLog:
    """The events of one rank. Every line has time (UTC), rank and event, then the fields given."""

    def __init__(self, uri_folder: str | None, rank: int) -> None:
        """uri_folder: the job's output, or None to keep nothing. Raises InputError when an old file is unreadable."""
        self._uri = None if uri_folder is None else uris.join(uri_folder, "events", f"rank-{rank}.jsonl")
        self._rank = rank
        self._data = b""
        if self._uri is not None and storage.exists(self._uri):
            self._data = storage.read_bytes(self._uri)
            if self._data and not self._data.endswith(b"\n"):
                self._data += b"\n"
        self._num_flushed = len(self._data)

    def write(self, event: str, **fields: object) -> None:
        """Add one line: `fields` are JSON values; inf and NaN become null, URIs lose their credentials."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = jsontext.json_safe({"time": time, "rank": self._rank, "event": event, **fields})
        if self._uri is not None:
            self._data += json.dumps(_redacted(line), allow_nan=False).encode() + b"\n"

    def flush(self) -> None:
        """Make the lines so far permanent. Raises OutputError."""
        if self._uri is not None and len(self._data) > self._num_flushed:
            storage.write_bytes(self._uri, self._data)
            self._num_flushed = len(self._data)


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return value


class JobLog:
    """A context manager: progress is shown inside. Each part that is not given stays silent. started: when the job
    began, by time.monotonic()."""

    def __init__(
        self,
        progress: Progress | None = None,
        events: EventLog | None = None,
        status: JobStatus | None = None,
        started: float | None = None,
    ) -> None:
        self._progress, self._status = progress, status
        self._started = time.monotonic() if started is None else started
        self._begun = False
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
        if not self._begun:
            self._begun, seconds = True, time.monotonic() - self._started
            logger.info("first layer after %.0f s: %s", seconds, name)
            self._events.write("first_layer", name=name, seconds=seconds)
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

    def evaluated(self, metrics: Iterable[MetricFigures]) -> None:
        """What the job measured of the float and of the quantized network."""
        for figures in metrics:
            self._events.write("metric", **figures.to_dict())
        self._events.flush()

    def job_done(self, seconds: float, output_error: float) -> None:
        """The results are written. output_error: of the network, on the calibration data; NaN: unknown."""
        self._events.write("done", seconds=seconds, output_error=output_error)
        self._events.flush()
        if self._status is not None:
            self._status.done()
