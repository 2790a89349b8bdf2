"""The source `program`: a program saved by torch.export.save, read without running anything it contains."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from distributed_adaround.errors import InputError, first_line, shorten
from distributed_adaround.files.integrity import check_zip, is_zip
from distributed_adaround.model.archive import unsafe_content
from distributed_adaround.model.source import OpenedModel, checked_file
from distributed_adaround.model.weights import refuse_expanded, refuse_non_finite
from distributed_adaround.spec.model import ModelSpec


class ProgramSource:
    """`model.program`."""

    def __init__(self, spec: ModelSpec, folder: Path | None) -> None:
        self._spec = spec

    def open(self) -> OpenedModel:
        with checked_file(self._spec.program, self._spec.sha256) as path:
            assert path is not None
            return OpenedModel(load_program(path))


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a `.pt2` file of `torch.export.save`.

    `torch.export.load` (torch 2.13) unpickles without `weights_only`, evaluates strings and resolves any attribute of
    torch; see `archive.py`. A file that would need any of that is refused before torch loads it, and the guard
    expressions of the program, which torch compiles as Python, are dropped: the caller checks its own inputs.

    Raises InputError for a missing, damaged or unsafe file and for weights that are not finite.
    """
    try:
        if is_zip(path):
            check_zip(path, compressed=False)
        found = unsafe_content(path)
        if found is not None:
            raise InputError(f"is refused: {found}; use model.factory for such a model")
        with _silent("torch.export"):  # which logs a traceback of what it then raises
            program = torch.export.load(path)
    except InputError as error:
        raise InputError(f"model.program {str(path)!r} {shorten(str(error))}") from error
    except OSError as error:
        raise InputError(f"model.program {str(path)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(
            f"model.program {str(path)!r} is not a program of torch.export.save that torch {torch.__version__} "
            f"can load: {first_line(error)}"
        ) from error
    program._guards_code = []
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    refuse_expanded(tensors, path)
    parameters = set(program.graph_signature.parameters)
    refuse_non_finite(
        ((name, tensor) for name, tensor in tensors.items() if name in parameters),
        ((name, tensor) for name, tensor in tensors.items() if name not in parameters),
        str(path),
    )
    return program


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """A library's logger says nothing for the time of the block."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
