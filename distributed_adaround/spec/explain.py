"""The base class of all sections of the job file, and how their faults become one-line `SpecError`s.

pydantic finds the fault; the text is ours: `rounding.max_iter: -5 must be greater than 0; use 10000, the default`.
That is the path of the field, the value (shortened, without credentials), the rule, the remedy. One line per fault.
"""

import difflib
import functools
import inspect
import json
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

shorten = functools.partial(errors.shorten, length=_MAX_SHOWN)

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
    """A rule between fields is broken. loc: of the field to blame, in the section that raises. text: rule, remedy."""

    def __init__(self, loc: Sequence[str | int], value: object, text: str) -> None:
        super().__init__(text)
        self.loc, self.value, self.text = tuple(loc), value, text


class _ExplainingMeta(ModelMetaclass):
    """`RoundingSpec(max_iter=-5)` in Python raises the same SpecError as the job file does."""

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - a metaclass
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise explain(error, cast(type[Section], cls)) from None


def _unwrap(schema: dict[str, Any]) -> None:
    """Descriptions of fields on one line each."""
    for field in schema["properties"].values():
        if "description" in field:
            field["description"] = " ".join(field["description"].split())


class Section(BaseModel, metaclass=_ExplainingMeta):
    """Base of all parts of the job: no unknown fields, no conversions ("5" is not 5, true is not 1), no nan or inf.
    Raises SpecError when called with bad values."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_unwrap,
    )

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
        text = json.dumps(value)
    elif isinstance(value, str):
        text = repr(redact(value))
    elif isinstance(value, int):
        text = str(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
    elif isinstance(value, float):
        text = repr(value)
    elif isinstance(value, (list, tuple)):
        nested = any(isinstance(item, (list, tuple, dict)) for item in value)
        whole = len(value) <= _MAX_ITEMS_SHOWN and not nested
        text = f"[{', '.join(map(shown, value))}]" if whole else f"a list of {len(value)}"
    elif isinstance(value, dict):
        text = f"a mapping of {len(value)}"
    else:
        text = f"a value of type {type(value).__name__}"
    return shorten(text)


def explain(error: ValidationError, cls: type[Section]) -> SpecError:
    """pydantic's findings about a section in the words of this program, one line each."""
    found = [_explain_one(entry, cls) for entry in error.errors(include_url=False)]
    if len(found) > _MAX_LINES:
        found[_MAX_LINES:] = [f"... and {len(found) - _MAX_LINES} more"]
    return SpecError("\n".join(found))


def _explain_one(entry: Mapping[str, Any], cls: type[Section]) -> str:
    kind, loc, value, context = entry["type"], entry["loc"], entry["input"], entry.get("ctx", {})
    if kind == "value_error":
        cause = context["error"]
        if isinstance(cause, ContradictionError):
            return line(cls.place((*loc, *cause.loc)), cause.value, cause.text)
        return line(cls.place(loc), value, str(cause))
    if kind == "extra_forbidden":
        return line(cls.place(loc), ABSENT, _unknown_field(loc, cls))
    rule = _RULES[kind].format_map(context) if kind in _RULES else shorten(entry["msg"])
    remedy = _remedy(kind, value, _at(loc, cls)[1], str(context.get("expected", "")))
    return line(cls.place(loc), ABSENT if kind == "missing" else value, f"{rule}; {remedy}")


def line(place: str, value: object, text: str) -> str:
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
    if isinstance(field.default, (str, int, float, tuple)):
        return f"use {shown(field.default).strip(chr(39))}, the default"
    return "correct it, or leave it out"


def _unknown_field(loc: Sequence[str | int], cls: type[Section]) -> str:
    name, owner = str(loc[-1]), _at(loc[:-1], cls)[0]
    names = list(owner.model_fields) if owner else []
    if near := difflib.get_close_matches(name[:_MAX_SHOWN], names, n=1):
        return f"there is no such field; did you mean {near[0]}?"
    for section, field in cls.model_fields.items():
        other = _model_in(field.annotation)
        if other is not None and other is not owner and name in other.model_fields:
            return f"there is no such field here; it belongs to the section {section}"
    return f"there is no such field; choose from {', '.join(names)}"


def _at(loc: Sequence[str | int], cls: type[BaseModel]) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The section that a path leads to, if any, and the last field on the way."""
    section: type[BaseModel] | None = cls
    last = None
    for name in (part for part in loc if isinstance(part, str)):
        field = section.model_fields.get(name) if section else None
        section, last = _model_in(field.annotation) if field else None, field or last
    return section, last


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)
