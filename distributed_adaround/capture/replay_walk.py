"""Capture by hooks and repeated forwards, for models that torch.export cannot turn into a graph.

For every site the model runs twice over the rank's microbatches, each time only as far as the site: once with float
weights (x and the target), once with the weights quantized so far (x̂). This costs O(layers) forwards per layer, where
the walk through a graph costs one, and one more copy of the solved layers' weights, on the host.

What follows a layer cannot be seen by hooks, so sites have no batch norm and no activation.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.layer_modules import find_layers, float_reasons, geometry_of
from distributed_adaround.capture.sites import Batch, Site, Unit, counting_rows
from distributed_adaround.data.microbatches import Microbatches, ModelInputs
from distributed_adaround.errors import InputError, first_line

logger = logging.getLogger(__name__)


class _ReachedError(BaseException):
    """Ends a forward early. Not an Exception, so that a model's own `except Exception` lets it pass."""


class ReplayWalker:
    """Walker over a plain module; raises InputError where its forward fails.

    The module is moved to the device, put in eval mode and used in place: after the last commit it holds the quantized
    weights. Its buffers are put back after every forward. Random numbers drawn in forward depend on the microbatch
    only, so both streams see the same ones.
    """

    def __init__(self, module: nn.Module, example: ModelInputs, reason: str, store: ActivationStore) -> None:
        """Find the layers in the order of their first calls, by a forward of `example`. reason: why no graph."""
        self._device, self._store = store.device, store
        self._module = module.to(self._device).eval()
        self._microbatches: Microbatches | None = None
        self._tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        # Weights and corrected biases of committed sites that the module does not hold now: float between the passes.
        self._other_weights: dict[str, Tensor] = {}
        instead = "layers are captured by hooks, which runs the model again for every layer"
        self.notes = [f"could not be exported: {reason}; {instead}"]
        layers, refused = find_layers(self._module)
        num_calls, with_output_size = self._count_calls(layers, example)
        sites = _sites(self._module, layers, num_calls, refused, with_output_size)
        self.units = tuple(Unit((site,)) for site in sites)
        self.float_parameters = float_reasons(self._module, sites, layers, refused)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def start(self, microbatches: Microbatches) -> None:
        self._microbatches = microbatches

    def reach(self, unit: Unit) -> list[Batch]:
        """What the site's first call sees in each microbatch.

        A microbatch whose float forward does not run the layer is left out; where only the quantized forward misses
        it, or brings another number of rows, x stands in for x̂. Both are noted.
        """
        site = unit.site
        with self._float_weights():
            floats = self._run_up_to(site, with_output=True)
        quantized = self._run_up_to(site, with_output=False)
        batches, strayed = [], 0
        for (index, inputs, found), (_, _, others) in zip(floats, quantized, strict=True):
            if len(found) < 2:
                continue
            (x, y), x_hat = found, others[0] if others else None
            if x_hat is None or x_hat.shape != x.shape:
                x_hat, strayed = x, strayed + 1
            batches.append(Batch(index, x_hat, x, y, inputs.mask, inputs.size))
        self._note_gaps(site, len(floats) - len(batches), strayed, len(floats))
        return batches

    @torch.no_grad()
    def commit(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name not in self._other_weights:
                self._other_weights[name] = self._tensors[name].to("cpu", copy=True)
            self._tensors[name].copy_(value)

    def finish(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Both models in full. A microbatch whose outputs differ in number or shape is left out and noted."""
        assert self._microbatches is not None, "start() comes before finish()"
        with self._float_weights():
            floats = {index: self._outputs(index, inputs) for index, inputs in self._microbatches}
        differing = 0
        for index, inputs in self._microbatches:
            outputs = floats.pop(index), self._outputs(index, inputs)
            before, after = ([tensor.shape for tensor in tensors] for tensors in outputs)
            if before != after:
                differing += 1
                continue
            for first, second in zip(*outputs, strict=True):
                yield index, counting_rows(first, inputs.mask), counting_rows(second, inputs.mask)
        if differing:
            self.notes.append(f"the two models' outputs differ in shape in {differing} of this rank's microbatches")

    def _outputs(self, index: int, inputs: ModelInputs) -> list[Tensor]:
        """The model's outputs that are tensors of real numbers."""
        leaves = tree_leaves(self._forward(inputs, f"microbatch {index}", seed=index))
        real = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return [self._store.keep(tensor.clone()) for tensor in real]

    def _count_calls(self, layers: dict[str, nn.Module], example: ModelInputs) -> tuple[dict[str, int], set[str]]:
        """One forward: number of calls by layer, in order of the first call, and layers given an output_size."""
        num_calls: dict[str, int] = {}
        with_output_size: set[str] = set()

        def count(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            num_calls[name] = num_calls.get(name, 0) + 1
            if (args[1] if len(args) > 1 else kwargs.get("output_size")) is not None:
                with_output_size.add(name)

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(partial(count, name), with_kwargs=True)
                hooks.enter_context(hook)
            self._forward(example, "the example microbatch", seed=0)
        return num_calls, with_output_size

    def _run_up_to(self, site: Site, *, with_output: bool) -> list[tuple[int, ModelInputs, list[Tensor]]]:
        """Each owned microbatch, with what the site's first call takes (and gives) in it; nothing: it does not run."""
        layer = self._module.get_submodule(site.name)
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            # A copy: the model may write into the tensor, or into a buffer of its own that this is a view of.
            found.append(self._store.keep(_as_batch(site, tensor).clone(memory_format=torch.contiguous_format)))

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(_explicitly_padded(layer, args[0] if args else kwargs["input"]))
            if not with_output:
                raise _ReachedError

        def after(_: nn.Module, __: object, output: Tensor) -> None:
            keep(output)
            raise _ReachedError

        reached = []
        assert self._microbatches is not None, "start() comes before reach()"
        first_hook = layer.register_forward_pre_hook(before, with_kwargs=True)
        with first_hook, layer.register_forward_hook(after, prepend=True):
            for index, inputs in self._microbatches:
                found = []
                self._forward(inputs, f"microbatch {index}", seed=index)
                reached.append((index, inputs, found))
        return reached

    def _forward(self, inputs: ModelInputs, what: str, seed: int) -> Any:
        """The model's output; None when a hook ended the forward."""
        args, kwargs = tree_map_only(
            Tensor, lambda t: t.detach().to(self._device, copy=True), (inputs.args, inputs.kwargs)
        )
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _without_fast_path(), _unchanged_buffers(self._module):
            torch.manual_seed(seed)
            try:
                return self._module(*args, **kwargs)
            except _ReachedError:
                return None
            except Exception as error:
                raise InputError(f"the model's forward failed on {what}: {first_line(error)}") from error

    @contextmanager
    def _float_weights(self) -> Iterator[None]:
        """The block runs with float weights in all layers."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Swap the committed layers' weights between module and host; twice is as before."""
        for name, other in self._other_weights.items():
            self._other_weights[name] = self._tensors[name].to("cpu", copy=True)
            self._tensors[name].copy_(other)

    def _note_gaps(self, site: Site, missed: int, strayed: int, total: int) -> None:
        if missed:
            self.notes.append(f"{site.name}: does not run in {missed} of this rank's {total} microbatches, left out")
        if strayed:
            where = f"{strayed} of this rank's {total} microbatches; there the float input is used"
            self.notes.append(f"{site.name}: the quantized model takes another path than the float model in {where}")
        if missed or strayed:
            logger.info("%s", self.notes[-1])


def _sites(
    module: nn.Module,
    layers: dict[str, nn.Module],
    num_calls: dict[str, int],
    refused: dict[str, str],
    with_output_size: set[str],
) -> tuple[Site, ...]:
    """Sites in order of their first call. Adds to `refused` the layers that cannot be one, with the reason."""
    biases = Counter(id(layer.bias) for layer in layers.values() if layer.bias is not None)
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        users.setdefault(id(layer.weight), []).append(name)
    sites: dict[int, Site] = {}
    for name in num_calls:
        layer = layers[name]
        group = users[id(layer.weight)]
        sized = [other for other in group if other in with_output_size]
        if sized:
            refused[name] = f"{sized[0]} is called with output_size, so its output padding may differ between calls"
        elif id(layer.weight) not in sites:
            prefix = f"{name}." if name else ""
            sites[id(layer.weight)] = Site(
                name=name,
                module_class=type(layer).__name__,
                weight_name=f"{prefix}weight",
                bias_name=f"{prefix}bias" if layer.bias is not None else None,
                geometry=geometry_of(layer),
                num_calls=sum(num_calls.get(other, 0) for other in group),
                # A bias shifts these outputs and nothing else where no other layer has it too.
                shift_name=f"{prefix}bias" if biases[id(layer.bias)] == 1 and num_calls[name] == 1 else None,
            )
    return tuple(sites.values())


def _explicitly_padded(layer: nn.Module, x: Tensor) -> Tensor:
    """Circular, reflected and replicated padding becomes part of the input; the geometry then has none."""
    if not isinstance(layer, _ConvNd) or layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _as_batch(site: Site, x: Tensor) -> Tensor:
    """Convolutions also take one sample without the batch dimension."""
    dims = site.geometry.num_spatial_dims
    return x.unsqueeze(0) if dims and x.ndim == dims + 1 else x


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's fused transformer layers run without calling the layers inside them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers that the block changes or replaces (caches, counters) are put back."""
    before = [
        (owner, key, buffer, buffer.clone(), buffer._version)
        for owner in module.modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, key, buffer, values, version in before:
            if buffer._version != version:
                buffer.copy_(values)
            owner._buffers[key] = buffer
