"""Types of fields that several sections share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

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
