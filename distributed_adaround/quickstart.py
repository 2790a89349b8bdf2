"""From a model directory and files of data to a job, without a job file: the commands `quantize` and `init`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from distributed_adaround.data.made_up import made_up
from distributed_adaround.errors import InputError, SpecError, redact, shorten
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.files.job_file import yaml_text
from distributed_adaround.formats import FORMATS
from distributed_adaround.spec.data import SECTION_OF
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.load import parse_job

if TYPE_CHECKING:
    from distributed_adaround.plan import JobPlan

# Group sizes that the kernels of serving engines take, best first.
GROUP_SIZES = (128, 64, 32)
# Ends of the names of classes that write words, and of those that name a class.
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_CLASSIFIES = ("ForImageClassification", "ForSequenceClassification")
# Files that hold either arrays or texts; a model with a tokenizer gets texts.
_TABLES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class _Kind:
    """What is chosen for one kind of data. most: samples that are enough. microbatch: of them at once, since outputs
    of language models are large."""

    most: int
    microbatch: int


# What `init` writes and says where no data are given.
_PLACES = {"text": "calibration.txt", "images": "pictures/", "audio": "recordings/"}
_SUFFIXES = {"text": ".txt, .jsonl or .parquet", "images": ".jpg, .png, .webp or .tar", "audio": ".wav, .flac or .tar"}
# Formats that serving engines run in groups, and the share of a model from which a parameter is worth a line.
_GROUPED, _SMALL = ("int4", "int8"), 0.01
_RUN_FAST = "int4 and int8 in groups of 32, 64 or 128"

_KINDS = {"text": _Kind(128, 4), "images": _Kind(512, 32), "audio": _Kind(64, 4), "arrays": _Kind(512, 32)}


@dataclass(frozen=True)
class Request:
    """What the command line says. None: not given."""

    directory: str
    data: Sequence[str]
    dtype: str | None = None
    group_size: int | None = None
    out: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    evaluate: Sequence[str] = ()
    formats: Sequence[str] = ()
    overrides: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Of the model: that of its directory."""
        path = self.directory if "://" in self.directory else str(Path(self.directory).resolve())
        return uris.file_name(path) or "model"


@dataclass(frozen=True)
class Directory:
    """What a model directory says of itself: its config.json and preprocessor_config.json, where it has one."""

    config: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, uri: str) -> Directory:
        """Raises InputError."""
        found = storage.list_folder(uri)
        if "config.json" not in found:
            raise InputError(f"{redact(uri)}: has no config.json; give the directory of a model of transformers")
        processor = found.get("preprocessor_config.json")
        return cls(_read_object(found["config.json"]), {} if processor is None else _read_object(processor))

    @property
    def architecture(self) -> str:
        """Name of the model's class, as far as it is known."""
        names = self.config.get("architectures") or [self.config.get("model_type", "model")]
        return str(names[0])

    @property
    def takes(self) -> str:
        """The kind of data of this model: the name of an encoder."""
        if "feature_extractor_type" in self.processor:
            return "audio"
        return "images" if "image_processor_type" in self.processor else "text"

    @property
    def metric(self) -> str:
        """What shows best how good a model like this one is."""
        if self.architecture.endswith(_WRITES):
            return "perplexity"
        return "accuracy" if self.architecture.endswith(_CLASSIFIES) else "similarity"


def _read_object(uri: str) -> Mapping[str, Any]:
    return jsontext.parse_object(storage.read_bytes(uri), f"{redact(uri)}:")


def job_of(request: Request) -> JobSpec:
    """The job of the command `quantize`. Raises SpecError, InputError."""
    directory = Directory.read(request.directory)
    return parsed(mapping_of(request, directory), request.overrides)


def parsed(job: Mapping[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """The job of these sections, with `section.field=value` on top."""
    return JobSpec(**parse_job("job.yaml", yaml_text(job).encode(), overrides))


def mapping_of(request: Request, directory: Directory) -> dict[str, Any]:
    """The sections of the job."""
    quantize = _format(request)
    job: dict[str, Any] = {
        "model": {"hf": request.directory},
        "data": _data(request, request.data, directory),
        "quantize": quantize,
        "rounding": {"solver": "gram"},
        "output": {
            "uri": request.out or f"{request.name}-{quantize['dtype']}",
            "formats": list(request.formats) or ["huggingface"],
        },
    }
    if request.evaluate:
        job["evaluate"] = {"metric": directory.metric, "data": _data(request, request.evaluate, directory)}
    return job


def _format(request: Request) -> dict[str, Any]:
    grouped = {"qscheme": "per_group_symmetric", "group_size": request.group_size}
    return {"dtype": request.dtype or "int4"} | (grouped if request.group_size is not None else {})


def _data(request: Request, files: Sequence[str], directory: Directory) -> dict[str, Any]:
    kind = _kind_of(files, directory)
    chosen = _KINDS[kind]
    section: dict[str, Any] = {"uri": files[0] if len(files) == 1 else list(files)}
    if kind != "arrays":
        section[kind] = {}
    if request.sequence_length is not None:
        if kind != "text":
            length = request.sequence_length
            raise SpecError(f"--sequence-length: {length} is for texts, and the data are {kind}; remove it")
        section["text"] = {"sequence_length": request.sequence_length}
    return section | {"max_samples": request.samples or chosen.most, "microbatch_size": chosen.microbatch}


def _kind_of(files: Sequence[str], directory: Directory) -> str:
    """The encoder of these files: by their names, and by what the model takes where these do not say. Raises
    InputError when there is none."""
    suffixes = {Path(uris.file_name(file)).suffix.lower() for uri in files for file in storage.matching_files(uri)}
    if ".tar" in suffixes or (suffixes & set(_TABLES) and directory.takes == "text"):
        return directory.takes
    return next((SECTION_OF[suffix] for suffix in sorted(suffixes) if suffix in SECTION_OF), "arrays")


def commented_job(request: Request) -> str:
    """The job file of the command `init`, as text: with what the job would do, tried on one microbatch, and what each
    choice is good for. Without data some are made up. Raises SpecError, InputError."""
    from distributed_adaround.plan import plan_job

    directory = Directory.read(request.directory)
    writes = directory.metric == "perplexity"
    request = replace(request, dtype=request.dtype or ("int4" if writes else "int8"))
    with TemporaryDirectory(prefix="adaround-") as folder:
        data = request.data or [made_up(directory.takes, Path(folder))]
        job = mapping_of(replace(request, data=data), directory)
        # The other data need not be read for it.
        tried = {name: section for name, section in job.items() if name != "evaluate"}
        plan = plan_job(parsed(tried, request.overrides), None, 1)
    if request.group_size is None and writes and request.dtype in _GROUPED:
        request = replace(request, group_size=_group_size(plan))
        job["quantize"] = _format(request)
    if not request.data:
        job["data"]["uri"] = _PLACES[directory.takes]
    job = parse_job("job.yaml", yaml_text(job).encode(), request.overrides)
    comments = {
        "model": "nothing is looked up in the network, and no code in the directory is run",
        "data": _about_data(request, directory),
        "quantize": _about_format(request, writes),
        "rounding": "closest and fast; `minibatch` is AdaRound itself",
        "output": "folders in it load by from_pretrained; compressed_tensors for vLLM, onnx, gguf, torchao, program",
        "evaluate": "of the model before and after, on data that calibration does not see",
    }
    parts = [
        (f"# {comments[name]}\n" if name in comments else "") + yaml_text({name: section})
        for name, section in job.items()
    ]
    return "\n".join([_about_plan(request, directory, plan), *parts])


def _about_plan(request: Request, directory: Directory, plan: JobPlan) -> str:
    data = "" if request.data else ", on data that were made up"
    large = [parameter for parameter in plan.coverage.left if parameter.numel >= _SMALL * plan.coverage.total]
    lines = [
        f"{request.name}: {directory.architecture}. Save this as job.yaml, then run",
        "    python -m distributed_adaround job.yaml, or",
        "    torchrun --nproc_per_node=8 -m distributed_adaround job.yaml",
        f"{plan.coverage}.",
        *(f"In float stays {shorten(each.name, 60)}, {each.numel:,}: {each.reason}" for each in large),
        f"About {plan.seconds:,.0f} s and {plan.activation_bytes / 2**20:,.0f} MiB of activations on this machine with "
        f"one rank{data}.",
        *plan.notes,
    ]
    return "".join(f"# {line}\n" for text in lines for line in wrap(text, 116, subsequent_indent="  "))


def _about_data(request: Request, directory: Directory) -> str:
    if not request.data:
        return f"put your own files here: {_SUFFIXES[directory.takes]}; some hundred samples like those in use will do"
    return "samples like those in use; more of them make roundings that hold better on others"


def _about_format(request: Request, writes: bool) -> str:
    if not writes:
        return "int8 per output channel is what ONNX Runtime and others run fast; int4 is half the size"
    number = FORMATS.get(request.dtype or "")
    if number is not None and number.block_size is not None:
        return f"blocks of {number.block_size} inputs share a scale, as this format says"
    if request.group_size is None:
        return "each output channel has a scale"
    runs = request.dtype in _GROUPED and request.group_size in GROUP_SIZES
    fast = " is what vLLM, SGLang and transformers run fast" if runs else f"; engines run {_RUN_FAST} fast"
    return f"{request.dtype} in groups of {request.group_size}{fast}"


def _group_size(plan: JobPlan) -> int | None:
    """The best that divides the inputs of all layers; None: none does."""
    inputs = [math.prod(layer.shape[1:]) for layer in plan.layers if layer.format is not None]
    return next((size for size in GROUP_SIZES if all(each % size == 0 for each in inputs)), None)
