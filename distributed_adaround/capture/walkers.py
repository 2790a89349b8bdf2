"""Which walker a model gets: through its exported graph where that does for all data of all ranks, else by hooks."""

import logging

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.binding import bind
from distributed_adaround.capture.calls import count_calls, together
from distributed_adaround.capture.exported import export_as_it_is, export_model, quiet_torch, straight_line
from distributed_adaround.capture.forward import real_tensors, run_once
from distributed_adaround.capture.graph import capture
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.layer_modules import find_layers
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Walker
from distributed_adaround.data.microbatches import Kind, Microbatches, ModelInputs
from distributed_adaround.errors import InputError, first_line, shorten
from distributed_adaround.runtime.comm import Comm, phase

logger = logging.getLogger(__name__)

_REASON_LENGTH = 160


def make_walker(
    model: nn.Module | ExportedProgram,
    microbatches: Microbatches,
    store: ActivationStore,
    comm: Comm,
    embeddings: bool = False,
) -> Walker:
    """Walk through the exported graph; by hooks and replay where the model cannot be exported, or no single graph does
    for all kinds of microbatches, with a note. A collective. store: its device is that of the walk. embeddings: tables
    of a graph are sites too.

    Raises InputError for a program that cannot be walked, or a model whose forward fails.
    """
    if isinstance(model, ExportedProgram):
        with phase(comm, "capture the model"):
            return GraphWalker(capture(straight_line(model), embeddings), store)
    logger.info("looking at the shapes of the calibration data")
    with phase(comm, "read the calibration data"):
        own = microbatches.kinds()
    first_of = _first_of_kinds(comm.all_gather_object(own))
    example = _example(first_of, microbatches, comm)
    logger.info("exporting the model as a graph")
    with phase(comm, "capture the model"):
        try:
            # Only what torch and the model do is tried here: an error of our own in reading the graph is not hidden.
            graph = _graph(model, example.to(_device_of(model)), first_of)
            reason = None
            logger.info("checking the graph on each shape of the data: %d", len(first_of))
            for index in first_of.values():
                if index in microbatches.owned:
                    _check_same_output(model, graph, microbatches.load(index), index)
        except Exception as error:
            # torch.export documents no closed set of errors; whatever stops it, hooks still work.
            reason = shorten(first_line(error), _REASON_LENGTH)
            logger.debug("torch.export failed: %s", reason)
    # One graph for all ranks, or none.
    reason = next((each for each in comm.all_gather_object(reason) if each is not None), None)
    with phase(comm, "capture the model"):
        if reason is None:
            return GraphWalker(capture(graph, embeddings), store)
        module = model.to(store.device).eval()
        layers, _ = find_layers(module)
        logger.info("finding the layers by hooks")
        calls = count_calls(module, layers, microbatches, store.device)
    return ReplayWalker(module, together(comm.all_gather_object(calls)), reason, store)


def _graph(model: nn.Module, example: ModelInputs, first_of: dict[Kind, int]) -> GraphModule:
    """One for batches of any size; where there is none, and all microbatches are alike, one for just these."""
    try:
        return straight_line(export_model(model, example, varying=_varying(first_of)))
    except InputError:
        raise  # it took the batch for a constant, and may have a node for each sample
    except Exception:
        if len(first_of) > 1:
            raise
        return straight_line(export_as_it_is(model, example))


def _first_of_kinds(own: list[dict[Kind, int]]) -> dict[Kind, int]:
    """Every kind of microbatch there is, and the first one of it, from those of all ranks."""
    first: dict[Kind, int] = {}
    for kinds in own:
        for kind, index in kinds.items():
            first[kind] = min(index, first.get(kind, index))
    return dict(sorted(first.items(), key=lambda item: item[1]))


def _example(first_of: dict[Kind, int], microbatches: Microbatches, comm: Comm) -> ModelInputs:
    """The microbatch to export with, the same on all ranks: of a kind with as few sizes of 1 as there are, which
    torch.export would bake in, and as many different ones, since it may take equal sizes for one."""

    def rank(kind: Kind) -> tuple[int, int, int]:
        sizes = [size for _, shape in kind if isinstance(shape, tuple) for size in shape[1:]]
        return sum(size == 1 for size in sizes), -len(set(sizes)), first_of[kind]

    index = first_of[min(first_of, key=rank)]
    with phase(comm, "read the calibration data"):
        mine = microbatches.load(index) if index in microbatches.owned else None
    found: ModelInputs = next(inputs for inputs in comm.all_gather_object(mine) if inputs is not None)
    return found


def _varying(kinds: dict[Kind, int]) -> bool:
    """Whether microbatches differ in more than the number of samples."""
    without_batch = {tuple((name, v[1:] if isinstance(v, tuple) else v) for name, v in kind) for kind in kinds}
    return len(without_batch) > 1


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_same_output(model: nn.Module, graph: GraphModule, inputs: ModelInputs, index: int) -> None:
    """Raises InputError when the graph does not take such inputs, or computes something else from them."""
    bind(graph, inputs, index)
    device = _device_of(model)
    with quiet_torch():
        # Other seeds: random numbers in a forward would differ between the streams of a walk.
        ours, theirs = (real_tensors(run_once(m, inputs, device, seed)) for seed, m in enumerate((graph, model)))
    # The tolerance covers another order of sums. Rows that are all padding may be NaN.
    if len(ours) != len(theirs) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise InputError(f"its exported graph does not compute what the model computes (microbatch {index})")
