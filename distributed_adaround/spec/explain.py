"""The base class of all sections of the job file, and how their faults become one-line `SpecError`s.

pydantic finds the fault; the text is ours: `rounding.max_iter: -5 must be greater than 0; use 10000, the default`.
That is the path of the field, the value (shortened, without credentials), the rule, the remedy. One line per fault.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.fields import FieldInfo

from distributed_adaround import errors
from distributed_adaround.errors import SpecError, redact

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_MAX_SHOWN = 80  # characters of a value
_MAX_LINES = 20
_MAX_ITEMS_SHOWN = 8

ABSENT = object()  # for a message without a value

# pydantic's error type -> our rule; {names} come from pydantic's context.
_RULES = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
    "model_type": "must be a section, that is a mapping of fields",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} or fewer entries",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "does not have the form of this field",
}


class ContradictionError(ValueError):
    """A rule between several fields is broken. Raised in validators of a section, turned into text by `explain`.

    loc: path of the field to blame, seen from the section that raises. text: rule and remedy.
    """

    def __init__(self, loc: Sequence[str | int], value: object, text: str) -> None:
        super().__init__(text)
        self.loc = tuple(loc)
        self.value = value
        self.text = text

    def line(self, prefix: Sequence[str | int] = ()) -> str:
        return _line(Section.place((*prefix, *self.loc)), self.value, self.text)


class _ExplainingMeta(ModelMetaclass):
    """`RoundingSpec(max_iter=-5)` in Python raises the same SpecError as the job file does."""

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - a metaclass
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise explain(error, cast(type[Section], cls)) from None


class Section(BaseModel, metaclass=_ExplainingMeta):
    """Base of all parts of the job: no unknown fields, no conversions ("5" is not 5, true is not 1), no nan or inf.

    Raises SpecError when called with bad values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def place(cls, loc: Sequence[str | int]) -> str:
        """How messages name the field at the end of a path."""
        return shorten(redact(".".join(str(part) for part in loc if not str(part).startswith("[")))) or "job"


def one_rule(rule: str) -> WrapValidator:
    """One message for a union such as `str | list[str]`, where pydantic has one per branch."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(rule) from None

    return WrapValidator(check)


def shown(value: object) -> str:
    """A value for a message: at most 80 characters, one line, no credentials, cheap for any input."""
    if value is None or isinstance(value, bool):
        text = str(value).lower().replace("none", "null")
    elif isinstance(value, str):
        text = repr(redact(value))
    elif isinstance(value, int):
        text = str(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
    elif isinstance(value, float):
        text = repr(value)
    elif isinstance(value, (list, tuple)):
        flat = not any(isinstance(item, (list, tuple, dict)) for item in value)
        text = "[" + ", ".join(map(shown, value)) + "]" if flat and len(value) <= _MAX_ITEMS_SHOWN else ""
        text = text or f"a list of {len(value)}"
    elif isinstance(value, dict):
        text = f"a mapping of {len(value)}"
    else:
        text = f"a value of type {type(value).__name__}"
    return shorten(text)


def shorten(text: str) -> str:
    """At most 80 printable characters: the middle is left out."""
    return errors.shorten(text, _MAX_SHOWN)


def explain(error: ValidationError, cls: type[Section]) -> SpecError:
    """pydantic's findings about a section in the words of this program, one line each."""
    found = [_explain_one(entry, cls) for entry in error.errors(include_url=False)]
    if len(found) > _MAX_LINES:
        found[_MAX_LINES:] = [f"... and {len(found) - _MAX_LINES} more"]
    return SpecError("\n".join(found))


def _explain_one(entry: Mapping[str, Any], cls: type[Section]) -> str:
    loc, value, context = entry["loc"], entry["input"], entry.get("ctx", {})
    if entry["type"] == "value_error":
        cause = context["error"]
        if not isinstance(cause, ContradictionError):
            return _line(cls.place(loc), value, str(cause))
        return _line(cls.place((*loc, *cause.loc)), cause.value, cause.text)
    if entry["type"] == "extra_forbidden":
        return _line(cls.place(loc), ABSENT, _unknown_field(loc, cls))
    rule = _RULES.get(entry["type"], "")
    rule = rule.format_map(context) if rule else shorten(entry["msg"])
    remedy = _remedy(entry["type"], value, _field(loc, cls), str(context.get("expected", "")))
    return _line(cls.place(loc), ABSENT if entry["type"] == "missing" else value, f"{rule}; {remedy}")


def _line(place: str, value: object, text: str) -> str:
    return f"{place}: {text if value is ABSENT else f'{shown(value)} {text}'}"


def _remedy(kind: str, value: object, field: FieldInfo | None, expected: str) -> str:
    if field is None:
        return "correct or remove this entry"
    if kind == "literal_error" and isinstance(value, str):
        names = re.findall(r"'([^']*)'", expected)
        if near := difflib.get_close_matches(value[:_MAX_SHOWN], names, n=1):
            return f"did you mean {near[0]!r}?"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "write a number, without quotes"
    if kind == "model_type":
        return "write its fields below it, or remove it"
    if field.examples:
        return f"{'give it' if kind == 'missing' else 'use'}, for instance, {field.examples[0]}"
    if field.is_required():
        return "give it"
    if isinstance(field.default, (str, int, float)):
        return f"use {shown(field.default).strip(chr(39))}, the default"
    if isinstance(field.default, tuple):
        return f"use {shown(field.default)}, the default"
    return "correct it, or leave it out"


def _unknown_field(loc: Sequence[str | int], cls: type) -> str:
    name, owner = str(loc[-1]), _section(loc[:-1], cls)
    names = list(owner.model_fields) if owner else []
    if near := difflib.get_close_matches(name[:_MAX_SHOWN], names, n=1):
        return f"there is no such field; did you mean {near[0]}?"
    top = _model_in(cls)
    for section, field in top.model_fields.items() if top else ():
        other = _model_in(field.annotation)
        if other is not None and other is not owner and name in other.model_fields:
            return f"there is no such field here; it belongs to the section {section}"
    return f"there is no such field; choose from {', '.join(names)}"


def _section(loc: Sequence[str | int], cls: type) -> type[BaseModel] | None:
    """The section that a path leads to, starting at cls."""
    section = _model_in(cls)
    for part in loc:
        if isinstance(part, str) and section is not None:
            field = section.model_fields.get(part)
            section = _model_in(field.annotation) if field else None
    return section


def _field(loc: Sequence[str | int], cls: type) -> FieldInfo | None:
    """Description of the field that a path leads to, or of the list or mapping that holds its end."""
    for end in range(len(loc), 0, -1):
        section = _section(loc[: end - 1], cls)
        if section is not None and isinstance(loc[end - 1], str) and loc[end - 1] in section.model_fields:
            return section.model_fields[str(loc[end - 1])]
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)
