"""Tests export a thousand small models, and half of that time torch works out what it did for the one before."""

from __future__ import annotations

import functools
import typing

import torch._export.utils
import torch._ops


def remember() -> None:
    """Look up the operators of torch's libraries once in this process, and evaluate type hints of functions once. What
    torch does is the same; a torch without these names is left as it is."""
    if hasattr(torch._export.utils, "_materialize_cpp_cia_ops"):
        torch._export.utils._materialize_cpp_cia_ops = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
    # That of collections.abc makes `Callable[P, T]` anew each time.
    torch._ops.Callable = typing.Callable  # type: ignore[misc]
