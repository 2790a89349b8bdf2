"""The job: what a user may ask for, in sections, each field with a description. Imports no torch.

A job file is checked here, on a login node, before anything is started. Validators refuse and never change what the
user wrote; a preset only fills fields that were not given. The spec stops at `job.py`: below it, plain arguments.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from distributed_adaround.errors import SpecError
from distributed_adaround.spec_errors import ABSENT, ContradictionError, Section, one_rule, shown
from distributed_adaround.spec_format import LayerFormat, dtype_range, stale_fields
from distributed_adaround.spec_load import read_job
from distributed_adaround.spec_quantize import Override, PositiveInt, QuantizeSpec, Text, TextOrTexts
from distributed_adaround.spec_rounding import RoundingSpec

__all__ = [
    "PRESETS",
    "DataSpec",
    "JobSpec",
    "LayerFormat",
    "MethodSpec",
    "ModelSpec",
    "OutputSpec",
    "Override",
    "QuantizeSpec",
    "RoundingSpec",
    "RuntimeSpec",
    "dtype_range",
    "json_schema",
    "load_spec",
    "parse_bytes",
]

_NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_UNITS = {"B": 1} | {
    f"{prefix}{kind}": (1024 if kind == "iB" else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for kind in ("B", "iB")
}

_MAX_BYTES = 2**63 - 1

PositiveFloat = Annotated[float, Field(gt=0)]
ImportPath = Annotated[str, Field(pattern=rf"^{_NAME}:{_NAME}$")]
Sha256 = Annotated[
    str, Field(pattern=r"^[0-9a-fA-F]{64}$"), one_rule("must be 64 hexadecimal digits; write what sha256sum prints")
]

Arguments = Annotated[
    dict[str, JsonValue],
    one_rule("must map names to text, finite numbers, true, false, null, or lists and mappings of these; correct it"),
]


def parse_bytes(value: int | str) -> int:
    """4096, "4096 B", "500MB" (powers of 1000) or "4GiB" (powers of 1024) as a number of bytes.

    Raises SpecError when the text is no size, or the size is not between 1 byte and 2^63 - 1.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?B)", value, re.ASCII)
        if match is None or match[2] not in _UNITS:
            raise SpecError(f"{shown(value)} is not a size; write bytes as a number, or for instance 4GiB or 500MB")
        number = float(match[1]) if "." in match[1] else int(match[1])
        value = int(number * _UNITS[match[2]])
    if not 1 <= value <= _MAX_BYTES:
        raise SpecError(f"{shown(value)} bytes are no size of a memory; write for instance 4GiB, or leave it out")
    return value


def _check_memory(value: int | str) -> int | str:
    parse_bytes(value)
    return value


Memory = Annotated[
    int | str,
    AfterValidator(_check_memory),
    one_rule("must be a size, 1 byte or more; write for instance 4GiB or 500MB, or leave it out"),
]


class ModelSpec(Section):
    """The trained network: a factory with weights, or an exported program."""

    factory: ImportPath | None = Field(
        None,
        description="Callable that returns the torch.nn.Module, as module:callable. It is imported and run, so name "
        "only code that you trust.",
        examples=["my_models:resnet50"],
    )
    factory_args: Arguments = Field({}, description="Keyword arguments of the factory.")
    weights: Text | None = Field(
        None,
        description="State dict for the factory's module: path or URI of a .safetensors, .pt or .pth file; null: the "
        "factory returns a module with its weights.",
        examples=["s3://models/resnet50.safetensors"],
    )
    program: Text | None = Field(
        None,
        description="Path or URI of a program saved by torch.export.save (.pt2), instead of a factory.",
        examples=["resnet50.pt2"],
    )
    sha256: Sha256 | None = Field(
        None,
        description="SHA-256, in hex, that the file of weights or of the program must have, so that a damaged or "
        "exchanged one is not used; null: any.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.factory is None and self.program is None:
            raise ContradictionError(
                ("factory",), ABSENT, "is missing, and program too; give factory (module:callable) or program (.pt2)"
            )
        if self.factory is not None and self.program is not None:
            raise ContradictionError(("program",), self.program, "and factory exclude each other; remove one of them")
        if self.factory is None and (self.weights is not None or self.factory_args):
            name = "weights" if self.weights is not None else "factory_args"
            raise ContradictionError((name,), getattr(self, name), "needs a factory, not a program; remove it")
        if self.sha256 is not None and self.weights is None and self.program is None:
            raise ContradictionError(("sha256",), self.sha256, "needs a file, weights or program; remove it")
        _check_suffix("weights", self.weights, (".safetensors", ".pt", ".pth"))
        _check_suffix("program", self.program, (".pt2",))
        return self


def _check_suffix(name: str, uri: str | None, suffixes: tuple[str, ...]) -> None:
    if uri is not None and not uri.lower().partition("?")[0].endswith(suffixes):
        raise ContradictionError((name,), uri, f"must end in {' or '.join(suffixes)}; convert or rename the file")


class DataSpec(Section):
    """Calibration data, and how it is cut."""

    uri: TextOrTexts = Field(
        description="Files with samples: path or URI of a file, a folder or a glob, or a list of these. Types: .npy, "
        ".npz, .safetensors, .pt, .pth, .parquet, .jsonl.",
        examples=["s3://calib/images-*.npz"],
    )
    checksums: Text | None = Field(
        None,
        description="Path or URI of a list of the files' SHA-256, as sha256sum writes it; every file must be in it and "
        "agree with it. null: files are only proven to stay the same while the job runs.",
        examples=["s3://calib/SHA256SUMS"],
    )
    num_samples: PositiveInt | None = Field(None, description="How many samples to use; null: all.")
    microbatch_size: PositiveInt = Field(32, description="Samples that pass through the model at once.")
    virtual_shards: PositiveInt = Field(
        64,
        description="Parts the data is cut into and dealt to the ranks; a property of the job, so that the number of "
        "ranks does not change the result. More ranks than this have nothing to do.",
    )
    fields: dict[Text, Text] | None = Field(
        None,
        description="Field of the data files for each input name of the model, as {input: field}; null: all numeric "
        "fields, under their own names.",
    )
    one_sample_per_file: bool = Field(False, description="Each file is one sample; no first dimension counts samples.")
    transform: ImportPath | None = Field(
        None,
        description="Callable, as module:callable, that takes each microbatch (a dict of tensors) and returns the "
        "one that the model gets.",
        examples=["my_models:normalize"],
    )
    mask_field: Text = Field(
        "attention_mask", description="Field that is nonzero where a token counts and 0 where it is padding."
    )
    pad_value: float = Field(0.0, description="Value that fills up the shorter samples of a microbatch.")
    prefetch: int = Field(2, ge=0, le=1024, description="Microbatches that are read ahead; 0: none.")


class OutputSpec(Section):
    """Where the results go, and as what."""

    uri: Text = Field(
        description="Folder for the results, a path or URI; commits of finished layers and reports go there too.",
        examples=["s3://out/resnet50-w4"],
    )
    formats: list[Literal["safetensors", "dequantized"]] = Field(
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


class RuntimeSpec(Section):
    """Where the job runs. Only `seed` changes the result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,4})?)$")] = Field(
        "auto",
        description="auto, cpu, cuda (each rank its own GPU) or cuda:N; auto: GPUs when there are any.",
        examples=["auto, cpu, cuda or cuda:0"],
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="Backend of torch.distributed; auto: nccl on GPUs, gloo on CPUs."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of every random draw.")
    timeout_minutes: float = Field(
        30.0, gt=0, le=525_600, description="Minutes after which a rank that waits for another one gives up."
    )
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads of each rank; null: as OMP_NUM_THREADS says, else torchrun gives each of several "
        "ranks one thread, and a single rank takes all cores. On CPUs the last bits of a result depend on it.",
    )
    save_minutes: float = Field(
        2.0,
        gt=0,
        le=525_600,
        description="In a layer that takes longer than this, the state of its solver is saved about this often, so "
        "that a restart loses no more.",
    )
    activation_memory: Memory | None = Field(
        None,
        description="Host memory of one rank for activations, in bytes or as 4GiB, 500MB; the rest is spilled to "
        "disk. null: half of the free memory.",
    )
    device_memory: Memory | None = Field(
        None,
        description="GPU memory of one rank for activations, in bytes or as 4GiB, 500MB; the rest is spilled to the "
        "host. null: half of the free memory.",
    )
    spill_dir: Text | None = Field(
        None, description="Local folder for activations that do not fit into memory; null: the temporary folder."
    )

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "nccl" and self.device == "cpu":
            raise ContradictionError(("backend",), self.backend, "needs GPUs, but the device is cpu; use gloo or auto")
        return self


PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "seed": {
        "quantize": {
            "dtype": "qint8",
            "qscheme": "per_tensor_symmetric",
            "quant_min": -128,
            "quant_max": 127,
            "observer": "minmax",
        },
        "rounding": {
            "solver": "minibatch",
            "max_iter": 10000,
            "batch_size": 256,
            "batch_unit": "samples",
            "lr": 1e-3,
            "warm_start": 0.2,
            "beta": (20.0, 2.0),
            "reg_param": 0.001,
            "normalization": "mean",
            "asymmetry": 1.0,
            "activation_in_loss": False,
        },
    },
    "paper": {
        "quantize": {"observer": "mse"},
        "rounding": {
            "solver": "minibatch",
            "max_iter": 10000,
            "batch_size": 32,
            "batch_unit": "samples",
            "lr": 1e-3,
            "warm_start": 0.2,
            "beta": (20.0, 2.0),
            "reg_param": 0.01,
            "normalization": "sum",
            "asymmetry": 1.0,
        },
    },
}


class MethodSpec(Section):
    """What is done to the weights, and where it runs: a job without model, data and output."""

    preset: Literal["seed", "paper"] | None = Field(
        None,
        description="Settings for fields that are not given. seed: those of PyTorch's AdaptiveRoundingOptimizer; "
        "paper: those of the AdaRound paper.",
    )
    quantize: QuantizeSpec = Field(QuantizeSpec(), description="Number format of the weights.")
    rounding: RoundingSpec = Field(RoundingSpec(), description="How the rounding of each layer is learned.")
    runtime: RuntimeSpec = Field(RuntimeSpec(), description="Where the job runs.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return data
        return data | {section: _filled(data.get(section, {}), defaults) for section, defaults in preset.items()}


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

    model: ModelSpec = Field(description="The trained network.")
    data: DataSpec = Field(description="Calibration data.")
    output: OutputSpec = Field(description="Where the results go, and as what.")

    def job_digest(self) -> str:
        """SHA-256, in hex, of the whole job apart from the machines it runs on: whose status is in the output."""
        text = self.model_dump_json(exclude={"runtime"})
        return hashlib.sha256(text.encode()).hexdigest()

    def result_digest(self) -> str:
        """SHA-256, in hex, of everything here that changes the result.

        Left out: places, limits and devices; the model, whose weights have a fingerprint of their own; data.uri and
        data.checksums, since the manifest has checksums of the files. Resolved values count, not the preset that they
        came from.
        """
        content = {
            "quantize": self.quantize.model_dump(mode="json"),
            "rounding": self.rounding.resolved(),
            "seed": self.runtime.seed,
            "data": self.data.model_dump(mode="json", exclude={"uri", "checksums", "prefetch"}),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_spec(path: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Reads and checks a job file (.yaml, .yml, .json, .toml; local path or URI).

    overrides: "section.field=value" each, applied in order before anything is checked. Raises SpecError.
    """
    return JobSpec(**read_job(path, overrides))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, with the description and default of every field."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | JobSpec.model_json_schema()
