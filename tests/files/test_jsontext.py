import json
import math
from pathlib import Path

import pytest

from distributed_adaround.errors import InputError
from distributed_adaround.files.jsontext import dumps, json_safe, parse_object, read_object


def test_the_same_value_gives_the_same_text_whatever_the_order_of_keys() -> None:
    assert dumps({"b": (1, 2.5), "a": None}) == dumps({"a": None, "b": [1, 2.5]}) == '{"a":null,"b":[1,2.5]}'


def test_figures_that_json_cannot_hold_become_null() -> None:
    text = dumps({"deep": [{"x": math.inf}, -math.inf, math.nan, 1e-300]})
    assert json.loads(text, parse_constant=pytest.fail) == {"deep": [{"x": None}, None, None, 1e-300]}


@pytest.mark.parametrize("value", [Path("x"), {1: 2}, {"a": {3}}, b"x"])
def test_what_json_has_no_word_for_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        json_safe(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the model: a.json cannot be read: FileNotFoundError: "),
        (b"{", "the model: a.json cannot be read: JSONDecodeError: "),
        (b'{"a": "\xff"}', "the model: a.json cannot be read: UnicodeDecodeError: "),
        (b"[" * 100_000, "the model: a.json cannot be read: RecursionError: "),
        (b"[1]", "the model: a.json holds no object; get it again"),
    ],
)
def test_a_file_of_others_that_holds_no_object_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_object(path, "the model")
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("; get it again")
    assert "\n" not in str(error.value)


def test_an_object_is_read_with_what_this_program_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"b": [1, null], "a": "\u00e9"}', encoding="utf-8")
    assert read_object(path, "x") == parse_object(path.read_bytes(), "x") == {"b": [1, None], "a": "é"}
