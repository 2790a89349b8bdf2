"""What must hold for every job file, however odd: the exit code, the message, and what the JSON Schema says of it."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators
from pydantic import ValidationError

from distributed_adaround import cli
from distributed_adaround.errors import SpecError
from distributed_adaround.spec.job import JobSpec, json_schema

SCHEMA = json_schema()
# Of work, not by the clock, which says as much about the machine's other work: what the largest job file may take.
_MAX_SECONDS = 10.0
_MAX_MESSAGE = 20_000


def check_value(job: Any) -> None:
    """A job as a mapping: valid, or a SpecError; and the same verdict by the schema."""
    if not isinstance(job, dict):
        return
    agree(job)
    try:
        spec = JobSpec(**job)
    except SpecError as error:
        _check_message(str(error))
        return
    spec.result_digest()
    again = JobSpec(**spec.model_dump(exclude_unset=True))
    assert again == spec


def check_text(folder: Path) -> Callable[[tuple[tuple[str, bytes], list[str]]], None]:
    """A job file on disk with overrides, through the command line."""

    def check(case: tuple[tuple[str, bytes], list[str]]) -> None:
        (suffix, content), assignments = case
        path = folder / f"job{suffix}"
        path.write_bytes(content)
        arguments = ["validate", str(path), *(part for text in assignments for part in ("--set", text))]
        if any(text.startswith("-") for text in assignments):
            return  # argparse takes it for an option
        out, err = io.StringIO(), io.StringIO()
        started = time.process_time()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(arguments)
        assert time.process_time() - started < _MAX_SECONDS, "it took too long"
        assert code in (0, 64), err.getvalue()[-2000:]
        if code == 64:
            assert err.getvalue().startswith("error: ")
            _check_message(err.getvalue().removeprefix("error: ").rstrip("\n"))

    return check


def _check_message(text: str) -> None:
    assert "Traceback" not in text
    assert "internal error" not in text
    assert 0 < len(text) < _MAX_MESSAGE
    assert "secret" not in text, text
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)


def agree(job: Any) -> None:
    """JSON Schema and pydantic find the same jobs valid, but for rules that say what no schema can."""
    by_schema = _VALIDATOR.is_valid(job)
    try:
        JobSpec.model_validate(job)
    except ValidationError as error:
        # "value_error": a validator of this program, between fields or inside a text.
        rules = {entry["type"] for entry in error.errors(include_url=False)}
        assert not by_schema or rules == {"value_error"}, f"only the schema takes it: {rules}"
    except SpecError:
        pass  # raised by a part that a validator builds
    else:
        assert by_schema, next(iter(_VALIDATOR.iter_errors(job))).message[:500]


def _is_whole(_: object, value: object) -> bool:
    """1.0 is a whole number to the schema's authors, not to this program, which converts nothing."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_: object, value: object) -> bool:
    """JSON has no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Any:
    """In JSON Schema, as in pydantic, "$" is the very end, not the place before a last newline."""
    if isinstance(instance, str) and not re.search(pattern.replace("$", r"\Z"), instance):
        from jsonschema import ValidationError as Found

        yield Found(f"{instance[:100]!r} does not match {pattern!r}")


_CHECKER = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_whole, "number": _is_number})
_VALIDATOR = validators.extend(Draft202012Validator, {"pattern": _pattern}, type_checker=_CHECKER)(SCHEMA)
