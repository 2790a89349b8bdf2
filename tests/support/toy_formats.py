"""Formats of one layer, as a job would resolve them, and in combinations that no job can ask for."""

from __future__ import annotations

from typing import Any

from distributed_adaround.formats import FORMATS, SCALE_FORMATS, LayerFormat

FLOAT32 = SCALE_FORMATS["float32"]


def layer_format(dtype: str = "int4", **changes: Any) -> LayerFormat:
    """Symmetric, per channel, minmax, with the scales of the dtype; changes: fields of LayerFormat, scale by name."""
    number = FORMATS[dtype]
    low, high = number.code_range
    fields: dict[str, Any] = {
        "quant_min": low,
        "quant_max": high,
        "symmetric": True,
        "strategy": "channel" if number.block_size is None else "group",
        "group_size": number.block_size,
        "scale": number.scale,
        "observer": "minmax",
        "percentile": 99.9,
    } | changes
    if fields["strategy"] != "group":
        fields["group_size"] = None
    return LayerFormat(number, **fields | {"scale": SCALE_FORMATS[fields["scale"]]})
