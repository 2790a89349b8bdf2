"""Code by name: what a job file names, and the implementations in this program's own tables."""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_adaround.errors import InputError, first_line


def implementation(table: Mapping[str, str], name: str) -> Any:
    """What a table of "module:attribute" holds under a name."""
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_callable(target: str, search_path: Path | None) -> Callable[..., Any]:
    """Import "module:attribute"; the attribute may be dotted. Raises InputError when it does not exist."""
    module_name, separator, attribute = target.partition(":")
    if not (separator and module_name and attribute):
        raise InputError(f"{target!r} is not of the form 'module:callable', for instance 'my_models:resnet50'")
    with importable(search_path):
        _forget_namesake(module_name.partition(".")[0], search_path)
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{module_name}.".startswith(f"{missing}."):
                where = f"{str(search_path)!r} and " if search_path is not None else ""
                text = f"module {module_name!r} of {target!r} is not found in {where}Python's path"
            else:
                text = f"importing {module_name!r} of {target!r} failed: {first_line(error)}"
            raise InputError(text) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{target!r}: {getattr(found, '__name__', module_name)!r} has no attribute {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{target!r} is a {type(found).__name__}; it must be callable")
    return found  # type: ignore[no-any-return]


@contextmanager
def importable(search_path: Path | None) -> Iterator[None]:
    """search_path at the end of sys.path for the time of the block."""
    if search_path is None:
        yield
        return
    entry = str(search_path.resolve())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _forget_namesake(name: str, search_path: Path | None) -> None:
    """Drop a module imported earlier for another job's folder, so that this job gets the file beside it.

    Only when Python, asked again, would find the name in `search_path`: installed packages are never dropped.
    """
    if search_path is None or name not in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec(name, sys.path)
    if spec is None or spec.origin in (None, getattr(sys.modules[name], "__file__", None)):
        return
    if Path(str(spec.origin)).is_relative_to(search_path.resolve()):
        for key in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
            del sys.modules[key]
