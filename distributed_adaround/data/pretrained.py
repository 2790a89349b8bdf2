"""What lies beside a model: processors of the library transformers, and the configuration that goes with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed_adaround.data.encoder import EncoderContext
from distributed_adaround.errors import InputError, first_line, redact, shorten
from distributed_adaround.files import jsontext
from distributed_adaround.runtime.transformers_library import offline_transformers

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def load_pretrained(context: EncoderContext, auto_class: str, shown: str, remedy: str) -> Any:
    """The processor in the directory of the model, or in data.processor. auto_class: of transformers. shown: what needs
    it. remedy: when there is none. Raises InputError."""
    directory = processor_directory(context, shown, remedy)
    with offline_transformers(shown) as transformers:
        try:
            return getattr(transformers, auto_class).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            what = f"{auto_class} cannot be loaded from {directory_of(context)}: {shorten(first_line(error), 160)}"
            raise InputError(f"{shown}: {what}; {remedy}") from error


def processor_directory(context: EncoderContext, shown: str, remedy: str) -> Path:
    """That of the context. Raises InputError when the job names none."""
    if context.processor is None:
        raise InputError(f"{shown} needs a directory of transformers, and there is no model.hf; {remedy}")
    return context.processor


def directory_of(context: EncoderContext, directory: Path | None = None) -> str:
    """The directory with the processor, or this one of the context, for messages."""
    named = context.spec.processor
    is_model = named is None or directory not in (None, context.processor)
    return "the directory of model.hf" if is_model else f"data.processor {redact(str(named))!r}"


def read_config(context: EncoderContext, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object that says something of the model; {}: there is none. Raises InputError when it is damaged."""
    path = context.beside(name)
    return {} if path is None else jsontext.read_object(path, directory_of(context, path.parent))


def decoder_settings(context: EncoderContext, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the model's decoder starts and ends: as generation_config.json says, else config. Raises InputError."""
    said = read_config(context, GENERATION_CONFIG).items()
    return {**config, **{name: value for name, value in said if value is not None}}


def token_id(value: object) -> int | None:
    """A token that a configuration names; None: it names none."""
    return value if isinstance(value, int) and value >= 0 else None
