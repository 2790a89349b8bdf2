"""Every error this program raises on purpose, and the exit code each one ends a job with.

AdaRoundError                 70   our own bug, unless a subclass says otherwise
├── SpecError (ValueError)    64   the job file: unknown field, bad value, contradiction
├── InputError (ValueError)   65   model, weights, calibration data or an old checkpoint
├── OutputError (OSError)     73   results cannot be written
└── PeerError                 75   another rank failed, or could not be reached: try again

A message is one line: the value, the rule it breaks, the remedy; the layer and rank where they are known.
"""

from __future__ import annotations


class AdaRoundError(Exception):
    """Base of all errors raised on purpose. `exit_code` follows sysexits.h.

    told_by: the one rank that tells the user, where several raise; None: whoever raises.
    """

    exit_code = 70
    told_by: int | None = None


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
