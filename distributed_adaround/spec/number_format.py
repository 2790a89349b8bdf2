"""One number format: from the fields that a job gives, or leaves out, to the grid of a layer, all rules checked.

The formats stand in formats.py. `quant_min` and `quant_max` narrow the range of integers. A symmetric grid has a fixed
zero point, an affine one takes its own from the observer. Floats are symmetric and have fixed values; block formats fix
the qscheme, the group_size and the scale too.
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
    fixed = dtype in FORMATS and FORMATS[dtype].block_size is not None
    return ("quant_min", "quant_max", *(("qscheme", "group_size", "scale_dtype") if fixed else ()))


def resolve(fields: Mapping[str, Any]) -> LayerFormat:
    """Checks the rules between the fields of one format. Raises ContradictionError."""
    dtype = fields["dtype"]
    number = FORMATS[dtype]
    qscheme, group_size = _scheme(fields, number)
    _, strategy, kind = qscheme.split("_")
    symmetric = kind == "symmetric"
    low, high = _code_range(fields, number)
    if number.element is not None and not symmetric:
        text = f"does not fit {dtype}, whose values lie symmetric around zero; use per_{strategy}_symmetric"
        raise ContradictionError(("qscheme",), qscheme, text)
    if not symmetric and low == -high:
        text = (
            f"contradicts the range {low} to {high}, which is symmetric around zero; use per_{strategy}_symmetric, or "
            "remove quant_min and quant_max"
        )
        raise ContradictionError(("qscheme",), qscheme, text)
    if number.scale != "float32" and fields["scale_dtype"] is not None:
        text = f"contradicts dtype {dtype}, whose scales are {number.scale}; remove it or use another dtype"
        raise ContradictionError(("scale_dtype",), fields["scale_dtype"], text)
    found = LayerFormat(
        number=number,
        quant_min=low,
        quant_max=high,
        symmetric=symmetric,
        strategy=cast(Strategy, strategy),
        group_size=group_size,
        scale=SCALE_FORMATS[fields["scale_dtype"] or number.scale],
        observer=fields["observer"],
        percentile=fields["percentile"],
    )
    if symmetric and number.element is None and not low < found.zero_point < high:
        name, value = ("quant_max", high) if found.zero_point >= high else ("quant_min", low)
        text = (
            f"leaves no room around zero: with {qscheme} the zero point {found.zero_point} must lie strictly between "
            f"quant_min {low} and quant_max {high}; widen the range or use per_{strategy}_affine"
        )
        raise ContradictionError((name,), value, text)
    return found


def _scheme(fields: Mapping[str, Any], number: NumberFormat) -> tuple[str, int | None]:
    """(qscheme, group_size), where not given those of the dtype. Raises ContradictionError."""
    if number.block_size is not None:
        for name, own in (("qscheme", "per_group_symmetric"), ("group_size", number.block_size)):
            if fields[name] not in (None, own):
                text = f"contradicts dtype {fields['dtype']}, which implies {own}; remove it or use another dtype"
                raise ContradictionError((name,), fields[name], text)
        return "per_group_symmetric", number.block_size
    qscheme, group_size = fields["qscheme"] or "per_channel_symmetric", fields["group_size"]
    if qscheme.startswith("per_group") and group_size is None:
        text = f"is missing, but qscheme {qscheme} needs it; give it, for instance 128"
        raise ContradictionError(("group_size",), ABSENT, text)
    if not qscheme.startswith("per_group") and group_size is not None:
        text = f"does not fit qscheme {qscheme}; use a per_group qscheme or remove group_size"
        raise ContradictionError(("group_size",), group_size, text)
    return qscheme, group_size


def _code_range(fields: Mapping[str, Any], number: NumberFormat) -> tuple[int, int]:
    """(quant_min, quant_max), each the dtype's own where it is not given. Raises ContradictionError."""
    dtype, (lowest, highest) = fields["dtype"], number.code_range
    given = {name: fields[name] for name in ("quant_min", "quant_max") if fields[name] is not None}
    for name, value in given.items():
        if number.element is not None:
            text = f"does not apply to {dtype}, whose values are fixed; remove it or use an integer dtype"
            raise ContradictionError((name,), value, text)
        if not lowest <= value <= highest:
            text = f"is outside the range of {dtype}, {lowest} to {highest}; use a value inside or remove it"
            raise ContradictionError((name,), value, text)
    low, high = given.get("quant_min", lowest), given.get("quant_max", highest)
    if low >= high:
        name, value = next(iter(given.items()))
        text = f"leaves no range: quant_min {low} must be below quant_max {high}; widen the range"
        raise ContradictionError((name,), value, text)
    return low, high
