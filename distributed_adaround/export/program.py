"""Exporter `program`: the model as a program of torch.export, with codes where quantized weights were.

    <output>/program/model.pt2         for torch.export.load, in a process that has torch and nothing else

Each quantized weight W is dequantized in the graph by plain aten operations, right before it is first read, from
W_codes and W_scale (and W_zero_point where it is not the same for all) with the arithmetic of LayerRecord.dequantize.
Codes take a byte each. Parameters that stayed in float keep their names.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from distributed_adaround.capture.exported import export_as_it_is, export_model, quiet_torch
from distributed_adaround.capture.recurrent import close_recurrent
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, SpecError, first_line
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, Loaded
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.export.stored_weights import StoredWeight
from distributed_adaround.export.verify import outputs_of
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.model.source import load_program

logger = logging.getLogger(__name__)

FOLDER = "program"
_FILE = "model.pt2"
# Which operation of the graph gives which tensor of the model, for who wants to look at weights.
_WEIGHTS = "weights.json"
# What torch has by itself; the operators of other libraries are there only where these are imported.
_NAMESPACES = ("aten", "prims")
_BUILT_IN = ("builtins", "collections")
_STORED = (InputKind.PARAMETER, InputKind.BUFFER)


class ProgramExporter(Exporter):
    files = (FOLDER,)
    published = (f"{FOLDER}/{_FILE}",)

    def check(self, plan: ExportPlan) -> None:
        if not plan.exported:
            what = "output.formats: program needs a model that torch.export can capture, which this one is not"
            raise SpecError(f"{what}; remove program from output.formats")

    def write(self, task: ExportTask, uri: str) -> None:
        place = uris.join(uri, FOLDER, _FILE)
        storage.remove_tree(place)
        with quiet_torch():
            program, weights = _with_codes(_program(task), task.result)
        extra = {_WEIGHTS: jsontext.dumps(weights)}
        storage.write_file(place, partial(_save, program, extra))

    def load(self, task: ExportTask, uri: str) -> Loaded:
        path = task.files.path(uris.join(uri, FOLDER, _FILE))
        with quiet_torch():
            program = load_program(path)
            module = program.module(check_guards=False)

        # Experts are computed in another order of sums.
        tolerance = 1e-5 if task.dtype == torch.float32 else 2e-2
        return Loaded(_weights(module, path), partial(outputs_of, module), tolerance, note="codes take a byte each")


def _save(program: ExportedProgram, extra: dict[str, str], path: Path) -> None:
    # By way of memory torch would hold the file twice; a name without the ending makes it warn.
    with quiet_torch(), path.open("wb") as file:
        torch.export.save(program, file, extra_files=extra)


def _program(task: ExportTask) -> ExportedProgram:
    """The model with dequantized weights, on the host, without examples of its inputs. Raises InputError."""
    model = task.model()
    program = model if isinstance(model, ExportedProgram) else _exported(model, _example(task))
    devices = {tensor.device for tensor in program.state_dict.values() if isinstance(tensor, Tensor)}
    if devices - {torch.device("cpu")}:
        program = move_to_device_pass(program, "cpu")
    foreign = _foreign(program)
    if foreign:
        what = f"output.formats program: the model runs {foreign[0]}, which torch alone does not have"
        raise InputError(f"{what}; leave program out, the other formats have the result")
    return program


def _example(task: ExportTask) -> ModelInputs:
    inputs = task.inputs()
    if not inputs:
        raise InputError("output.formats program needs a microbatch on rank 0; run on fewer ranks, or give more data")
    return inputs[0]


def _exported(model: nn.Module, example: ModelInputs) -> ExportedProgram:
    """For inputs of as many sizes as torch.export finds that the model takes."""
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    example = example.to(device)
    tries = (partial(export_model, varying=True), export_model, export_as_it_is)
    reason = ""
    for place, export in enumerate(tries):
        try:
            program = _of_own_operators(model, example, export)
        except Exception as error:
            # torch.export documents no closed set of errors.
            reason = first_line(error)
            logger.debug("torch.export failed: %s", reason)
            continue
        if place == len(tries) - 1:
            logger.warning("output.formats program: the program takes inputs of the calibration data's sizes only")
        return program
    what = f"output.formats program: torch.export cannot capture the model ({reason})"
    raise InputError(f"{what}; leave program out, the other formats have the result")


def _of_own_operators(model: Any, example: ModelInputs, export: Any) -> ExportedProgram:
    """Experts of transformers run in an operator of its own by default; it has another way, of torch's operators."""
    program: ExportedProgram = export(model, example)
    close_recurrent(program.graph)
    if _foreign(program) and hasattr(model, "set_experts_implementation"):
        before = model.config._experts_implementation
        model.set_experts_implementation("batched_mm")
        try:
            program = export(model, example)
        finally:
            model.set_experts_implementation(before)
        close_recurrent(program.graph)
    return program


def _foreign(program: ExportedProgram) -> list[str]:
    """Operators that other libraries have made."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [str(op) for op in targets if isinstance(op, torch._ops.OpOverload) and op.namespace not in _NAMESPACES]


def _with_codes(program: ExportedProgram, result: StoredResult) -> tuple[ExportedProgram, dict[str, str]]:
    """The program with quantized weights computed in it, and the node of each, by the names of the model's tensors."""
    surgery = _Surgery.of(program)
    nodes = {}
    for owner in result.owners:
        if (node := surgery.replace(result.all_names(owner), StoredWeight.of(result, owner))) is not None:
            nodes[owner] = node
    return surgery.program(), {owner: node.name for owner, node in nodes.items()}


@dataclass
class _Surgery:
    """A copy of a program's graph in which stored tensors are replaced by others, and by operations on these."""

    source: ExportedProgram
    graph: fx.Graph
    specs: list[InputSpec]
    state: dict[str, Any]
    outputs: dict[str, str]

    @classmethod
    def of(cls, program: ExportedProgram) -> "_Surgery":
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            copied[node] = graph.node_copy(node, lambda other: copied[other])
            # Where the model's source lies on this machine, and what it looks like, is nobody's business.
            copied[node].meta.pop("stack_trace", None)
            # A copy would get another name where that is one of Python's own ("input"); the signature goes by names.
            copied[node].name = node.name
        return cls(program, graph, list(program.graph_signature.input_specs), dict(program.state_dict), {})

    def replace(self, names: list[str], weight: StoredWeight) -> fx.Node | None:
        """Put a stored weight in the place of the tensor of these names; None: the model does not read it."""
        placeholders = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        old = [placeholders[s.arg.name] for s in self.specs if s.kind in _STORED and s.target in names]
        users = {user for node in old for user in node.users}
        for name in names:
            self.state.pop(name, None)
        new = None
        if users:
            new = self._inserted(names[0], weight, next(node for node in self.graph.nodes if node in users))
            for node in old:
                node.replace_all_uses_with(new)
                self.outputs[node.name] = new.name
        self.specs = [spec for spec in self.specs if not (spec.kind in _STORED and spec.target in names)]
        for node in old:
            self.graph.erase_node(node)
        return new

    def _inserted(self, name: str, weight: StoredWeight, before: fx.Node) -> fx.Node:
        """Operations that compute a weight, right before it is first read."""
        parts = [part.tensors() for part in weight.parts]
        keys = [(place, key) for place, part in enumerate(parts) for key in part]
        tensors = [parts[place][key] for place, key in keys]
        targets = [self._free(f"{name}_{place}_{key}" if len(parts) > 1 else f"{name}_{key}") for place, key in keys]
        if weight.whole is not None:
            tensors.append(weight.whole.contiguous())
            targets.append(name)

        def compute(*values: Tensor) -> Tensor:
            stored: list[dict[str, Tensor]] = [{} for _ in parts]
            for (place, key), value in zip(keys, values, strict=False):
                stored[place][key] = value
            return weight.tensor(stored, None if weight.whole is None else values[-1])

        mode = detect_fake_mode([node.meta.get("val") for node in self.graph.nodes])
        assert mode is not None
        with mode:
            fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
            traced = make_fx(compute)(*fakes)
        nodes: dict[fx.Node, fx.Node] = {}
        sources = zip(targets, tensors, strict=True)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = self._stored(*next(sources), node.meta["val"])
            elif node.op == "output":
                return nodes[node.args[0]]
            else:
                with self.graph.inserting_before(before):
                    nodes[node] = self.graph.node_copy(node, lambda other: nodes[other])
                nodes[node].meta = {"val": node.meta["val"]}
        raise AssertionError("a graph has an output")

    def _free(self, name: str) -> str:
        """A name that no other tensor has."""
        while name in self.state or name in self.source.constants:
            name += "_"
        return name

    def _stored(self, target: str, tensor: Tensor, value: Any) -> fx.Node:
        """A buffer, after all parameters and buffers there are."""
        last = max((place for place, spec in enumerate(self.specs) if spec.kind in _STORED), default=-1)
        following = next(node for place, node in enumerate(self.graph.nodes) if place == last + 1)
        with self.graph.inserting_before(following):
            node = self.graph.placeholder(f"b_{target.replace('.', '_')}")
        node.meta = {"val": value}
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target, persistent=True)
        self.specs.insert(last + 1, spec)
        self.state[target] = tensor
        return node

    def program(self) -> ExportedProgram:
        signature = ExportGraphSignature(self.specs, list(self.source.graph_signature.output_specs))
        for old, new in self.outputs.items():
            signature.replace_all_uses(old, new)
        self.graph.lint()
        return ExportedProgram(
            root=self.source.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict={spec.target: self.state[spec.target] for spec in self.specs if spec.target in self.state},
            range_constraints=self.source.range_constraints,
            module_call_graph=[_with_plain_outputs(entry) for entry in self.source.module_call_graph],
            # Zeros: calibration data are nobody's business either, but readers want to know the shapes.
            example_inputs=pytree.tree_map_only(Tensor, torch.zeros_like, self.source.example_inputs),
            constants=self.source.constants,
            verifiers=self.source.verifiers,
        )


def _with_plain_outputs(entry: ModuleCallEntry) -> ModuleCallEntry:
    """Outputs of a class of another library (ModelOutput of transformers) as a dict: a process that has not imported
    that library could not load the program."""
    if entry.signature is None:
        return entry
    return replace(entry, signature=replace(entry.signature, out_spec=_plain(entry.signature.out_spec)))


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    children = [_plain(child) for child in spec.children()]
    if isinstance(spec.type, type) and issubclass(spec.type, dict) and spec.type.__module__ not in _BUILT_IN:
        return pytree.TreeSpec(dict, list(spec.context), children)
    return pytree.TreeSpec(spec.type, spec.context, children)


def _weights(module: fx.GraphModule, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights as the program itself computes them, one at a time."""
    named = json.loads(torch._C.PyTorchFileReader(str(path)).get_record(f"extra/{_WEIGHTS}"))
    nodes = {node.name: node for node in module.graph.nodes}
    for name, node in named.items():
        yield name, _value(module, nodes[node])


def _value(module: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return attrgetter(str(node.target))(module)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: _value(module, other))
    assert callable(node.target)
    return node.target(*args, **kwargs)
