"""Patience with stores that answer "not now": which errors pass by themselves, and how long to wait for that.

fsspec's stores raise the errors of the libraries below them (aiohttp, botocore, requests, azure ...), which have no
base class in common and need not be installed. They are told apart by what they carry: an HTTP status, an errno, or
the name of a class.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tenacity

from distributed_adaround.errors import redact

logger = logging.getLogger(__name__)

MAX_TRIES = 5
# Full jitter: many ranks and jobs that were turned away together must not come back together.
_WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=20)

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 529})
_PASSING_ERRNO = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,  # what s3fs makes of 503
        errno.EREMOTEIO,  # and of 500
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
_PASSING_CLASSES = frozenset(
    {
        # aiohttp
        "ClientConnectionError",
        "ClientPayloadError",
        # botocore
        "ConnectionError",
        "HTTPClientError",
        "ResponseStreamingError",
        # requests and urllib3
        "ChunkedEncodingError",
        "IncompleteRead",
        "ProtocolError",
        "Timeout",
        # google-auth, azure
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
        # paramiko
        "SSHException",
        # the name server
        "gaierror",
    }
)
# These say something about this machine or the job file, not about the store.
_LASTING_CLASSES = frozenset({"AuthenticationException", "BadHostKeyException", "ProxyConnectionError", "SSLError"})
# Attributes of aiohttp's, azure's, gcsfs's and urllib's errors.
_STATUS_NAMES = ("status", "status_code", "code")

_Result = TypeVar("_Result")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: the store is busy, away, or the line broke."""
    return passing_cause(error) is not None


def passing_cause(error: BaseException) -> BaseException | None:
    """The error, or what caused it, that passes. fsspec turns an unreachable web server into FileNotFoundError."""
    return next(filter(_passes, _with_causes(error)), None)


def patiently(work: Callable[[], _Result], what: str) -> _Result:
    """The result of `work`, repeated up to MAX_TRIES times while it raises errors that pass. Raises its last error.

    what: for the log.
    """

    def note(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        reason = redact(str(passing_cause(error))).partition("\n")[0][:200] or type(error).__name__
        number = state.attempt_number
        logger.warning("%s: the store does not answer (%s), try %d of %d", what, reason, number, MAX_TRIES)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        stop=tenacity.stop_after_attempt(MAX_TRIES),
        wait=_WAIT,
        before_sleep=note,
        reraise=True,
    )
    return retrying(work)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _passes(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _LASTING_CLASSES:
        return False
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUS
    if isinstance(error, ConnectionError | TimeoutError) or names & _PASSING_CLASSES:
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _http_status(error: BaseException) -> int | None:
    """The status that a server answered, wherever the library puts it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        holders = ((response, "status_code"), *((error, name) for name in _STATUS_NAMES))
        values = (getattr(holder, name, None) for holder, name in holders)
        found = next((value for value in values if value is not None), None)
    if isinstance(found, str) and found.isdecimal():
        found = int(found)
    return found if isinstance(found, int) and 100 <= found < 600 else None
