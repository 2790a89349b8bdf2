"""JSON as this program writes it: the same value always gives the same text, and the text is always valid JSON.

Python's own writer puts `NaN` and `Infinity` into files, which other readers refuse; here they become null.
"""

import json
import math
from collections.abc import Mapping


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
