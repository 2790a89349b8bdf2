"""Which modules of a model are layers whose weight can be rounded, and why every other parameter stays in float."""

from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from distributed_adaround.capture.sites import FloatParameter, Site, unusable_values
from distributed_adaround.numerics.layers import LayerGeometry, padding_pairs

_CONV_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYER_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, *_CONV_CLASSES)


def find_layers(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers by module name, and the names of layer-like modules that cannot be used, with the reason.

    A subclass counts when it leaves `forward` alone. A weight that other code also reads, or that is computed from
    other tensors, cannot be replaced by a rounded one.
    """
    owners = _owners(module)
    layers: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for name, candidate in module.named_modules():
        base = next((cls for cls in _LAYER_CLASSES if isinstance(candidate, cls)), None)
        if base is None:
            continue
        if (reason := _unusable(candidate, base)) is not None:
            refused[name] = reason
        else:
            layers[name] = candidate
    for name, layer in layers.items():
        weight: Any = layer.weight
        strangers = [
            owner or type(module).__name__
            for owner, tensor in owners[_storage(weight)]
            if (owner not in layers or tensor is not weight) and _overlap(tensor, weight)
        ]
        if strangers:
            refused[name] = f"shared with {', '.join(dict.fromkeys(strangers))}"
    return {name: layer for name, layer in layers.items() if name not in refused}, refused


def float_reasons(
    module: nn.Module, sites: tuple[Site, ...], layers: dict[str, nn.Module], refused: dict[str, str]
) -> tuple[FloatParameter, ...]:
    """Every parameter name that is not the weight of a site, with the reason."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    taken = {id(parameters[site.weight_name]) for site in sites}
    return tuple(
        FloatParameter(name, tuple(parameter.shape), _reason(module, name, layers, refused))
        for name, parameter in parameters.items()
        if id(parameter) not in taken
    )


def geometry_of(layer: nn.Module) -> LayerGeometry:
    """Shape and strides of a layer; padding other than zeros is left to the caller (see `replay_walk.py`)."""
    weight: Any = layer.weight
    shape = tuple(weight.shape)
    if not isinstance(layer, _ConvNd):
        return LayerGeometry(shape)
    padding = layer.padding if layer.padding_mode == "zeros" else "valid"
    return LayerGeometry(
        weight_shape=shape,
        stride=tuple(layer.stride),
        padding=padding_pairs(padding, shape[2:], layer.dilation),
        dilation=tuple(layer.dilation),
        output_padding=tuple(layer.output_padding),
        groups=layer.groups,
        transposed=layer.transposed,
    )


def _unusable(layer: nn.Module, base: type[nn.Module]) -> str | None:
    kind = type(layer).__name__
    for method in ("forward", "_conv_forward"):
        own: Any = getattr(type(layer), method, None)
        if method in vars(layer) or own is not getattr(base, method, None):
            return f"{kind} computes its output in its own way, not as torch's {base.__name__}"
    weight = layer._parameters.get("weight")
    if weight is None or "bias" not in layer._parameters:
        return f"the weight or bias of this {kind} is computed from other tensors"
    return unusable_values(weight)


def _owners(module: nn.Module) -> dict[int, list[tuple[str, Tensor]]]:
    """Modules (by name) and their tensors, parameters and buffers, by the storage that they lie in."""
    owners = defaultdict(list)
    for name, owner in module.named_modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None:
                owners[_storage(tensor)].append((name, tensor))
    return owners


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have bytes in common, as the whole range from first to last element."""
    return a.data_ptr() < b.data_ptr() + _extent(b) and b.data_ptr() < a.data_ptr() + _extent(a)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the end of the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _reason(module: nn.Module, name: str, layers: dict[str, nn.Module], refused: dict[str, str]) -> str:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    # A module registered twice is known to `layers` by its first name.
    known = next((other for other, layer in layers.items() if layer is owner), path)
    layer_path = f".{path}".split(".parametrizations")[0].removeprefix(".")
    if layer_path in refused and leaf != "bias":
        return refused[layer_path]
    parent = module.get_submodule(path.rpartition(".")[0])
    if leaf.endswith("weight") and any(isinstance(each, nn.MultiheadAttention) for each in (owner, parent)):
        return "torch's MultiheadAttention computes with it where hooks do not reach"
    if leaf.startswith(("weight_ih", "weight_hh", "weight_hr")) and isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return f"torch's {type(owner).__name__} computes with it where hooks do not reach"
    if known in layers and leaf == "weight":
        return refused.get(known, "the layer never runs as a module in the forward pass")
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return f"not the weight of a Linear or convolution layer ({type(owner).__name__})"
