"""URIs as text: a path ("data/x.npy"), a URL ("s3://bucket/x.npy") or a chain ("simplecache::s3://bucket/x.npy")."""

import re

from distributed_adaround.errors import without_credentials


def join(uri: str, *parts: str) -> str:
    for part in parts:
        uri = uri + part.lstrip("/") if not uri or uri.endswith("/") else f"{uri}/{part.lstrip('/')}"
    return uri


def file_name(uri: str) -> str:
    """Last part of the path, without folder, credentials and query string."""
    bare = without_credentials(uri)
    start, end = path_span(bare)
    return bare[start:end].rstrip("/").rsplit("/", 1)[-1]


def is_local(uri: str) -> bool:
    return "::" not in uri and ("://" not in uri or uri.startswith(("file://", "local://")))


def path_span(uri: str) -> tuple[int, int]:
    """Start and end of the link with the path: the first of a chain with "://", else the last (after the caches)."""
    links = uri.split("::")
    position = next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
    start = sum(len(link) + 2 for link in links[:position])
    return start, start + len(links[position])


def wildcard(uri: str) -> int | None:
    """Position of the first wildcard in the path, if it has one."""
    start, end = path_span(uri)
    # In an http URL a "?" starts the query.
    pattern = re.compile(r"[*[]" if uri.startswith("http", start) else r"[*?[]")
    match = pattern.search(uri, start, end)
    return match.start() if match else None
