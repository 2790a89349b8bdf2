import json
import math
from pathlib import Path

import pytest

from distributed_adaround.files.jsontext import dumps, json_safe


def test_the_same_value_gives_the_same_text_whatever_the_order_of_keys() -> None:
    assert dumps({"b": (1, 2.5), "a": None}) == dumps({"a": None, "b": [1, 2.5]}) == '{"a":null,"b":[1,2.5]}'


def test_figures_that_json_cannot_hold_become_null() -> None:
    text = dumps({"deep": [{"x": math.inf}, -math.inf, math.nan, 1e-300]})
    assert json.loads(text, parse_constant=pytest.fail) == {"deep": [{"x": None}, None, None, 1e-300]}


@pytest.mark.parametrize("value", [Path("x"), {1: 2}, {"a": {3}}, b"x"])
def test_what_json_has_no_word_for_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        json_safe(value)
