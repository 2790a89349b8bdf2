"""Models from HuggingFace directories: config.json, safetensors (one file, or shards with an index), tokenizer.

The directory is data: `trust_remote_code` stays off, nothing is looked up in the network, pickles are not read. All
files are compared with each other before transformers sees them, since it fills what is missing with random numbers.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from distributed_adaround.errors import InputError, first_line, redact, shorten
from distributed_adaround.files import jsontext
from distributed_adaround.files.integrity import check_safetensors
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.model.weights import counted, refuse_non_finite
from distributed_adaround.runtime.transformers_library import offline_transformers
from distributed_adaround.spec.model import ModelSpec

logger = logging.getLogger(__name__)

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
# Weights in other forms, which are not carried along beside new ones.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ckpt",
    ".index.json",
)
# In the order in which one is chosen where config.json names no class that transformers has.
_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageClassification",
    "AutoModelForSequenceClassification", "AutoModelForMaskedLM", "AutoModelForCTC", "AutoModel",
)  # fmt: skip
# Arguments of from_pretrained that a job may not set.
_FIXED = frozenset(
    {"trust_remote_code", "local_files_only", "use_safetensors", "output_loading_info", "attn_implementation", "dtype",
     "torch_dtype", "device_map", "quantization_config", "config", "cache_dir", "token", "revision", "subfolder"}
)  # fmt: skip


def open_huggingface(spec: ModelSpec, folder: Path | None, files: LocalFiles) -> OpenedModel:
    """`model.hf`, as a source of models."""
    assert spec.hf is not None
    shown = f"model.hf {redact(spec.hf)!r}"
    directory = model_directory(spec.hf, files, weights=True)
    config = read_config(directory, shown)
    checkpoint = _check_weights(directory, shown)
    refused = sorted(_FIXED & spec.source_args.keys())
    if refused:
        raise InputError(f"model.source_args: {refused[0]!r} is not for the job to set; remove it")
    with offline_transformers(shown) as transformers:
        made = _from_pretrained(transformers, directory, config, spec, shown)
    refuse_non_finite((*made.named_parameters(), *made.named_buffers()), dict(made.named_parameters()), shown)
    shards = set(checkpoint.values())
    largest = max((directory / shard).stat().st_size for shard in shards) if len(shards) > 1 else 0
    return OpenedModel(made.eval().requires_grad_(False), checkpoint, largest)


def load_again(directory: Path, spec: ModelSpec, shown: str, **changed: Any) -> nn.Module:
    """A directory that this program has written, as its own is loaded. changed: more arguments of from_pretrained.
    Raises InputError."""
    config = jsontext.read_object(directory / CONFIG, shown)
    with offline_transformers(shown) as transformers:
        return _from_pretrained(transformers, directory, config, spec, shown, **changed).eval()


def shape_of_model(directory: Path, spec: ModelSpec, shown: str) -> nn.Module:
    """The model without weights, on the meta device. Raises InputError."""
    with offline_transformers(shown) as transformers:
        cls = _model_class(transformers, directory, read_config(directory, shown), spec.hf_class, shown)
        try:
            config, rest = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **spec.source_args
            )
            with torch.device("meta"):
                # Auto classes make their models by another method.
                made = cls(config, **rest) if issubclass(cls, nn.Module) else cls.from_config(config, **rest)
        except Exception as error:
            raise InputError(f"{shown} cannot be built as {cls.__name__}: {first_line(error)}") from error
    assert isinstance(made, nn.Module)
    return made


def files_beside(directory: Path) -> dict[str, Path]:
    """What lies beside the weights, by its name: configuration, tokenizer, licence."""
    return {name: path for name, path in _files(directory).items() if _is_beside(name)}


def model_directory(uri: str, files: LocalFiles, *, weights: bool = False) -> Path:
    """The directory, local: its configuration and tokenizer, and its weights too where they are asked for."""

    def wanted(name: str) -> bool:
        is_shard = "/" not in name and name.endswith(".safetensors")
        return _is_beside(name) or (weights and (is_shard or name == INDEX))

    return files.directory(uri, wanted)


def _is_beside(name: str) -> bool:
    """Whether a file belongs beside the weights: configuration, tokenizer, licence; code does not."""
    return not name.lower().endswith((*_WEIGHTS, ".py"))


def read_config(directory: Path, shown: str) -> dict[str, Any]:
    """config.json. Raises InputError."""
    if not (directory / CONFIG).exists():
        raise InputError(f"{shown} has no {CONFIG}; give the directory of a model of transformers")
    config = jsontext.read_object(directory / CONFIG, shown)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise InputError(f"{shown} is quantized already, by {shorten(str(method), 40)}; give the float model")
    return config


def _check_weights(directory: Path, shown: str) -> dict[str, str]:
    """The file of each tensor. Raises InputError unless every shard that the index names is there and whole, and holds
    what the index says."""
    if (directory / INDEX).exists():
        places = jsontext.read_object(directory / INDEX, shown).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"{shown}: {INDEX} has no weight_map from tensors to files; get it again")
    elif (directory / SINGLE).exists():
        places = None
    else:
        others = sorted(name for name in _files(directory) if name.lower().endswith(_WEIGHTS))
        what = f"only {shorten(', '.join(others), 120)}; convert them by save_pretrained" if others else "no weights"
        raise InputError(f"{shown} has no {SINGLE} and no {INDEX}: {what}")
    if places is None:
        return dict.fromkeys(sorted(_names_in(directory / SINGLE, f"{shown}: {SINGLE}")), SINGLE)
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise InputError(f"{shown}: {INDEX} names {shorten(shard, 80)!r}, which leaves the directory; correct it")
        path = directory / shard
        if not path.exists():
            raise InputError(f"{shown}: {INDEX} names {shorten(shard, 80)!r}, which is missing; get it again")
        held = _names_in(path, f"{shown}: {shard}")
        absent = [name for name, file in places.items() if file == shard and name not in held]
        if absent:
            what = f"{shard} lacks what {INDEX} says is in it: {counted('', absent).strip()}"
            raise InputError(f"{shown}: {what}; they are not of one model, get both again")
    return places


def _names_in(path: Path, named: str) -> set[str]:
    try:
        check_safetensors(path)
        # It compares the size of the file with what its header says.
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except InputError as error:
        raise InputError(f"{named} {error}") from None
    except Exception as error:
        raise InputError(f"{named} is damaged: {first_line(error)}; get it again") from None


def _files(directory: Path) -> dict[str, Path]:
    """All files that are not hidden, by their names relative to the directory, sorted."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))}


def _from_pretrained(
    transformers: Any, directory: Path, config: Mapping[str, Any], spec: ModelSpec, shown: str, **changed: Any
) -> nn.Module:
    """The model with all its weights from the directory. Raises InputError."""
    cls = _model_class(transformers, directory, config, spec.hf_class, shown)
    dtype = "auto" if spec.dtype is None else getattr(torch, spec.dtype)
    try:
        model, info = cls.from_pretrained(
            directory,
            dtype=dtype,
            # flex_attention and flash_attention are no graphs of plain operations.
            attn_implementation="sdpa" if getattr(cls, "_supports_sdpa", True) else "eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **spec.source_args | changed,
        )
    except Exception as error:
        raise InputError(f"{shown} cannot be loaded as {cls.__name__}: {first_line(error)}") from error
    found = {kind: sorted(str(name) for name in info.get(f"{kind}_keys") or ()) for kind in ("missing", "mismatched")}
    texts = [counted(kind, names) for kind, names in found.items() if names]
    if texts:
        remedy = "choose another class by model.hf_class, or leave the part out by model.source_args"
        raise InputError(f"{shown} does not hold all weights of {cls.__name__}: {'; '.join(texts)}; {remedy}")
    if info.get("unexpected_keys"):
        logger.info("%s: %s", shown, counted("left out", sorted(info["unexpected_keys"])))
    assert isinstance(model, nn.Module)
    return model


def _model_class(transformers: Any, directory: Path, config: Mapping[str, Any], chosen: str | None, shown: str) -> Any:
    """The class to load: as chosen, as config.json says, or the first Auto class that knows the configuration."""
    if chosen is not None:
        if not hasattr(getattr(transformers, chosen, None), "from_pretrained"):
            what = f"transformers {transformers.__version__} has no model class of this name"
            raise InputError(f"model.hf_class {chosen!r}: {what}; correct it")
        return getattr(transformers, chosen)
    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    for name in named:
        if hasattr(getattr(transformers, name, None), "from_pretrained"):
            return getattr(transformers, name)
    try:
        loaded = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception:
        loaded = None
    for name in _AUTO_CLASSES if loaded is not None else ():
        found = getattr(transformers, name)._model_mapping.get(type(loaded), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    what = shorten(", ".join(named) or f"model_type {config.get('model_type')!r}", 120)
    code = "; code in the directory is never run" if config.get("auto_map") else ""
    remedy = "install a newer one, or choose a class by model.hf_class"
    raise InputError(f"{shown}: transformers {transformers.__version__} has no class for {what}{code}; {remedy}")
