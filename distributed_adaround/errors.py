"""Every error this program raises on purpose, and the exit code each one ends a job with.

AdaRoundError                 70   our own bug, unless a subclass says otherwise
├── SpecError (ValueError)    64   the job file: unknown field, bad value, contradiction
├── InputError (ValueError)   65   model, weights, calibration data or an old checkpoint
├── OutputError (OSError)     73   results cannot be written
├── PeerError                 75   another rank failed, or could not be reached: try again
├── StoppedError              75   a signal asked the job to stop: start it again
└── UnreachableError (OSError) 75 a store could not be reached: try again

A message is one line: the value, the rule it breaks, the remedy; the layer and rank where they are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class AdaRoundError(Exception):
    """Base of all errors raised on purpose. `exit_code` follows sysexits.h.

    told_by: the one rank that tells the user, where several raise; None: whoever raises. layer: being rounded then.
    """

    exit_code = 70
    told_by: int | None = None
    layer: str | None = None


class SpecError(AdaRoundError, ValueError):
    """The job file or a keyword argument is wrong."""

    exit_code = 64


class InputError(AdaRoundError, ValueError):
    """The model, its weights, the calibration data or an earlier checkpoint is missing, damaged or does not fit."""

    exit_code = 65


class OutputError(AdaRoundError, OSError):
    """Results, commits or reports cannot be written."""

    exit_code = 73


class PeerError(AdaRoundError):
    """Another rank failed; its own error says why."""

    exit_code = 75


class StoppedError(AdaRoundError):
    """A signal asked the job to stop. What was finished is saved; the job goes on when it is started again."""

    exit_code = 75

    def __init__(self, message: str = "stopped by a signal; start the job again to go on") -> None:
        super().__init__(message)


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Errors from inside say which layer was being rounded: they get the attribute `layer`."""
    try:
        yield
    except Exception as error:
        error.layer = name  # type: ignore[attr-defined]
        raise


class UnreachableError(AdaRoundError, OSError):
    """A store of files is busy or away, also after several tries. Nothing is wrong with the job."""

    exit_code = 75


def shorten(text: str, length: int = 400) -> str:
    """At most so many printable characters of what a file or a library says: the middle is left out."""
    half = (length - 3) // 2
    text = text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
    return "".join(character if character.isprintable() else " " for character in text)
