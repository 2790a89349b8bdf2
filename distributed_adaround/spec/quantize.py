"""The section `quantize` of a job: the number format of the weights, and which layers have another one or none.

The formats stand in formats.py. `quant_min` and `quant_max` narrow the range of integers. A symmetric grid has a fixed
zero point, an affine one takes its own from the observer. Floats are symmetric and have fixed values; block formats fix
the qscheme, the group_size and the scale too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, model_validator

from distributed_adaround.errors import SpecError
from distributed_adaround.formats import FORMATS, SCALE_FORMATS, LayerFormat, NumberFormat, Observer, Strategy
from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section, line, shorten, shown
from distributed_adaround.spec.fields import NameIn, PositiveInt, Text, TextOrTexts

_DEFAULT_PERCENTILE = 99.9


def _as_list(match: str | list[str]) -> list[str]:
    return [match] if isinstance(match, str) else match


def _check_patterns(match: str | list[str]) -> str | list[str]:
    for pattern in _as_list(match):
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except (re.error, OverflowError, RecursionError) as error:
            text = f"is not a regular expression: {shorten(str(error))}; correct it"
            raise ContradictionError((), pattern, text) from None
    return match


_QSCHEMES = [f"per_{part}_{kind}" for part in ("tensor", "channel", "group") for kind in ("symmetric", "affine")]
QScheme = Annotated[str, NameIn(_QSCHEMES)]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
Dtype = Annotated[str, NameIn(FORMATS)]
Percentile = Annotated[float, Field(gt=50, le=100)]


class Override(Section):
    """Another format for some layers. Fields that are not given stay as they are in the section `quantize`."""

    match: Annotated[TextOrTexts, AfterValidator(_check_patterns)] = Field(examples=["re:.*head"])
    """Layers this applies to, named as in `ignore`; one text, or a list."""
    dtype: Dtype | None = None
    """Number format of these layers; resets quant_min and quant_max, and mxfp8, mxfp4 and nvfp4 also qscheme and
    group_size."""
    qscheme: QScheme | None = None
    """What shares a scale, and the kind of zero point."""
    group_size: PositiveInt | None = None
    """Inputs that share a scale, with a per_group qscheme."""
    quant_min: int | None = None
    """Smallest integer code."""
    quant_max: int | None = None
    """Largest integer code."""
    scale_dtype: ScaleDtype | None = None
    """Precision of the scales."""
    observer: Observer | None = None
    """How the scales are found."""
    percentile: Percentile | None = None
    """With observer: percentile."""


class QuantizeSpec(Section):
    """Number format of the weights."""

    dtype: Dtype = "int4"
    """Type of the quantized weights. qint8 and int8 are the same, fp8 is short for float8_e4m3fn, fp4 for
    float4_e2m1fn. mxfp8, mxfp4: blocks of 32 inputs that share a power of two as scale; nvfp4: blocks of 16 inputs with
    e4m3 scales, and one float32 scale per tensor."""
    qscheme: QScheme | None = None
    """What shares a scale: the whole tensor, one output channel, or group_size inputs of one output channel; symmetric:
    fixed zero point, affine (integers only): each scale has its own. null: that of the dtype for mxfp8, mxfp4 and
    nvfp4, else per_channel_symmetric."""
    group_size: PositiveInt | None = Field(None, examples=[128])
    """Consecutive inputs that share a scale, with the per_group schemes only; fixed for mxfp8, mxfp4 and nvfp4. Must
    divide the inputs of one output (of a convolution: input channels per group times kernel elements)."""
    quant_min: int | None = None
    """Smallest code of an integer type; null: the smallest it has."""
    quant_max: int | None = None
    """Largest code of an integer type; null: the largest it has."""
    scale_dtype: ScaleDtype | None = None
    """Precision in which scales are stored, and to which they are rounded before a layer is solved and after every
    change. null: that of the dtype for mxfp8, mxfp4 and nvfp4, else what output.formats store: the model's dtype with
    compressed_tensors, float16 with gguf, float32 with the others."""
    observer: Observer = "mse"
    """How scales are found from the weights: minmax covers the largest weight, mse minimizes the squared rounding
    error, percentile cuts off the largest weights; output_mse weighs each weight's error by the mean square of its
    input."""
    percentile: Percentile = _DEFAULT_PERCENTILE
    """Share of the weights, in percent, that observer: percentile keeps in range."""
    keep_zeros: bool = False
    """Weights that are exactly 0 stay 0: a pruned network (2:4, say) keeps its pattern, with every solver."""
    ignore: list[Annotated[Text, AfterValidator(_check_patterns)]] = Field([])
    """Layers that stay in float: class names (Linear), exact layer names, or 're:' and a regular expression that must
    match from the start of the layer name."""
    embeddings: bool = False
    """Whether tables of embeddings that no layer shares are quantized too, each row with scales of its own, to the
    nearest values; only of models that torch.export turns into a graph."""
    routers: bool = False
    """Whether layers whose output only picks experts, and gates of shared experts, are quantized too. They are small,
    and an error of theirs sends tokens to other experts."""
    heads: bool = False
    """Whether the layer that makes words of a language model's last hidden states is quantized too, where it is not
    tied to an embedding; of models of transformers, which name it."""
    fused: Literal["check", "ignore"] = "check"
    """check: layers that serving engines run as one matrix (q, k and v of an attention, gate and up of an MLP, all
    experts of a block) must have one format, else the job is refused before it starts. With nvfp4 q, k and v, or gate
    and up, share the factor of the tensor in any case."""
    overrides: list[Override] = Field([])
    """Other formats for some layers, applied in order; where several match, the later one wins."""

    @model_validator(mode="after")
    def _formats_exist(self) -> Self:
        base = self._base()
        _resolve(base)
        used = {base["observer"], *(override.observer for override in self.overrides)}
        if self.percentile != _DEFAULT_PERCENTILE and "percentile" not in used:
            text = f"counts only with observer: percentile, not {self.observer}; set the observer or remove it"
            raise ContradictionError(("percentile",), self.percentile, text)
        for index, override in enumerate(self.overrides):
            fields = _merged(base, override)
            try:
                if override.percentile is not None and fields["observer"] != "percentile":
                    text = f"counts only with observer: percentile, not {fields['observer']}; set the observer here too"
                    raise ContradictionError(("percentile",), override.percentile, text)
                _resolve(fields)
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
            rule = line(f"quantize.{error.loc[0]}", error.value, error.text)
            raise SpecError(f"layer {shown(name)}, all its overrides together: {rule}") from None

    def with_scales(self, dtype: str) -> Self:
        """The same, with scales of that precision where none is given and the format of a layer leaves it open."""

        def filled(fields: Self | Override) -> dict[str, Any]:
            """An override without a dtype leaves scales as they are."""
            number = FORMATS[fields.dtype] if fields.dtype else None
            is_open = number is not None and number.scale == "float32" and fields.scale_dtype is None
            return {"scale_dtype": dtype} if is_open and dtype != "float32" else {}

        overrides = [each.model_copy(update=filled(each)) for each in self.overrides]
        return self.model_copy(update=filled(self) | {"overrides": overrides})

    def unmatched(self, layers: Sequence[tuple[str, str]]) -> list[str]:
        """Patterns of `ignore` and `overrides` that match none of these (name, class name) pairs."""
        patterns = [*self.ignore, *(pattern for override in self.overrides for pattern in _as_list(override.match))]
        return [p for p in dict.fromkeys(patterns) if not any(_matches(p, *layer) for layer in layers)]

    def _base(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Override.model_fields if name != "match"}


def _matches(pattern: str, name: str, module_class: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    # Parts of one parameter, "w[0:16]", also go by its name.
    return pattern in (name, name.partition("[")[0], module_class)


def _merged(fields: Mapping[str, Any], override: Override) -> dict[str, Any]:
    """The fields of a format with an override on top. A new dtype or qscheme drops what belonged to the old one."""
    given = {name: value for name in fields if (value := getattr(override, name)) is not None}
    reset = dict.fromkeys(stale_fields(given.get("dtype")))
    if not given.get("qscheme", "per_group").startswith("per_group"):
        reset["group_size"] = None
    return {**fields, **reset, **given}


def stale_fields(dtype: object) -> tuple[str, ...]:
    """Fields of a format that a new dtype makes void: they belong to the old one. None: there is no new one."""
    if not isinstance(dtype, str):
        return ()
    fixed = dtype in FORMATS and FORMATS[dtype].block_size is not None
    return ("quant_min", "quant_max", *(("qscheme", "group_size", "scale_dtype") if fixed else ()))


def _resolve(fields: Mapping[str, Any]) -> LayerFormat:
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
        remedy = f"use per_{strategy}_symmetric, or remove quant_min and quant_max"
        text = f"contradicts the range {low} to {high}, which is symmetric around zero; {remedy}"
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
        rule = f"the zero point {found.zero_point} must lie strictly between quant_min {low} and quant_max {high}"
        text = f"leaves no room around zero: with {qscheme} {rule}; widen the range or use per_{strategy}_affine"
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
