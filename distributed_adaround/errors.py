"""Every error this program raises on purpose, and the exit code each one ends a job with.

A message is one line without credentials: the value, the rule it breaks, the remedy; layer and rank where known.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, unquote

# Everything up to the last "@": of the host part, or of the whole link where a colon not followed by a port says that
# what stands before it is a password (keys of object stores hold slashes).
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/@:\s]*:(?!\d+(?:/|\s|$))\S*@|[^/\s]*@)")
# A query: after an http URL anything, elsewhere only what holds a "=", since "?" is also a wildcard.
_QUERY = re.compile(r"(?<=://)([^?\s'\"]*)\?([^\s?'\"]*=[^\s'\"]*)")
_HTTP_QUERY = re.compile(r"(https?://[^?#\s'\"]*)[?#]([^\s'\"]*)")
# Shorter parts of credentials ("me", a version "v=1") are words of ordinary messages too.
_MIN_SECRET = 5
# Values of a query that open doors, as opposed to "format=parquet".
_SECRET_KEY = re.compile(r"auth|cred|key|pass|pwd|secret|sig|token", re.IGNORECASE)
_LONG = 16

# Of all URIs that this process has opened: what a store answers need not have the form of a URI.
_secrets: set[str] = set()


class AdaRoundError(Exception):
    """Base of all, by itself a defect of our own. `exit_code` follows sysexits.h. reported_by: the one rank that tells
    the user, where several raise; None: whoever raises. layer: being rounded then."""

    exit_code = 70
    reported_by: int | None = None
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


class UnreachableError(AdaRoundError, OSError):
    """A store of files is busy or away, also after several tries. Nothing is wrong with the job."""

    exit_code = 75


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Errors from inside say which layer was being rounded: they get the attribute `layer`."""
    try:
        yield
    except Exception as error:
        error.layer = name  # type: ignore[attr-defined]
        raise


def shorten(text: str, length: int = 400) -> str:
    """At most so many printable characters of what a file or a library says: the middle is left out."""
    head = (length - 3) // 2
    text = text if len(text) <= length else f"{text[:head]}...{text[head + 3 - length :]}"
    return "".join(character if character.isprintable() else " " for character in text)


def redact(text: str) -> str:
    """The URI, or any text with URIs in it, without user names, passwords, tokens and query strings."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_credentials(text)


def without_credentials(uri: str) -> str:
    """What `redact` makes of a URI, whatever was opened before."""
    links = (_CREDENTIALS.sub("", link) for link in uri.split("::"))
    return "::".join(_QUERY.sub(r"\1", _HTTP_QUERY.sub(r"\1", link)) for link in links)


def remember_secrets(uri: str) -> None:
    """From now on `redact` removes the credentials of this URI wherever they stand in a text."""
    for link in uri.split("::"):
        found = [match.removesuffix("@") for match in _CREDENTIALS.findall(link)]
        bare = _CREDENTIALS.sub("", link)
        found += [part for secret in found for part in secret.split(":", 1)]
        for query in (query for pattern in (_HTTP_QUERY, _QUERY) for _, query in pattern.findall(bare)):
            pairs = (pair.partition("=") for pair in re.split("[&;]", query))
            found += [query, *(value for key, _, value in pairs if _SECRET_KEY.search(key) or len(value) >= _LONG)]
        forms = (form for part in found for form in (part, unquote(part), quote(part, safe="")))
        _secrets.update(form for form in forms if len(form) >= _MIN_SECRET)


def first_line(error: BaseException) -> str:
    """Class and first line of what a library raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(lines[0])}" if lines else type(error).__name__
