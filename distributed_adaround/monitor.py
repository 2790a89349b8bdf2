"""What the solver of one layer tells and asks, in a job: progress, signals, and its state saved now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor

from distributed_adaround.checkpoint.commits import Commits
from distributed_adaround.report.console import SilentProgress
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.solve.problem import Monitor


class LayerMonitor(Monitor):
    """Of one layer. save_seconds: between two saved states. clock: seconds that only grow."""

    def __init__(
        self,
        layer: str,
        progress: SilentProgress,
        stop: StopRequest,
        commits: Commits,
        save_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(progress.step)
        self._layer, self._stop, self._commits = layer, stop, commits
        self._save_seconds, self._clock = save_seconds, clock
        self._saved = clock()

    @property
    def stop_requested(self) -> bool:
        return self._stop.requested

    @property
    def save_due(self) -> bool:
        return self._clock() - self._saved >= self._save_seconds

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        self._commits.save_state(self._layer, key, state)
        self._saved = self._clock()

    def load(self, key: str) -> dict[str, Tensor] | None:
        return self._commits.load_state(self._layer, key)
