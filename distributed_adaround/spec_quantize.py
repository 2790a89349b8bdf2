"""Number formats: the section `quantize` of a job, and the format that it gives to one layer.

qint8, int8: -128..127; quint8, uint8: 0..255; intN: -2^(N-1)..2^(N-1)-1; uintN: 0..2^N-1. `quant_min` and `quant_max`
narrow the range. A symmetric grid has a fixed zero point; an affine one has a zero point from the observer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from distributed_adaround.errors import SpecError
from distributed_adaround.spec_errors import ABSENT, ContradictionError, Section, one_rule, shorten, shown

Dtype = Literal[
    "qint8", "quint8", "int8", "uint8", "int2", "int3", "int4", "int5", "int6", "int7",
    "uint2", "uint3", "uint4", "uint5", "uint6", "uint7",
]  # fmt: skip
QScheme = Literal[
    "per_tensor_symmetric",
    "per_tensor_affine",
    "per_channel_symmetric",
    "per_channel_affine",
    "per_group_symmetric",
    "per_group_affine",
]
Observer = Literal["minmax", "mse", "percentile"]
Strategy = Literal["tensor", "channel", "group"]

_DEFAULT_PERCENTILE = 99.9

PositiveInt = Annotated[int, Field(gt=0, le=2**63 - 1)]
Percentile = Annotated[float, Field(gt=50, le=100)]
Text = Annotated[str, Field(min_length=1)]
TextOrTexts = Annotated[
    Text | Annotated[list[Text], Field(min_length=1)],
    one_rule("must be a text or a list of texts, none of them empty; correct or remove it"),
]


@dataclass(frozen=True)
class LayerFormat:
    """The grid of one layer's weight, everything resolved.

    strategy: how many weights share a scale: all (tensor), those of an output channel (channel), or `group_size`
    consecutive inputs of one output channel (group). quant_min, quant_max: smallest and largest integer code.
    """

    dtype: str
    num_bits: int
    signed: bool
    quant_min: int
    quant_max: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None
    observer: Observer
    percentile: float

    @property
    def zero_point(self) -> int:
        """Code of the real 0 on a symmetric grid; an affine grid takes its own from the observer."""
        assert self.symmetric, "the zero point of an affine grid depends on the weights"
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2

    def check(self, layer_name: str, inputs_per_output: int) -> None:
        """Raises SpecError when groups of `group_size` do not fill the inputs of one output of this layer exactly."""
        if self.group_size is None or inputs_per_output % self.group_size == 0:
            return
        fitting = next(g for g in range(min(self.group_size, inputs_per_output), 0, -1) if inputs_per_output % g == 0)
        raise SpecError(
            f"quantize.group_size: {self.group_size} must divide the {inputs_per_output} inputs of each output of "
            f"layer {shown(layer_name)}; add an override for this layer (group_size: {fitting} fits) or ignore it"
        )


class Override(Section):
    """Another format for some layers. Fields that are not given stay as they are in the section `quantize`."""

    match: TextOrTexts = Field(
        description="Layers this applies to: a class name (Linear), an exact layer name, or 're:' and a regular "
        "expression that must match from the start of the layer name. One, or a list.",
        examples=["re:.*head"],
    )
    dtype: Dtype | None = Field(None, description="Number format of these layers; resets quant_min and quant_max.")
    qscheme: QScheme | None = Field(
        None, description="What shares a scale in these layers, and the kind of zero point."
    )
    group_size: PositiveInt | None = Field(None, description="Inputs that share a scale, with a per_group qscheme.")
    quant_min: int | None = Field(None, description="Smallest integer code of these layers.")
    quant_max: int | None = Field(None, description="Largest integer code of these layers.")
    observer: Observer | None = Field(None, description="How the scales of these layers are found.")
    percentile: Percentile | None = Field(None, description="Percentile of these layers, with observer: percentile.")

    @field_validator("match")
    @classmethod
    def _patterns_compile(cls, value: str | list[str]) -> str | list[str]:
        for pattern in _as_list(value):
            _check_pattern(pattern)
        return value


class QuantizeSpec(Section):
    """Number format of the weights."""

    dtype: Dtype = Field("int4", description="Integer type of the quantized weights; qint8 and int8 are the same.")
    qscheme: QScheme = Field(
        "per_channel_symmetric",
        description="What shares a scale: the whole tensor, one output channel, or group_size inputs of one output "
        "channel; symmetric: fixed zero point, affine: each scale has its own zero point.",
    )
    group_size: PositiveInt | None = Field(
        None,
        description="Consecutive inputs that share a scale, with the per_group schemes only. Must divide the number "
        "of inputs of one output (for a convolution: input channels per group times kernel elements).",
        examples=[128],
    )
    quant_min: int | None = Field(None, description="Smallest integer code; null: the smallest of the dtype.")
    quant_max: int | None = Field(None, description="Largest integer code; null: the largest of the dtype.")
    observer: Observer = Field(
        "mse",
        description="How scales are found from the weights: minmax covers the largest weight, mse minimizes the "
        "squared rounding error, percentile cuts off the largest weights.",
    )
    percentile: Percentile = Field(
        _DEFAULT_PERCENTILE, description="Share of the weights, in percent, that observer: percentile keeps in range."
    )
    ignore: list[Text] = Field(
        [],
        description="Layers that stay in float: class names (Linear), exact layer names, or 're:' and a regular "
        "expression that must match from the start of the layer name.",
    )
    overrides: list[Override] = Field(
        [], description="Other formats for some layers, applied in order; where several match, the later one wins."
    )

    @field_validator("ignore")
    @classmethod
    def _patterns_compile(cls, value: list[str]) -> list[str]:
        for index, pattern in enumerate(value):
            _check_pattern(pattern, (index,))
        return value

    @model_validator(mode="after")
    def _formats_exist(self) -> Self:
        base = self._base()
        _resolve(base)
        used = {base["observer"], *(override.observer for override in self.overrides)}
        if self.percentile != _DEFAULT_PERCENTILE and "percentile" not in used:
            raise ContradictionError(
                ("percentile",),
                self.percentile,
                f"counts only with observer: percentile, not {self.observer}; set the observer or remove it",
            )
        for index, override in enumerate(self.overrides):
            try:
                merged = _merged(base, override)
                if override.percentile is not None and merged["observer"] != "percentile":
                    raise ContradictionError(
                        ("percentile",),
                        override.percentile,
                        f"counts only with observer: percentile, not {merged['observer']}; set the observer here too",
                    )
                _resolve(merged)
            except ContradictionError as error:
                raise ContradictionError(("overrides", index, *error.loc), error.value, error.text) from None
        return self

    def for_layer(self, name: str, module_class: str) -> LayerFormat | None:
        """Format of the layer with this name in `named_modules` and this class name; None when it is ignored.

        Raises SpecError when several overrides that match this layer contradict each other.
        """
        if any(_matches(pattern, name, module_class) for pattern in self.ignore):
            return None
        fields = self._base()
        for override in self.overrides:
            if any(_matches(pattern, name, module_class) for pattern in _as_list(override.match)):
                fields = _merged(fields, override)
        try:
            return _resolve(fields)
        except ContradictionError as error:
            raise SpecError(f"layer {shown(name)}, all its overrides together: {error.line(('quantize',))}") from None

    def unmatched(self, layers: Sequence[tuple[str, str]]) -> list[str]:
        """Patterns of `ignore` and `overrides` that match none of these (name, class name) pairs."""
        patterns = [*self.ignore, *(pattern for override in self.overrides for pattern in _as_list(override.match))]
        return [
            pattern
            for pattern in dict.fromkeys(patterns)
            if not any(_matches(pattern, name, module_class) for name, module_class in layers)
        ]

    def _base(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Override.model_fields if name != "match"}


def _as_list(match: str | list[str]) -> list[str]:
    return [match] if isinstance(match, str) else match


def _matches(pattern: str, name: str, module_class: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, module_class)


def _check_pattern(pattern: str, loc: tuple[int, ...] = ()) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            text = f"is not a regular expression: {shorten(str(error))}; correct it"
            raise ContradictionError(loc, pattern, text) from None


def _merged(fields: Mapping[str, Any], override: Override) -> dict[str, Any]:
    """The fields of a format with an override on top. A new dtype or qscheme drops what belonged to the old one."""
    given = {name: value for name in fields if (value := getattr(override, name)) is not None}
    reset: dict[str, Any] = {}
    if "dtype" in given:
        reset |= {"quant_min": None, "quant_max": None}
    if "qscheme" in given and not given["qscheme"].startswith("per_group"):
        reset |= {"group_size": None}
    return {**fields, **reset, **given}


def dtype_range(dtype: str) -> tuple[int, bool, int, int]:
    """(number of bits, signed, smallest code, largest code) of an integer type: "int4" is (4, True, -8, 7)."""
    assert dtype in get_args(Dtype), dtype
    num_bits, signed = int(dtype[-1]), "u" not in dtype
    lowest = -(2 ** (num_bits - 1)) if signed else 0
    return num_bits, signed, lowest, lowest + 2**num_bits - 1


def _code_range(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(quant_min, quant_max), each the dtype's own where it is not given. Raises ContradictionError."""
    _, _, lowest, highest = dtype_range(fields["dtype"])
    low, high = (
        default if fields[name] is None else fields[name]
        for name, default in (("quant_min", lowest), ("quant_max", highest))
    )
    for name, value in (("quant_min", low), ("quant_max", high)):
        if not lowest <= value <= highest:
            raise ContradictionError(
                (name,),
                value,
                f"is outside the range of {fields['dtype']}, {lowest} to {highest}; use a value inside or remove it",
            )
    if low >= high:
        name = "quant_min" if fields["quant_min"] is not None else "quant_max"
        raise ContradictionError(
            (name,), fields[name], f"leaves no range: quant_min {low} must be below quant_max {high}; widen the range"
        )
    return low, high


def _resolve(fields: Mapping[str, Any]) -> LayerFormat:
    """Checks the rules between the fields of one format. Raises ContradictionError."""
    dtype, qscheme, group_size = fields["dtype"], fields["qscheme"], fields["group_size"]
    strategy = qscheme.split("_")[1]
    if strategy == "group" and group_size is None:
        raise ContradictionError(
            ("group_size",), ABSENT, f"is missing, but qscheme {qscheme} needs it; give it, for instance 128"
        )
    if strategy != "group" and group_size is not None:
        raise ContradictionError(
            ("group_size",), group_size, f"does not fit qscheme {qscheme}; use a per_group qscheme or remove group_size"
        )
    num_bits, signed, _, _ = dtype_range(dtype)
    low, high = _code_range(fields)
    symmetric = qscheme.endswith("symmetric")
    if not symmetric and low == -high:
        raise ContradictionError(
            ("qscheme",),
            qscheme,
            f"contradicts the range {low} to {high}, which is symmetric around zero; use {qscheme[:-6]}symmetric, or "
            "remove quant_min and quant_max",
        )
    layer_format = LayerFormat(
        dtype=dtype,
        num_bits=num_bits,
        signed=signed,
        quant_min=low,
        quant_max=high,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        observer=fields["observer"],
        percentile=fields["percentile"],
    )
    if symmetric and not low < layer_format.zero_point < high:
        name = "quant_max" if layer_format.zero_point >= high else "quant_min"
        raise ContradictionError(
            (name,),
            low if name == "quant_min" else high,
            f"leaves no room around zero: with {qscheme} the zero point {layer_format.zero_point} must lie strictly "
            f"between quant_min {low} and quant_max {high}; widen the range or use {qscheme[:-9]}affine",
        )
    return layer_format
