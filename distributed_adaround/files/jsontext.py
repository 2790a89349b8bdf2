"""JSON. What this program writes: the same value always gives the same text, and the text is always valid JSON. What
others wrote: read with errors of one line.

Python's own writer puts `NaN` and `Infinity` into files, which other readers refuse; here they become null.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed_adaround.errors import InputError, first_line


def json_safe(value: object) -> object:
    """The value with tuples as lists and non-finite floats as None. Raises TypeError for what JSON cannot hold."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is a key of type {type(key).__name__}; JSON takes strings only")
        return {key: json_safe(item) for key, item in value.items()}
    raise TypeError(f"{value!r} has type {type(value).__name__}, which JSON cannot hold; convert it first")


def dumps(value: object, *, indent: int | None = None) -> str:
    """Sorted keys, ASCII; compact, or over several lines when `indent` is given."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(json_safe(value), sort_keys=True, allow_nan=False, indent=indent, separators=separators)


def parse_object(data: bytes, shown: str) -> dict[str, Any]:
    """The JSON object that a file of others holds. shown: the file, in messages. Raises InputError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} cannot be read: {first_line(error)}; get it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{shown} holds no object; get it again")
    return found


def read_object(path: Path, shown: str) -> dict[str, Any]:
    """`parse_object` of a local file, of which `shown` is the directory. Raises InputError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{shown}: {path.name} cannot be read: {first_line(error)}; get it again") from None
    return parse_object(data, f"{shown}: {path.name}")
