"""Patience with stores that answer "not now": which errors pass by themselves, and how long to wait for that.

s3fs, gcsfs and adlfs repeat most requests by themselves; http, sftp and others do not. So there are only a few tries
here, mainly to tell a store that is away from a file that is missing. The libraries below fsspec have no common base
class: what passes is seen from an HTTP status, or from an error of Python or aiohttp among its causes.
"""

import errno
import http.client
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tenacity

from distributed_adaround.errors import AdaRoundError, redact

logger = logging.getLogger(__name__)

MAX_TRIES = 3
# Full jitter: many ranks and jobs that were turned away together must not come back together.
_WAIT = tenacity.wait_random_exponential(multiplier=2, max=20)

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 529})
_PASSING_CLASSES = (ConnectionError, TimeoutError, http.client.IncompleteRead, socket.gaierror)
# EBUSY and EREMOTEIO are what s3fs makes of 503 and 500; the others say that a network or a host is away.
_PASSING_ERRNO = frozenset(
    {errno.EBUSY, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET}
    | {errno.ENETUNREACH}
)

_Result = TypeVar("_Result")


def is_passing(error: BaseException) -> bool:
    return passing_cause(error) is not None


def passing_cause(error: BaseException) -> BaseException | None:
    """The error, or what caused it, after which the same request may well succeed in a moment.

    fsspec turns an unreachable web server into FileNotFoundError.
    """
    errors = list(_with_causes(error))
    if any(isinstance(cause, ssl.SSLError) for cause in errors):
        return None  # a certificate or a protocol that does not fit
    return next(filter(_passes, errors), None)


def patiently(work: Callable[[], _Result], what: str) -> _Result:
    """The result of `work`, repeated while it raises errors that pass; then its last error. what: for the log."""

    def note(state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        assert error
        reason = redact(str(passing_cause(error))).partition("\n")[0][:200] or type(error).__name__
        number = state.attempt_number
        logger.warning("%s: the store does not answer (%s), try %d of %d", what, reason, number, MAX_TRIES)

    retry, stop = tenacity.retry_if_exception(is_passing), tenacity.stop_after_attempt(MAX_TRIES)
    return tenacity.Retrying(retry=retry, stop=stop, wait=_WAIT, before_sleep=note, reraise=True)(work)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """botocore names no cause, but raises while it handles one. An error of ours ends the chain: callers handle it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, AdaRoundError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _passes(error: BaseException) -> bool:
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUS
    # Where it is not imported, none of its errors was raised.
    aiohttp: Any = sys.modules.get("aiohttp")
    broken = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) if aiohttp else ()
    if isinstance(error, _PASSING_CLASSES + broken):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _http_status(error: BaseException) -> int | None:
    """The status that a server answered, wherever the library puts it: botocore, requests, aiohttp, azure, gcsfs."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        places = ((response, "status_code"), (error, "status"), (error, "status_code"), (error, "code"))
        found = next((value for place, name in places if (value := getattr(place, name, None)) is not None), None)
    if isinstance(found, str) and found.isdecimal():
        found = int(found)
    return found if isinstance(found, int) and 100 <= found < 600 else None
