"""The section `model` of a job: the trained network."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section, one_rule
from distributed_adaround.spec.fields import Arguments, ImportPath, NameIn, Text

# Where a model comes from: name, and the function that opens it (model.source says what it is).
SOURCES: dict[str, str] = {
    "factory": "distributed_adaround.model.source:open_factory",
    "program": "distributed_adaround.model.source:open_program",
}

Sha256 = Annotated[
    str, Field(pattern=r"^[0-9a-fA-F]{64}$"), one_rule("must be 64 hexadecimal digits; write what sha256sum prints")
]


class ModelSpec(Section):
    """The trained network: a factory with weights, or an exported program."""

    factory: ImportPath | None = Field(None, examples=["my_models:resnet50"])
    """module:callable that returns the torch.nn.Module. It is imported and run: name code you trust."""
    factory_args: Arguments = Field({})
    """Keyword arguments of the factory."""
    weights: Text | None = Field(None, examples=["s3://models/resnet50.safetensors"])
    """State dict of the module: path or URI of a .safetensors, .pt or .pth file; null: as it comes."""
    program: Text | None = Field(None, examples=["resnet50.pt2"])
    """Path or URI of a program saved by torch.export.save (.pt2), instead of a factory."""
    sha256: Sha256 | None = None
    """SHA-256, in hex, of the file of weights or of the program; others are refused. null: any."""
    source: Annotated[str, NameIn(SOURCES)] | None = None
    """How the model is opened; null: factory or program, whichever is given."""
    source_args: Arguments = Field({})
    """What another source than factory and program needs."""

    @property
    def source_name(self) -> str:
        return self.source or ("program" if self.factory is None else "factory")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source not in (None, "factory", "program"):
            return self
        if self.factory is None and self.program is None:
            text = "is missing, and program too; give factory (module:callable) or program (.pt2)"
            raise ContradictionError(("factory",), ABSENT, text)
        if self.factory is not None and self.program is not None:
            raise ContradictionError(("program",), self.program, "and factory exclude each other; remove one of them")
        if self.factory is None and (self.weights is not None or self.factory_args):
            name = "weights" if self.weights is not None else "factory_args"
            raise ContradictionError((name,), getattr(self, name), "needs a factory, not a program; remove it")
        if self.sha256 is not None and self.weights is None and self.program is None:
            raise ContradictionError(("sha256",), self.sha256, "needs a file, weights or program; remove it")
        for name, suffixes in (("weights", (".safetensors", ".pt", ".pth")), ("program", (".pt2",))):
            uri = getattr(self, name)
            if uri is not None and not uri.lower().partition("?")[0].endswith(suffixes):
                text = f"must end in {' or '.join(suffixes)}; convert or rename the file"
                raise ContradictionError((name,), uri, text)
        return self
