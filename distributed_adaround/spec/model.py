"""The section `model` of a job: the trained network."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section, one_rule
from distributed_adaround.spec.fields import Arguments, ImportPath, NameIn, Text

# Where a model comes from: name, and the function that opens it (model.source says what it is).
SOURCES: dict[str, str] = {
    "factory": "distributed_adaround.model.source:open_factory",
    "program": "distributed_adaround.model.source:open_program",
    "hf": "distributed_adaround.model.huggingface:open_huggingface",
}

# Fields that each name a source.
_SOURCE_FIELDS = ("hf", "factory", "program")
ModelDtype = Literal["float32", "float16", "bfloat16"]
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), one_rule("must be the name of a class; for instance ViTModel")
]
Sha256 = Annotated[
    str, Field(pattern=r"^[0-9a-fA-F]{64}$"), one_rule("must be 64 hexadecimal digits; write what sha256sum prints")
]


class ModelSpec(Section):
    """The trained network: a HuggingFace directory, a factory with weights, or an exported program."""

    hf: Text | None = Field(None, examples=["s3://models/SmolLM2-135M"])
    """Path or URI of a HuggingFace model directory: config.json and .safetensors, sharded or not. Nothing is looked up
    in the network, and no code in the directory is run."""
    hf_class: Name | None = Field(None, examples=["LlamaForCausalLM"])
    """Class of transformers that the directory is loaded as; null: what config.json says, else an Auto class."""
    dtype: ModelDtype | None = None
    """With hf: dtype in which the weights are loaded and stored; null: that of config.json."""
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
    """How the model is opened; null: hf, factory or program, whichever is given."""
    source_args: Arguments = Field({})
    """What another source than these needs; with hf: fields of config.json that shall differ, and arguments of the
    class, as {add_pooling_layer: false}."""

    @property
    def source_name(self) -> str:
        return self.source or next((name for name in _SOURCE_FIELDS if getattr(self, name) is not None), "factory")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source not in (None, *_SOURCE_FIELDS):
            return self
        given = [name for name in _SOURCE_FIELDS if getattr(self, name) is not None]
        if not given:
            text = "is missing, and hf and program too; give hf (a directory), factory (module:callable) or program"
            raise ContradictionError(("factory",), ABSENT, text)
        if len(given) > 1:
            text = f"and {given[0]} exclude each other; remove one of them"
            raise ContradictionError((given[1],), getattr(self, given[1]), text)
        self._only_fields_of(given[0])
        for name, suffixes in (("weights", (".safetensors", ".pt", ".pth")), ("program", (".pt2",))):
            uri = getattr(self, name)
            if uri is not None and not uri.lower().partition("?")[0].endswith(suffixes):
                text = f"must end in {' or '.join(suffixes)}; convert or rename the file"
                raise ContradictionError((name,), uri, text)
        return self

    def _only_fields_of(self, source: str) -> None:
        """Refuse fields that belong to another source."""
        owners = {"hf_class": "hf", "dtype": "hf", "weights": "factory", "factory_args": "factory"}
        for name, owner in owners.items():
            value = getattr(self, name)
            if owner != source and value not in (None, {}):
                raise ContradictionError((name,), value, f"needs {owner}, not {source}; remove it")
        if self.sha256 is not None and self.weights is None and self.program is None:
            raise ContradictionError(("sha256",), self.sha256, "needs a file, weights or program; remove it")
