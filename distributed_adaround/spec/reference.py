"""The job file's fields as a Markdown table, from the same descriptions as the JSON Schema."""

from typing import Any

from distributed_adaround.formats import FORMATS
from distributed_adaround.spec.job import json_schema


def markdown() -> str:
    """One table per section: field, values, default, meaning."""
    schema = json_schema()
    parts = [_section("top level", schema, schema, skip_sections=True)]
    for name in ("model", "data", "quantize", "rounding", "output", "runtime"):
        parts.append(_section(f"`{name}`", _definition(schema, schema["properties"][name]), schema))
    parts.append(_section("each of `quantize.overrides`", schema["$defs"]["Override"], schema))
    parts.append(_number_formats())
    return "\n\n".join(parts) + "\n"


def _number_formats() -> str:
    header = "| dtype | bits | values | a code in `quantized.safetensors` | scales |"
    lines = ["**number formats**", "", header, "|---|---|---|---|---|"]
    for name, number in FORMATS.items():
        low, high = number.code_range
        element = number.element
        values = f"{low} to {high}"
        if element is not None:
            values = f"{len(element.values)} of {element.name}, to {element.values[-1]:g}"
        block = f"{number.scale}, one for {number.block_size} inputs" if number.block_size else "`scale_dtype`"
        lines.append(f"| `{name}` | {number.bits} | {values} | {number.storage} | {block} |")
    return "\n".join(lines)


def _definition(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    reference = entry.get("$ref")
    resolved: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]] if reference else entry
    return resolved


def _section(title: str, section: dict[str, Any], schema: dict[str, Any], skip_sections: bool = False) -> str:
    lines = [f"**{title}**", "", "| field | values | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for name, entry in section["properties"].items():
        if skip_sections and "$ref" in entry:
            continue
        default = "required" if name in required else f"`{_plain(entry.get('default'))}`"
        meaning = entry.get("description", "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_values(entry, schema)} | {default} | {meaning} |")
    return "\n".join(lines)


def _plain(default: object) -> str:
    """A default as YAML writes it."""
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default).replace("'", "")


def _values(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in entry:
        return _values(_definition(schema, entry), schema)
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "anyOf" in entry:
        kinds = [_values(option, schema) for option in entry["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = str(entry.get("type", "any"))
    words = {"string": "text", "integer": "whole number", "boolean": "true, false", "object": "mapping"}
    if kind == "array":
        items = entry.get("items") or entry.get("prefixItems", [{}])[0]
        return f"list of {_values(items, schema)}"
    return words.get(kind, kind)
