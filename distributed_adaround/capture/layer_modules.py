"""Which modules of a model are layers whose weight can be rounded, and why every other parameter stays in float."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from distributed_adaround.capture.sites import FloatParameter, Site
from distributed_adaround.numerics.layers import LayerGeometry

_LAYER_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


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
        reason = _unusable(candidate, base)
        if reason is None:
            layers[name] = candidate
        else:
            refused[name] = reason
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
    """Shape and strides of a layer; padding other than zeros is left to the caller (see `replay.py`)."""
    weight: Any = layer.weight
    shape = tuple(weight.shape)
    if not isinstance(layer, _ConvNd):
        return LayerGeometry(shape)
    return LayerGeometry(
        weight_shape=shape,
        stride=tuple(layer.stride),
        padding=_padding(layer),
        dilation=tuple(layer.dilation),
        output_padding=tuple(layer.output_padding) if isinstance(layer, _ConvTransposeNd) else (0,) * (len(shape) - 2),
        groups=layer.groups,
        transposed=isinstance(layer, _ConvTransposeNd),
    )


def _padding(layer: _ConvNd) -> tuple[tuple[int, int], ...]:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    if isinstance(layer.padding, str):
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((amount // 2, amount - amount // 2) for amount in total)
    return tuple((amount, amount) for amount in layer.padding)


def _unusable(layer: nn.Module, base: type[nn.Module]) -> str | None:
    kind = type(layer).__name__
    for method in ("forward", "_conv_forward"):
        own: Any = getattr(type(layer), method, None)
        if method in vars(layer) or own is not getattr(base, method, None):
            return f"{kind} computes its output in its own way, not as torch's {base.__name__}"
    weight = layer._parameters.get("weight")
    if weight is None or "bias" not in layer._parameters:
        return f"the weight or bias of this {kind} is computed from other tensors"
    if not weight.is_floating_point():
        return f"its dtype is {weight.dtype}, not a real floating-point type"
    return None if weight.numel() else "has no elements"


def _owners(module: nn.Module) -> dict[int, list[tuple[str, Tensor]]]:
    """Modules (by name) and their tensors, parameters and buffers, by the storage that they lie in."""
    owners: dict[int, list[tuple[str, Tensor]]] = {}
    for name, owner in module.named_modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None:
                owners.setdefault(_storage(tensor), []).append((name, tensor))
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
    if known in layers and leaf == "weight":
        return refused.get(known, "the layer never runs as a module in the forward pass")
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return f"not the weight of a Linear or convolution layer ({type(owner).__name__})"
