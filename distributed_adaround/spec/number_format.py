"""One number format: from the fields that a job gives, or leaves out, to the grid of a layer, all rules checked.

The formats stand in formats.py. `quant_min` and `quant_max` narrow the range of integers. A symmetric grid has a fixed
zero point; an affine one has a zero point from the observer. Floats are symmetric and have fixed values; block formats
fix the qscheme, the group_size and the scale too.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from distributed_adaround.formats import FORMATS, SCALE_FORMATS, LayerFormat, NumberFormat, Strategy
from distributed_adaround.spec.explain import ABSENT, ContradictionError

QScheme = Literal[
    "per_tensor_symmetric",
    "per_tensor_affine",
    "per_channel_symmetric",
    "per_channel_affine",
    "per_group_symmetric",
    "per_group_affine",
]
ScaleDtype = Literal["float32", "float16", "bfloat16"]


def stale_fields(dtype: object) -> tuple[str, ...]:
    """Fields of a format that a new dtype makes void: they belong to the old one. None: there is no new one."""
    if not isinstance(dtype, str):
        return ()
    number = FORMATS.get(dtype)
    fixed = number is not None and number.block_size is not None
    return ("quant_min", "quant_max", *(("qscheme", "group_size", "scale_dtype") if fixed else ()))


def resolve(fields: Mapping[str, Any]) -> LayerFormat:
    """Checks the rules between the fields of one format. Raises ContradictionError."""
    number = FORMATS[fields["dtype"]]
    qscheme, strategy, group_size = _scheme(fields, number)
    symmetric = qscheme.endswith("symmetric")
    low, high = _code_range(fields, number)
    if number.element is not None and not symmetric:
        text = f"does not fit {fields['dtype']}, whose values lie symmetric around zero; use per_{strategy}_symmetric"
        raise ContradictionError(("qscheme",), qscheme, text)
    if not symmetric and low == -high:
        raise ContradictionError(
            ("qscheme",),
            qscheme,
            f"contradicts the range {low} to {high}, which is symmetric around zero; use {qscheme[:-6]}symmetric, or "
            "remove quant_min and quant_max",
        )
    layer_format = LayerFormat(
        number=number,
        quant_min=low,
        quant_max=high,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        scale=SCALE_FORMATS[_scale_name(fields, number)],
        observer=fields["observer"],
        percentile=fields["percentile"],
    )
    if symmetric and number.element is None:
        _check_room_around_zero(layer_format)
    return layer_format


def _scheme(fields: Mapping[str, Any], number: NumberFormat) -> tuple[str, Strategy, int | None]:
    """(qscheme, its strategy, group_size), where not given those of the dtype. Raises ContradictionError."""
    dtype, qscheme, group_size = fields["dtype"], fields["qscheme"], fields["group_size"]
    if number.block_size is not None:
        for name, own in (("qscheme", "per_group_symmetric"), ("group_size", number.block_size)):
            if fields[name] not in (None, own):
                rule = f"contradicts dtype {dtype}, which implies {own}; remove it or use another dtype"
                raise ContradictionError((name,), fields[name], rule)
        return "per_group_symmetric", "group", number.block_size
    qscheme = qscheme or "per_channel_symmetric"
    strategy = cast(Strategy, qscheme.split("_")[1])
    if strategy == "group" and group_size is None:
        raise ContradictionError(
            ("group_size",), ABSENT, f"is missing, but qscheme {qscheme} needs it; give it, for instance 128"
        )
    if strategy != "group" and group_size is not None:
        raise ContradictionError(
            ("group_size",), group_size, f"does not fit qscheme {qscheme}; use a per_group qscheme or remove group_size"
        )
    return qscheme, strategy, group_size


def _scale_name(fields: Mapping[str, Any], number: NumberFormat) -> str:
    given = fields["scale_dtype"]
    if number.scale != "float32" and given is not None:
        text = f"contradicts dtype {fields['dtype']}, whose scales are {number.scale}; remove it or use another dtype"
        raise ContradictionError(("scale_dtype",), given, text)
    return str(given or number.scale)


def _code_range(fields: Mapping[str, Any], number: NumberFormat) -> tuple[int, int]:
    """(quant_min, quant_max), each the dtype's own where it is not given. Raises ContradictionError."""
    lowest, highest = number.code_range
    given = {name: fields[name] for name in ("quant_min", "quant_max") if fields[name] is not None}
    for name, value in given.items():
        if number.element is not None:
            text = f"does not apply to {fields['dtype']}, whose values are fixed; remove it or use an integer dtype"
            raise ContradictionError((name,), value, text)
        if not lowest <= value <= highest:
            raise ContradictionError(
                (name,),
                value,
                f"is outside the range of {fields['dtype']}, {lowest} to {highest}; use a value inside or remove it",
            )
    low, high = given.get("quant_min", lowest), given.get("quant_max", highest)
    if low >= high:
        name = next(iter(given))
        raise ContradictionError(
            (name,), given[name], f"leaves no range: quant_min {low} must be below quant_max {high}; widen the range"
        )
    return low, high


def _check_room_around_zero(layer_format: LayerFormat) -> None:
    low, high, zero_point = layer_format.quant_min, layer_format.quant_max, layer_format.zero_point
    if low < zero_point < high:
        return
    name = "quant_max" if zero_point >= high else "quant_min"
    qscheme = layer_format.qscheme
    raise ContradictionError(
        (name,),
        low if name == "quant_min" else high,
        f"leaves no room around zero: with {qscheme} the zero point {zero_point} must lie strictly between quant_min "
        f"{low} and quant_max {high}; widen the range or use {qscheme[:-9]}affine",
    )
