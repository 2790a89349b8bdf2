"""URIs as text: cut, joined, and shown without the credentials in them.

A URI is a path ("data/x.npy"), a URL ("s3://bucket/x.npy") or a chain ("simplecache::s3://bucket/x.npy").
"""

from __future__ import annotations

import re
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


def redact(text: str) -> str:
    """The URI, or any text with URIs in it, without user names, passwords, tokens and query strings."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _stripped(text)


def _stripped(uri: str) -> str:
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


def join(uri: str, *parts: str) -> str:
    """The URI of something inside a folder."""
    for part in parts:
        uri = uri + part.lstrip("/") if not uri or uri.endswith("/") else f"{uri}/{part.lstrip('/')}"
    return uri


def file_name(uri: str) -> str:
    """Last part of the path, without folder, credentials and query string."""
    links = _stripped(uri).split("::")
    return links[_path_link(links)].rstrip("/").rsplit("/", 1)[-1]


def is_local(uri: str) -> bool:
    """Whether it is a path of this machine."""
    return "::" not in uri and ("://" not in uri or uri.startswith(("file://", "local://")))


def path_span(uri: str) -> tuple[int, int]:
    """Start and end of the link that holds the path."""
    links = uri.split("::")
    position = _path_link(links)
    start = sum(len(link) + 2 for link in links[:position])
    return start, start + len(links[position])


def wildcard(uri: str) -> int | None:
    """Position of the first wildcard in the path, if it has one."""
    start, end = path_span(uri)
    # In an http URL a "?" starts the query.
    pattern = re.compile(r"[*[]" if uri.startswith("http", start) else r"[*?[]")
    match = pattern.search(uri, start, end)
    return match.start() if match else None


def _path_link(links: list[str]) -> int:
    """Which link of a chain holds the path: the first with "://", else the last (caches come before it)."""
    return next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
