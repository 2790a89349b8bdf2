"""A rank does not outlive the torchrun that started it.

torchrun ends its ranks when it ends, but not when it is killed (SIGKILL, out of memory). The ranks would go on unseen,
for hours, and beside them the job that somebody starts again, in the same output.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Ask Linux for SIGTERM when torchrun dies; elsewhere, or without torchrun, nothing happens.

    Linux sends it when the thread that started this process ends. That of torchrun is its main one.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
