"""SIGTERM and SIGUSR2 ask a job to stop: it saves what is whole and ends; a second signal ends it at once.

Schedulers send them some time before they take a machine away. USR2, since NCCL uses USR1. Before and after the walk
through the layers there is nothing to save, and the first signal raises StoppedError where the program is. Inside
`deferred` it only sets `requested`, which the loops look at.

Launchers may say it more than once: Slurm signals all processes of a step, and torchrun passes its own signal on to the
ranks. So signals within ECHO_SECONDS of the first are the same one.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from distributed_adaround.errors import StoppedError

ECHO_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether a signal asked this process to stop. Without `listening` it never does."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block. Only for the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        # A handler waits while the process is inside a collective; the byte that this sends does not.
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)  # ends the thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal only sets `requested` inside this block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise StoppedError

    def _count(self, reader: int) -> None:
        """Thread: one byte per signal."""
        first = 0.0
        with suppress(OSError), os.fdopen(reader, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                if byte[0] not in SIGNALS:
                    continue
                now = time.monotonic()
                if self.requested and now - first > ECHO_SECONDS:
                    os._exit(StoppedError.exit_code)
                if not self.requested:
                    first, self.requested = now, True


def end_with_launcher() -> None:
    """Ask Linux for SIGTERM when torchrun dies: killed (SIGKILL, out of memory), it does not end its ranks.

    They would go on unseen, beside the job that somebody starts again in the same output. Linux sends the signal when
    the thread that started this process ends; that of torchrun is its main one.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
