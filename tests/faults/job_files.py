"""Job files as hypothesis strategies: valid by the schema, then spoiled, as values and as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml
from hypothesis import strategies as st

from distributed_adaround.spec.job import json_schema

Document = dict[str, Any]

_WORDS = ["images/*.npz", "Linear", "re:.*head", "my_models:net", "weights.pt", "net.pt2", "4GiB", "auto", "x" * 90]
# What people and machines write into fields by mistake or on purpose.
_ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.0, 1.0, -0.5, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), "", " ", "\0", "\n", "null", "true", "1e3", "0x10", "1_000", "é" * 50,
    "\ud800", "\u202e", "s3://key:secret@bucket/x", "re:(", "re:" + "(a+)+" * 9, "../../etc/passwd", "x" * 100_000,
    [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}, [1, "a", None, True, {}],
]  # fmt: skip
_ODD_TEXTS = [
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['true']\n", "!!binary aGk=\n", "- ", ": ", "? ", "\t",
    "[" * 1200, "{" * 1200, "{a: " * 500, "\n---\n", "...\n", "%YAML 1.1\n", "|", ">", "'", '"', "#", ",", "]", "}",
    "\ufeff", "\u2028", "\x00", "\x1b[2J", "model:\n", "data: {}\n", "1e999", "9" * 5000, "0" * 5000, "\\ud800", "'''",
    "[model]\n", "[[data]]\n", "x" * 70_000, "[" + "1," * 2000, "- a\n" * 2000,
]  # fmt: skip


def values_of(node: Any, schema: Document) -> st.SearchStrategy[Any]:
    """Values that a node of the JSON Schema allows."""
    if "$ref" in node:
        return values_of(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node:
        return st.one_of([values_of(choice, schema) for choice in node["anyOf"]])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "const" in node:
        return st.just(node["const"])
    makers: dict[str, Callable[[Any, Document], st.SearchStrategy[Any]]] = {
        "object": _objects,
        "array": _arrays,
        "string": _texts,
        "integer": _integers,
        "number": _numbers,
        "boolean": lambda *_: st.booleans(),
        "null": lambda *_: st.none(),
    }
    return makers[node["type"]](node, schema) if "type" in node else _plain()


def _plain() -> st.SearchStrategy[Any]:
    """Any JSON value."""
    leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(_WORDS)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | _named(inner), max_leaves=4)


def _named(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(["a", "width", "input_ids"]), inner, max_size=2)


def _objects(node: Any, schema: Document) -> st.SearchStrategy[Any]:
    if "properties" not in node:
        return _named(values_of(node.get("additionalProperties") or {}, schema))
    fields = {name: values_of(entry, schema) for name, entry in node["properties"].items()}
    required = node.get("required", [])
    return st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )


def _arrays(node: Any, schema: Document) -> st.SearchStrategy[Any]:
    if "prefixItems" in node:
        return st.tuples(*(values_of(item, schema) for item in node["prefixItems"])).map(list)
    return st.lists(
        values_of(node.get("items", {}), schema), min_size=node.get("minItems", 0), max_size=node.get("maxItems", 3)
    )


def _texts(node: Any, _: Document) -> st.SearchStrategy[Any]:
    if "pattern" in node:
        return st.from_regex(re.compile(node["pattern"], re.ASCII), fullmatch=True).map(str.strip)
    return st.sampled_from(_WORDS) | st.text(min_size=max(1, node.get("minLength", 0)), max_size=8)


def _integers(node: Any, _: Document) -> st.SearchStrategy[Any]:
    low = node.get("minimum", node.get("exclusiveMinimum", -1001) + 1)
    high = node.get("maximum", node.get("exclusiveMaximum", 1001) - 1)
    return st.integers(low, min(high, low + 1000)) | st.integers(low, high)


def _numbers(node: Any, schema: Document) -> st.SearchStrategy[Any]:
    low, high = (node.get(name, node.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
    floats = st.floats(
        low,
        high,
        exclude_min="exclusiveMinimum" in node,
        exclude_max="exclusiveMaximum" in node,
        allow_nan=False,
        allow_infinity=False,
    )
    return floats | st.integers(1, 1) if low is None or low < 1 <= (high or 1) else floats


@cache
def _valid_jobs() -> st.SearchStrategy[Document]:
    """Built once: it has hundreds of parts."""
    schema = json_schema()
    return values_of(schema, schema)


@st.composite
def likely_jobs(draw: st.DrawFn) -> Document:
    """Valid by the schema, and mostly valid by the rules between fields too."""
    job: Document = draw(_valid_jobs())
    if draw(st.integers(0, 3)):
        job["model"] = draw(st.sampled_from(_MODELS))
        for section in ("quantize", "rounding"):
            keep = draw(st.sets(st.sampled_from(sorted(job.get(section, {})) or [""]), max_size=2))
            job[section] = {name: value for name, value in job.get(section, {}).items() if name in keep}
    return job


_MODELS: list[Document] = [
    {"factory": "a:b"},
    {"factory": "a:b", "weights": "w.pt", "factory_args": {"n": 1}},
    {"program": "p.pt2", "sha256": "0" * 64},
]


@st.composite
def spoiled_jobs(draw: st.DrawFn) -> Any:
    """A job with one to four entries changed, added, dropped or moved."""
    job: Any = json.loads(json.dumps(draw(likely_jobs())))
    for _ in range(draw(st.integers(1, 4))):
        job = _spoil(draw, job)
    return job


def _spoil(draw: st.DrawFn, node: Any) -> Any:
    deeper = isinstance(node, dict | list) and node and draw(st.integers(0, 3))
    if not deeper:
        return _instead_of(draw, node)
    key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    changed: Any = dict(node) if isinstance(node, dict) else list(node)
    action = draw(st.sampled_from(["spoil", "spoil", "spoil", "drop", "rename", "move"]))
    if action == "spoil" or isinstance(node, list):
        changed[key] = _spoil(draw, changed[key])
        return changed
    value = changed.pop(key)
    if action == "rename":
        changed[draw(st.sampled_from([key.upper(), key + "s", key[1:], "", "a.b", "__proto__"]))] = value
    elif action == "move" and isinstance(other := draw(st.sampled_from([*changed.values(), None])), dict):
        other[key] = value
    return changed


def _instead_of(draw: st.DrawFn, node: Any) -> Any:
    odd = draw(st.sampled_from([*_ODD_VALUES, "bool", "text", "list", "deep"]))
    if odd == "bool" and isinstance(node, int):
        return bool(node)
    if odd == "text":
        return str(node)
    if odd == "list":
        return [node]
    if odd == "deep":
        for _ in range(draw(st.sampled_from([20, 300]))):
            node = draw(st.sampled_from([{"a": node}, [node]]))
        return node
    return odd


_ANY_JOBS = likely_jobs() | spoiled_jobs()


@st.composite
def job_texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """(suffix, content) of a job file: a valid or spoiled job written down, and mostly spoiled again as text."""
    job = draw(_ANY_JOBS)
    suffix = draw(st.sampled_from([".yaml", ".yml", ".json", ".toml"]))
    text = written(job, suffix)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        length = draw(st.sampled_from([0, 0, 1, 5, 50]))
        piece = text[start : start + length] * draw(st.sampled_from([0, 1, 2]))
        text = text[:start] + draw(st.sampled_from([*_ODD_TEXTS, ""])) + piece + text[start + length :]
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
    return suffix, content


def written(job: Any, suffix: str) -> str:
    """The job as text of that type; what the type cannot hold comes out as something odd."""
    if suffix == ".toml":
        return _toml(job)
    if suffix == ".json":
        return json.dumps(job)
    try:
        return str(yaml.safe_dump(job, allow_unicode=True))
    except (yaml.YAMLError, RecursionError):
        return json.dumps(job)


def _toml(job: Any) -> str:
    if not isinstance(job, dict):
        return f"a = {_toml_value(job)}\n"
    plain = "".join(f"{_key(k)} = {_toml_value(v)}\n" for k, v in job.items() if not isinstance(v, dict))
    sections = ((k, v) for k, v in job.items() if isinstance(v, dict))
    return plain + "".join(
        f"[{_key(k)}]\n" + "".join(f"{_key(a)} = {_toml_value(b)}\n" for a, b in v.items()) for k, v in sections
    )


def _key(name: Any) -> str:
    return json.dumps(str(name))


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return "nan" if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def overrides() -> st.SearchStrategy[list[str]]:
    """Arguments of `--set`."""
    paths = st.sampled_from(
        ["rounding.max_iter", "quantize.ignore.0", "quantize.overrides.0.match", "data", "data.uri.3", "", "a", "a.b.c"]
    ) | st.text(max_size=6)
    texts = st.sampled_from([*_ODD_TEXTS, "1", "null", "[1, 2]", "{a: b}", "*.npz"]) | st.text(max_size=6)
    return st.lists(st.tuples(paths, st.sampled_from(["=", "=", ""]), texts).map("".join), max_size=2)
