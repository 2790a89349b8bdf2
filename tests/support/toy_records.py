"""Records of layers, as a job would leave them."""

import torch

from distributed_adaround.solve.record import LayerFigures, LayerRecord


def figures_of(name: str, seconds: float = 1.5) -> LayerFigures:
    return LayerFigures(
        name, "Linear", (4, 6), "int4 per_channel_affine", "gram", 0.5, 0.25, 0.25, 0.1, 0.0, False, seconds
    )


def record(
    name: str = "layer",
    shape: tuple[int, ...] = (4, 6),
    scale_shape: tuple[int, ...] = (4,),
    seed: int = 0,
    groups: int = 1,
    transposed: bool = False,
    signed: bool = True,
    seconds: float = 1.5,
) -> LayerRecord:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 7) if signed else (0, 15)
    dtype = torch.int8 if signed else torch.uint8
    zero_point = torch.randint(low, high + 1, scale_shape, generator=generator, dtype=torch.int32)
    return LayerRecord(
        name=name,
        codes=torch.randint(low, high + 1, shape, generator=generator).to(dtype),
        scale=torch.rand(scale_shape, generator=generator) + 0.01,
        zero_point=zero_point,
        format={
            "dtype": "int4" if signed else "uint4",
            "qscheme": "per_channel_affine",
            "group_size": None,
            "quant_min": low,
            "quant_max": high,
            "element_format": None,
            "scale_format": "float32",
            "tensor_scale": None,
            "groups": groups,
            "transposed": transposed,
        },
        figures=figures_of(name, seconds),
    )
