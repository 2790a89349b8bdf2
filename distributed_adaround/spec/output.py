"""The section `output` of a job: where the results go, and as what."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.explain import ContradictionError, Section
from distributed_adaround.spec.fields import NameIn, Text

# What a result is written as (the contract is export.result.Exporter).
EXPORTERS: dict[str, str] = {
    "safetensors": "distributed_adaround.export.codes:CodesExporter",
    "dequantized": "distributed_adaround.export.dequantized:DequantizedExporter",
}


class OutputSpec(Section):
    """Where the results go, and as what."""

    uri: Text = Field(
        description="Folder for the results, a path or URI; commits of finished layers and reports go there too.",
        examples=["s3://out/resnet50-w4"],
    )
    formats: list[Annotated[str, NameIn(EXPORTERS)]] = Field(
        ["safetensors", "dequantized"],
        min_length=1,
        description="safetensors: codes, scales and zero points; dequantized: float weights on the grid "
        "under the model's own parameter names.",
    )
    overwrite: bool = Field(False, description="Replace finished results that are already in the folder.")

    @model_validator(mode="after")
    def _formats_once(self) -> Self:
        if len(set(self.formats)) < len(self.formats):
            raise ContradictionError(("formats",), self.formats, "names a format twice; remove the second one")
        return self
