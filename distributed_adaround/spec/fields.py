"""Types of fields that several sections share."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from distributed_adaround.spec.explain import one_rule

_NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"

PositiveInt = Annotated[int, Field(gt=0, le=2**63 - 1)]
Text = Annotated[str, Field(min_length=1)]
TextOrTexts = Annotated[
    Text | Annotated[list[Text], Field(min_length=1)],
    one_rule("must be a text or a list of texts, none of them empty; correct or remove it"),
]
ImportPath = Annotated[str, Field(pattern=rf"^{_NAME}:{_NAME}$")]
Arguments = Annotated[
    dict[str, JsonValue],
    one_rule("must map names to text, finite numbers, true, false, null, or lists and mappings of these; correct it"),
]


@dataclass(frozen=True, eq=False)
class NameIn:
    """Marks a text that must be one of some names, or a key of a table, also of one that grows as the program runs."""

    table: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # One error whatever is wrong, as for a Literal.
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, name: object) -> str:
        if isinstance(name, str) and name in self.table:
            return name
        *most, last = map(repr, self.table)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": [*self.table]}
