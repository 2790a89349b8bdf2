"""The job file's fields as a Markdown table, from the same descriptions as the JSON Schema."""

import json
from collections.abc import Mapping
from typing import Any

from distributed_adaround.formats import FORMATS
from distributed_adaround.spec.job import json_schema

_WORDS = {"string": "text", "integer": "whole number", "boolean": "true, false", "object": "mapping"}


def markdown() -> str:
    """One table per section: field, values, default, meaning."""
    schema = json_schema()
    sections = {name: entry for name, entry in schema["properties"].items() if "$ref" in entry}
    own = {name: entry for name, entry in schema["properties"].items() if "$ref" not in entry}
    parts = [_section("top level", schema | {"properties": own}, schema)]
    for name in ("model", "data", "quantize", "rounding", "output", "runtime"):
        parts.append(_section(f"`{name}`", _definition(schema, sections[name]), schema))
    parts.append(_section("`evaluate`", schema["$defs"]["EvaluateSpec"], schema))
    for name in ("text", "images", "audio"):
        parts.append(_section(f"`data.{name}`", schema["$defs"][f"{name.capitalize()}Spec"], schema))
    parts.append(_section("each of `quantize.overrides`", schema["$defs"]["Override"], schema))
    return "\n\n".join([*parts, _number_formats()]) + "\n"


def _number_formats() -> str:
    header = "| dtype | bits | values | a code in `quantized.safetensors` | scales |"
    lines = ["**number formats**", "", header, "|---|---|---|---|---|"]
    for name, number in FORMATS.items():
        element = number.element
        values = "{} to {}".format(*number.code_range)
        if element is not None:
            values = f"{len(element.values)} of {element.name}, to {element.values[-1]:g}"
        block = f"{number.scale}, one for {number.block_size} inputs" if number.block_size else "`scale_dtype`"
        lines.append(f"| `{name}` | {number.bits} | {values} | {number.storage} | {block} |")
    return "\n".join(lines)


def _section(title: str, section: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    lines = [f"**{title}**", "", "| field | values | default | meaning |", "|---|---|---|---|"]
    for name, entry in section["properties"].items():
        default = "`{}`".format(json.dumps(entry.get("default")).replace('"', ""))
        if name in section.get("required", []):
            default = "required"
        meaning = entry.get("description", "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_values(entry, schema)} | {default} | {meaning} |")
    return "\n".join(lines)


def _definition(schema: Mapping[str, Any], entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    return found


def _values(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in entry:
        return _values(_definition(schema, entry), schema)
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "anyOf" in entry:
        kinds = [_values(option, schema) for option in entry["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = str(entry.get("type", "any"))
    if kind == "array":
        return f"list of {_values(entry.get('items') or entry['prefixItems'][0], schema)}"
    return _WORDS.get(kind, kind)
