"""The optional library transformers, as this program uses it: quiet, and without a network."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed_adaround.errors import InputError


@contextmanager
def offline_transformers(shown: str) -> Iterator[Any]:
    """The library transformers, quiet, and without network. shown: what needs it, in the message. Raises InputError."""
    # Read when the library is first imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(f"{shown} needs transformers: pip install 'distributed_adaround[hf]' ({error})") from error
    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
