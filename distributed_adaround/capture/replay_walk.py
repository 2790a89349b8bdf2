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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.calls import Calls, forward_failed
from distributed_adaround.capture.decisions import Decisions, Tape
from distributed_adaround.capture.forward import real_tensors, run_once
from distributed_adaround.capture.layer_modules import find_layers, float_reasons, geometry_of
from distributed_adaround.capture.masks import mask_by_shape
from distributed_adaround.capture.sites import Batch, Site, Unit, counting_rows
from distributed_adaround.data.microbatches import Microbatches, ModelInputs

logger = logging.getLogger(__name__)


class _ReachedError(BaseException):
    """Ends a forward early. Not an Exception, so that a model's own `except Exception` lets it pass."""


class ReplayWalker:
    """Walker over a plain module; raises InputError where its forward fails.

    The module is moved to the device, put in eval mode and used in place: after the last commit it holds the quantized
    weights. Its buffers are put back after every forward. Random numbers drawn in forward depend on the microbatch
    only, so both streams see the same ones.
    """

    def __init__(self, module: nn.Module, calls: Calls, reason: str, store: ActivationStore) -> None:
        """calls: of all microbatches of all ranks; they say which layers there are. reason: why no graph."""
        self._device, self._store = store.device, store
        self._module = module.to(self._device).eval()
        self._microbatches: Microbatches | None = None
        self._tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        # Weights and corrected biases of committed sites that the module does not hold now: float between the passes.
        self._other_weights: dict[str, Tensor] = {}
        instead = "layers are captured by hooks, which runs the model again for every layer"
        self.rows: Mapping[str, float] = {}
        self.notes = [f"could not be exported: {reason}; {instead}"]
        layers, refused = find_layers(self._module)
        self._calls = calls
        sites, self._users = _sites(layers, calls, refused)
        self.units = tuple(Unit((site,)) for site in sites)
        self.float_parameters = float_reasons(self._module, sites, layers, refused)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def start(self, microbatches: Microbatches) -> None:
        self._microbatches = microbatches

    def reach(self, unit: Unit) -> list[Batch]:
        """What the site sees in each call of each microbatch.

        A microbatch that does not run the layer gives no batch. Where the quantized forward misses a call, or brings
        another number of rows, x stands in for x̂. Both are noted.
        """
        site = unit.site
        tapes: dict[int, Tape] = {}
        with self._float_weights():
            floats = self._run_up_to(site, tapes, is_float=True)
        quantized = self._run_up_to(site, tapes, is_float=False)
        batches, strayed, missed = [], 0, 0
        for (index, inputs, found), (_, _, others) in zip(floats, quantized, strict=True):
            missed += not found
            for call, (x, y) in enumerate(zip(found[::2], found[1::2], strict=True)):
                x_hat = others[call] if call < len(others) and others[call].shape == x.shape else x
                strayed += x_hat is x
                place = index * site.num_calls + call
                batches.append(Batch(place, x_hat, x, y, self._mask(inputs), inputs.size))
        self._note_gaps(site, missed, strayed, len(floats))
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
        tapes: dict[int, Tape] = {}
        with self._float_weights():
            floats = {index: self._outputs(index, inputs, tapes, False) for index, inputs in self._microbatches}
        differing = 0
        for index, inputs in self._microbatches:
            outputs = floats.pop(index), self._outputs(index, inputs, tapes, True)
            before, after = ([tensor.shape for tensor in tensors] for tensors in outputs)
            if before != after:
                differing += 1
                continue
            for first, second in zip(*outputs, strict=True):
                mask = self._mask(inputs)
                yield index, counting_rows(first, mask), counting_rows(second, mask)
        if differing:
            self.notes.append(f"the two models' outputs differ in shape in {differing} of this rank's microbatches")

    def _mask(self, inputs: ModelInputs) -> Tensor | None:
        """The mask, where it can only speak of one input; which rows come from which input is not to be seen here."""
        mask = mask_by_shape(inputs)
        note = "the attention mask is not used: more than one input has its shape, and hooks cannot tell which it is of"
        if mask is not inputs.mask and note not in self.notes:
            self.notes.append(note)
        return mask

    def _outputs(self, index: int, inputs: ModelInputs, tapes: dict[int, Tape], replay: bool) -> list[Tensor]:
        """The model's outputs that are tensors of real numbers."""
        output = self._forward(index, inputs, tapes, replay)
        return [self._store.keep(tensor.clone()) for tensor in real_tensors(output)]

    def _run_up_to(
        self, site: Site, tapes: dict[int, Tape], *, is_float: bool
    ) -> list[tuple[int, ModelInputs, list[Tensor]]]:
        """Each owned microbatch, with what all calls of the site take (in the float stream: and give) in it."""
        own_bias: Any = self._module.get_submodule(site.name).bias
        found: list[Tensor] = []
        ahead = 0

        def keep(tensor: Tensor) -> None:
            # A copy: the model may write into the tensor, or into a buffer of its own that this is a view of.
            found.append(self._store.keep(_as_batch(site, tensor).clone(memory_format=torch.contiguous_format)))

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal ahead
            keep(_explicitly_padded(layer, args[0] if args else kwargs["input"]))
            ahead -= 0 if is_float else 1
            if not ahead:
                raise _ReachedError

        def after(layer: Any, _: object, output: Tensor) -> None:
            nonlocal ahead
            keep(_with_bias(site, output, layer.bias, own_bias))
            ahead -= 1
            if not ahead:
                raise _ReachedError

        reached = []
        assert self._microbatches is not None, "start() comes before reach()"
        with ExitStack() as hooks:
            for name in self._users[site.name]:
                layer = self._module.get_submodule(name)
                hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
                if is_float:
                    hooks.enter_context(layer.register_forward_hook(after, prepend=True))
            for index, inputs in self._microbatches:
                found, ahead = [], self._calls.of(index, self._users[site.name])
                if ahead:
                    self._forward(index, inputs, tapes, replay=not is_float)
                reached.append((index, inputs, found))
        return reached

    def _forward(self, index: int, inputs: ModelInputs, tapes: dict[int, Tape], replay: bool) -> Any:
        """The model's output; None when a hook ended the forward. tapes: decisions of the float stream."""
        try:
            with Decisions(tapes.setdefault(index, []), replay=replay, keep=self._store.keep):
                return run_once(self._module, inputs, self._device, seed=index)
        except _ReachedError:
            return None
        except Exception as error:
            raise forward_failed(index, error, inputs.hint) from error

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
            where = f"{strayed} calls in this rank's {total} microbatches; there the float input is used"
            self.notes.append(f"{site.name}: the quantized model takes another path than the float model in {where}")
        if missed or strayed:
            logger.info("%s", self.notes[-1])


def _sites(
    layers: dict[str, nn.Module], calls: Calls, refused: dict[str, str]
) -> tuple[tuple[Site, ...], dict[str, list[str]]]:
    """Sites in order of their first call, and the names of the layers that run with the weight of each. Adds to
    `refused` the layers that cannot be one, with the reason."""
    biases = Counter(id(layer.bias) for layer in layers.values() if layer.bias is not None)
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        sharing.setdefault(id(layer.weight), []).append(name)
    sites: dict[int, Site] = {}
    users: dict[str, list[str]] = {}
    for name in calls.order:
        layer = layers[name]
        group = sharing[id(layer.weight)]
        geometry, num_calls = geometry_of(layer), calls.most(group)
        sized = [other for other in group if other in calls.with_output_size]
        if sized:
            refused[name] = f"{sized[0]} is called with output_size, so its output padding may differ between calls"
        elif any(geometry_of(layers[other]) != geometry for other in group):
            refused[name] = f"used by layers of different kinds: {', '.join(group)}"
        elif id(layer.weight) not in sites:
            prefix = f"{name}." if name else ""
            users[name] = group
            sites[id(layer.weight)] = Site(
                name=name,
                module_class=type(layer).__name__,
                weight_name=f"{prefix}weight",
                bias_name=f"{prefix}bias" if layer.bias is not None else None,
                geometry=geometry,
                num_calls=num_calls,
                # A bias shifts these outputs and nothing else where no other layer has it too.
                shift_name=f"{prefix}bias" if biases[id(layer.bias)] == 1 and num_calls == 1 else None,
            )
    return tuple(sites.values()), users


def _with_bias(site: Site, output: Tensor, bias: Tensor | None, wanted: Tensor | None) -> Tensor:
    """The output as it were with the site's own bias: layers that share a weight may have biases of their own."""
    if bias is wanted:
        return output
    shift = (0 if wanted is None else wanted) - (0 if bias is None else bias)
    assert isinstance(shift, Tensor)
    return output + shift.reshape(-1, *[1] * site.geometry.num_spatial_dims)


def _explicitly_padded(layer: nn.Module, x: Tensor) -> Tensor:
    """Circular, reflected and replicated padding becomes part of the input; the geometry then has none."""
    if not isinstance(layer, _ConvNd) or layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _as_batch(site: Site, x: Tensor) -> Tensor:
    """Convolutions also take one sample without the batch dimension."""
    dims = site.geometry.num_spatial_dims
    return x.unsqueeze(0) if dims and x.ndim == dims + 1 else x
