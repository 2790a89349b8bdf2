"""The job: what a user may ask for, in sections, each field with a description. Imports no torch.

A job file is checked here, on a login node, before anything is started. Validators refuse and never change what the
user wrote; a preset only fills fields that were not given.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.evaluate import EvaluateSpec
from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section
from distributed_adaround.spec.fields import NameIn, Text
from distributed_adaround.spec.model import ModelSpec
from distributed_adaround.spec.quantize import QuantizeSpec, stale_fields
from distributed_adaround.spec.rounding import RoundingSpec
from distributed_adaround.spec.runtime import RuntimeSpec

# What a result is written as (the contract is export.exporter.Exporter).
EXPORTERS: dict[str, str] = {
    "safetensors": "distributed_adaround.export.dequantized:CodesExporter",
    "dequantized": "distributed_adaround.export.dequantized:DequantizedExporter",
    "huggingface": "distributed_adaround.export.huggingface:HuggingFaceExporter",
    "compressed_tensors": "distributed_adaround.export.compressed_tensors:CompressedTensorsExporter",
    "onnx": "distributed_adaround.export.onnx_model:OnnxExporter",
    "gguf": "distributed_adaround.export.gguf_file:GgufExporter",
    "torchao": "distributed_adaround.export.torchao_file:TorchaoExporter",
    "program": "distributed_adaround.export.program:ProgramExporter",
}
# Fields of the section `output` that count with one format only.
FIELDS_OF_FORMATS = {"base_gguf": "gguf", "dynamic_activations": "compressed_tensors"}
# What writes a directory of model.hf again.
_DIRECTORIES = ("huggingface", "compressed_tensors")

_ADAROUND = {
    "solver": "minibatch",
    "max_iter": 10000,
    "batch_unit": "samples",
    "lr": 1e-3,
    "warm_start": 0.2,
    "beta": (20.0, 2.0),
    "asymmetry": 1.0,
}
_QINT8 = {"dtype": "qint8", "qscheme": "per_tensor_symmetric", "quant_min": -128, "quant_max": 127}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "pytorch": {
        "quantize": _QINT8 | {"observer": "minmax"},
        "rounding": _ADAROUND
        | {
            "batch_size": 256,
            "reg_param": 0.001,
            "normalization": "mean",
            "activation_in_loss": False,
            "polish": False,
        },
    },
    "paper": {
        "quantize": {"observer": "mse"},
        "rounding": _ADAROUND | {"batch_size": 32, "reg_param": 0.01, "normalization": "sum", "polish": False},
    },
}


class OutputSpec(Section):
    """Where the results go, and as what."""

    uri: Text = Field(examples=["s3://out/resnet50-w4"])
    """Folder for the results, a path or URI; commits of finished layers and reports go there too."""
    formats: list[Annotated[str, NameIn(EXPORTERS)]] = Field(["safetensors", "dequantized"], min_length=1)
    """safetensors: packed codes, scales and zero points, written in any case, since all else is made from them;
    dequantized: float weights on the grid under the model's own parameter names; huggingface: the directory of model.hf
    again, with float weights on the grid; compressed_tensors: the same with packed weights, for transformers, vLLM and
    SGLang; onnx: DequantizeLinear, for ONNX Runtime; gguf: for llama.cpp; torchao: tensors of torchao in safetensors;
    program: codes and plain operations, for torch.export.load."""
    base_gguf: Text | None = Field(None, examples=["s3://models/SmolLM2-135M-f16.gguf"])
    """With gguf: path or URI of a float GGUF file of the same model, whose tensors are replaced."""
    dynamic_activations: bool = False
    """With compressed_tensors and fp8: runtimes quantize activations to fp8 too, token by token."""
    verify: bool = True
    """Load each format again by the library that reads it, and compare weights and outputs with the quantized model."""
    overwrite: bool = False
    """Replace finished results that are already in the folder."""

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        if len(set(self.formats)) < len(self.formats):
            raise ContradictionError(("formats",), self.formats, "names a format twice; remove the second one")
        if "gguf" in self.formats and self.base_gguf is None:
            text = "is missing, but the format gguf needs it; give a float GGUF file of the model"
            raise ContradictionError(("base_gguf",), ABSENT, text)
        for name, owner in FIELDS_OF_FORMATS.items():
            value = getattr(self, name)
            if value not in (None, False) and owner not in self.formats:
                raise ContradictionError((name,), value, f"counts only with the format {owner}; add it or remove this")
        return self


class MethodSpec(Section):
    """What is done to the weights, and where it runs: a job without model, data and output."""

    preset: Literal["pytorch", "paper"] | None = None
    """Settings for fields that are not given. pytorch: those of PyTorch's AdaptiveRoundingOptimizer; paper: those of
    the AdaRound paper."""
    quantize: QuantizeSpec = QuantizeSpec()
    """Number format of the weights."""
    rounding: RoundingSpec = RoundingSpec()
    """How the rounding of each layer is learned."""
    runtime: RuntimeSpec = RuntimeSpec()
    """Where the job runs."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return data
        return data | {section: _filled(data.get(section, {}), own) for section, own in PRESETS[name].items()}


def _filled(given: Any, defaults: Mapping[str, Any]) -> Any:
    if isinstance(given, Section):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given, dict):
        return given
    # The preset's range belongs to the preset's dtype.
    stale = stale_fields(given.get("dtype"))
    return {name: value for name, value in defaults.items() if name not in stale} | given


class JobSpec(MethodSpec):
    """A job of distributed_adaround."""

    model: ModelSpec
    """The trained network."""
    data: DataSpec
    """Calibration data."""
    output: OutputSpec
    """Where the results go, and as what."""
    evaluate: EvaluateSpec | None = None
    """A metric of the float and of the quantized network, on data of its own; null: none."""

    def inputs(self) -> list[tuple[str, str]]:
        """Everything that the job reads: the field, and a path or URI in it."""
        sets = {"data": self.data} | ({} if self.evaluate is None else {"evaluate.data": self.evaluate.data})
        found: list[tuple[str, str | None]] = []
        for section, data in sets.items():
            found += [(f"{section}.uri", uri) for uri in ([data.uri] if isinstance(data.uri, str) else data.uri)]
            found += [(f"{section}.{name}", getattr(data, name)) for name in ("checksums", "processor")]
        found += [(f"model.{name}", getattr(self.model, name)) for name in ("hf", "weights", "program")]
        found.append(("output.base_gguf", self.output.base_gguf))
        return [(field, uri) for field, uri in found if uri is not None]

    @model_validator(mode="after")
    def _format_of_source(self) -> Self:
        again = [name for name in self.output.formats if name in _DIRECTORIES]
        if again and self.model.source_name != "hf":
            text = f"writes a model.hf directory again ({again[0]}), and this model is none; remove it"
            raise ContradictionError(("output", "formats"), self.output.formats, text)
        return self

    def job_digest(self) -> str:
        """SHA-256, in hex, of the whole job apart from the machines it runs on: whose status is in the output."""
        return hashlib.sha256(self.model_dump_json(exclude={"runtime"}).encode()).hexdigest()

    def result_digest(self) -> str:
        """SHA-256, in hex, of everything here that changes the result, nulls resolved.

        Left out: places, limits and devices; the evaluation; the model, whose weights have a fingerprint of their own;
        what the manifest has checksums of: the files of data, and what the encoder takes from the processor.
        """
        data = self.data.model_dump(mode="json", exclude={"uri", "checksums", "prefetch", "processor"})
        content = {
            "quantize": self.quantize.model_dump(mode="json"),
            "rounding": self.rounding.resolved(),
            "seed": self.runtime.seed,
            "data": data | {"encoder": self.data.encoder_name},
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, with the description and default of every field."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | JobSpec.model_json_schema()
