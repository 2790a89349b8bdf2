"""A model as a module on the device of its rank, where it is run as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.node import map_aggregate


@contextmanager
def on_device(model: nn.Module | ExportedProgram, device: torch.device) -> Iterator[nn.Module]:
    """A module to run there, with the weights that the model has now. Afterwards they lie where they were: the walk
    through the model holds the same tensors."""
    module = _ProgramModule(model, device) if isinstance(model, ExportedProgram) else model
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield module
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


class _ProgramModule(nn.Module):
    """A program with its own tensors. Takes its inputs by position or by name, however it was exported."""

    def __init__(self, program: ExportedProgram, device: torch.device) -> None:
        super().__init__()
        module = program.module(check_guards=False)
        assert isinstance(module, GraphModule)
        self.program = module
        info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
        self._names: list[str] = info.orig_args
        self._num_positional = len(info.in_spec.children()[0].children())
        # The device that it was exported on is written in its graph.
        for node in module.graph.nodes:
            node.args, node.kwargs = (
                map_aggregate(given, lambda value: device if isinstance(value, torch.device) else value)
                for given in (node.args, node.kwargs)
            )
        module.recompile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if len(args) > len(self._names) or set(given) != set(self._names):
            raise ValueError(f"the program takes the inputs {self._names}, not {sorted(given)}")
        first = self._names[: self._num_positional]
        others = {name: given[name] for name in self._names[self._num_positional :]}
        return self.program(*(given[name] for name in first), **others)
