"""A job file's bytes (YAML, JSON, TOML) as a plain mapping, with `--set a.b=c` applied. Knows nothing of the fields.

YAML is read as version 1.2 means it: `1e-3` is a number, `no` and `2024-01-01` are text. Aliases are not taken, so a
small file cannot grow into a large one. Every fault is a SpecError that names the place.
"""

import functools
import json
import tomllib
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.resolver import VersionedResolver

from distributed_adaround.errors import SpecError, redact
from distributed_adaround.spec.explain import shorten, shown

MAX_BYTES = 1 << 18  # far more than any job needs; ruamel.yaml reads it in a few seconds
# The types that JSON has too; others, such as dates and sets, are refused.
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
_MAX_PATH_PARTS = 16
_MAX_INDEX_DIGITS = 4


def parse_job(path: str, data: bytes, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a job file as a mapping, with `section.field=value` overrides applied in order.

    path: its suffix says what the data are. Raises SpecError for more than 256 KiB, and for what cannot be read.
    """
    parsed = _parse(_named(path), path.lower().rpartition(".")[2], data)
    if not isinstance(parsed, dict):
        rule = f"must be a mapping of sections, not {shown(parsed)}; begin with 'model:' and 'data:'"
        raise SpecError(f"{_named(path)}: {rule}")
    return functools.reduce(_apply, overrides, parsed)


def check_suffix(path: str) -> None:
    """Raises SpecError when the name is not that of a job file."""
    if not path.lower().endswith((".yaml", ".yml", ".json", ".toml")):
        raise SpecError(f"{_named(path)}: a job file must end in .yaml, .yml, .json or .toml; rename it")


def _named(path: str) -> str:
    return shorten(redact(path))


def _parse(name: str, suffix: str, data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise SpecError(f"{name}: {len(data)} bytes are more than 256 KiB; this is not a job file")
    try:
        text = data.decode("utf-8-sig")
        if suffix == "json":
            return json.loads(text, object_pairs_hook=_unique)
        return tomllib.loads(text) if suffix == "toml" else _parse_yaml(text)
    except UnicodeDecodeError as error:
        raise SpecError(f"{name}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from error
    except RecursionError:
        raise SpecError(f"{name}: nested too deeply; write fewer brackets") from None
    except (YAMLError, ValueError) as error:
        kind = suffix.upper() if suffix in ("json", "toml") else "YAML"
        # Not from the error, which quotes the file.
        raise SpecError(f"{name}: not valid {kind}: {_where(error)}; correct it there") from None


def _where(error: Exception) -> str:
    """Place and problem, without the text around it, which could hold credentials."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {shorten(error.problem or 'unreadable')}"
    return shorten(str(error).partition("\n")[0])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} appears twice")
        result[key] = value
    return result


class _Resolver(VersionedResolver):
    """Plain text is null, true, a number or text, by YAML 1.2 also where a file asks for 1.1. Dates stay text."""

    processing_version = (1, 2)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return tag if str(tag) in _TAGS else self.DEFAULT_SCALAR_TAG


class _Composer(Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            raise MarkedYAMLError(
                problem="aliases (*name) are not accepted, write the value out, or quote a text that starts with *",
                problem_mark=self.parser.peek_event().start_mark,
            )
        self.anchors.clear()  # no alias asks for them, and the warning of a second one quotes the file
        return super().compose_node(parent, index)


class _Constructor(SafeConstructor):
    yaml_constructors = {  # noqa: RUF012 - ruamel.yaml's name and type
        tag: make for tag, make in SafeConstructor.yaml_constructors.items() if tag is None or tag in _TAGS
    }

    def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
        problem = "must be text" if not isinstance(key, str) else "appears twice" if key in mapping else ""
        if problem:
            raise MarkedYAMLError(problem=f"the key {shown(key)} {problem}", problem_mark=key_node.start_mark)
        return True


def _parse_yaml(text: str) -> Any:
    loader = YAML(typ="safe", pure=True)
    loader.Resolver, loader.Composer, loader.Constructor = _Resolver, _Composer, _Constructor
    return loader.load(text)


def _apply(job: dict[str, Any], assignment: str) -> dict[str, Any]:
    path, equals, text = assignment.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or len(parts) > _MAX_PATH_PARTS:
        rule = "must have the form section.field=value; for instance rounding.max_iter=2000"
        raise SpecError(f"--set {shown(assignment)}: {rule}")
    try:
        # An unquoted "*.npz" would be an alias, which a value on the command line cannot be.
        value = text if text.startswith("*") else _parse_yaml(text)
    except RecursionError:
        raise SpecError(f"--set {shorten(path)}: nested too deeply; write fewer brackets") from None
    except (YAMLError, ValueError) as error:
        rule = f"{shown(text)} is not a YAML value: {_where(error)}; quote it"
        raise SpecError(f"--set {shorten(path)}: {rule}") from None
    result: dict[str, Any] = _assigned(job, parts, value, path)
    return result


def _assigned(node: Any, parts: list[str], value: Any, path: str) -> Any:
    """A copy of node with the value at the end of the path. Missing sections are made, a list may grow by one.

    Args:
        node: A part of the job; None where there is none yet.
        parts: What is left of the path, from this node on.
        value: The new value.
        path: The whole path, for messages.
    """
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if node is None:
        node = [] if head.isdecimal() else {}
    if isinstance(node, dict):
        return node | {head: _assigned(node.get(head), rest, value, path)}
    if not isinstance(node, list):
        raise SpecError(f"--set {shorten(path)}: {shorten(head)} lies inside {shown(node)}, not a section; correct it")
    if not head.isdecimal() or len(head) > _MAX_INDEX_DIGITS or int(head) > len(node):
        rule = f"is not a place in a list of {len(node)}; use 0 to {len(node)}"
        raise SpecError(f"--set {shorten(path)}: {shorten(head)} {rule}")
    index = int(head)
    return [*node[:index], _assigned(dict(enumerate(node)).get(index), rest, value, path), *node[index + 1 :]]
