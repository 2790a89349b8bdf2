"""What happened, as JSON lines: `<output>/events/rank-<r>.jsonl`, one file per rank.

Object stores cannot append, so the lines are kept in memory and `flush` writes the whole file again, atomically. A job
that starts again reads its file first and adds to it.
"""

import json
from datetime import UTC, datetime

from distributed_adaround.errors import redact
from distributed_adaround.files import jsontext, storage, uris


class EventLog:
    """The events of one rank. Every line has time (UTC), rank and event, then the fields given."""

    def __init__(self, uri_folder: str | None, rank: int) -> None:
        """uri_folder: the job's output, or None to keep nothing. Raises InputError when an old file is unreadable."""
        self._uri = None if uri_folder is None else uris.join(uri_folder, "events", f"rank-{rank}.jsonl")
        self._rank = rank
        self._data = b""
        if self._uri is not None and storage.exists(self._uri):
            self._data = storage.read_bytes(self._uri)
            if self._data and not self._data.endswith(b"\n"):
                self._data += b"\n"
        self._num_flushed = len(self._data)

    def write(self, event: str, **fields: object) -> None:
        """Add one line: `fields` are JSON values; inf and NaN become null, URIs lose their credentials."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = jsontext.json_safe({"time": time, "rank": self._rank, "event": event, **fields})
        if self._uri is not None:
            self._data += json.dumps(_redacted(line), allow_nan=False).encode() + b"\n"

    def flush(self) -> None:
        """Make the lines so far permanent. Raises OutputError."""
        if self._uri is not None and len(self._data) > self._num_flushed:
            storage.write_bytes(self._uri, self._data)
            self._num_flushed = len(self._data)


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return value
