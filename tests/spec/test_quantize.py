"""Number formats: ranges, matching, overrides, and what a layer gets in the end."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.formats import FORMATS, SCALE_FORMATS, LayerFormat
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.quantize import QuantizeSpec


@pytest.mark.parametrize(
    ("dtype", "num_bits", "signed", "low", "high", "zero_point"),
    [
        ("qint8", 8, True, -128, 127, 0),
        ("int8", 8, True, -128, 127, 0),
        ("quint8", 8, False, 0, 255, 128),
        ("uint8", 8, False, 0, 255, 128),
        ("int2", 2, True, -2, 1, 0),
        ("int3", 3, True, -4, 3, 0),
        ("int7", 7, True, -64, 63, 0),
        ("uint2", 2, False, 0, 3, 2),
        ("uint4", 4, False, 0, 15, 8),
        ("uint7", 7, False, 0, 127, 64),
    ],
)
def test_ranges_of_dtypes(dtype: Any, num_bits: int, signed: bool, low: int, high: int, zero_point: int) -> None:
    layer = QuantizeSpec(dtype=dtype).for_layer("a", "Linear")
    scale = SCALE_FORMATS["float32"]
    assert layer == LayerFormat(FORMATS[dtype], low, high, True, "channel", None, scale, "mse", 99.9)
    assert (layer.number.bits, layer.number.signed) == (num_bits, signed)
    assert layer.zero_point == zero_point


def test_zero_point_of_narrowed_symmetric_ranges() -> None:
    def zero_point(**fields: Any) -> int:
        layer = QuantizeSpec(**fields).for_layer("a", "Linear")
        assert layer is not None
        return layer.zero_point

    assert zero_point(dtype="int8", quant_min=-127) == 0
    assert zero_point(dtype="int8", quant_min=-3, quant_max=100) == 0
    assert zero_point(dtype="uint8", quant_min=1) == 128
    assert zero_point(dtype="uint8", quant_max=14) == 7
    with pytest.raises(SpecError, match="zero point 4 must lie strictly between quant_min 3 and quant_max 4"):
        QuantizeSpec(dtype="uint4", quant_min=3, quant_max=4)


def layer_format(spec: QuantizeSpec, name: str, module_class: str = "Linear") -> LayerFormat:
    layer = spec.for_layer(name, module_class)
    assert layer is not None
    return layer


def test_matching_by_class_by_name_and_by_pattern() -> None:
    spec = QuantizeSpec(ignore=["Conv1d", "decoder.head", "re:enc.*\\.q$"])
    assert spec.for_layer("anything", "Conv1d") is None
    assert spec.for_layer("decoder.head", "Linear") is None
    assert spec.for_layer("encoder.0.q", "Linear") is None
    kept = [
        ("decoder.head.proj", "Linear"),
        ("head", "Linear"),
        ("my.encoder.q", "Linear"),
        ("x", "conv1d"),
        ("x", "Conv"),
    ]
    assert all(spec.for_layer(*layer) is not None for layer in kept)
    parts = QuantizeSpec(ignore=["a.in_proj_weight", "experts[1]"])
    assert parts.for_layer("a.in_proj_weight[0:8]", "MultiheadAttention") is None
    assert parts.for_layer("experts[1]", "Experts") is None
    assert parts.for_layer("experts[0]", "Experts") is not None


def test_the_later_override_wins_and_ignore_wins_over_all() -> None:
    spec = QuantizeSpec(
        ignore=["c"],
        overrides=[
            {"match": "Linear", "dtype": "int8", "observer": "minmax"},
            {"match": ["re:b", "c"], "dtype": "int3"},
        ],
    )
    assert layer_format(spec, "a", "Conv2d").number.name == "int4"
    assert (layer_format(spec, "a").number.name, layer_format(spec, "a").observer) == ("int8", "minmax")
    assert (layer_format(spec, "b").number.name, layer_format(spec, "b").observer) == ("int3", "minmax")
    assert spec.for_layer("c", "Linear") is None


def test_an_override_of_dtype_or_qscheme_drops_what_belonged_to_the_old_one() -> None:
    spec = QuantizeSpec(
        qscheme="per_group_symmetric",
        group_size=32,
        quant_min=-7,
        overrides=[
            {"match": "a", "dtype": "int8"},
            {"match": "b", "dtype": "int8", "quant_min": -100},
            {"match": "c", "qscheme": "per_tensor_symmetric"},
            {"match": "d", "qscheme": "per_group_symmetric", "group_size": 16},
            {"match": "e", "quant_max": 6},
        ],
    )
    assert (layer_format(spec, "a").quant_min, layer_format(spec, "a").quant_max) == (-128, 127)
    assert (layer_format(spec, "b").quant_min, layer_format(spec, "b").group_size) == (-100, 32)
    assert (layer_format(spec, "c").strategy, layer_format(spec, "c").group_size) == ("tensor", None)
    assert (layer_format(spec, "d").group_size, layer_format(spec, "d").quant_min) == (16, -7)
    assert (layer_format(spec, "e").quant_min, layer_format(spec, "e").quant_max) == (-7, 6)


FLOATS = {
    "float8_e4m3fn": ("float8_e4m3fn", 8, 252, "channel", None, "e4m3", "float32"),
    "fp8": ("float8_e4m3fn", 8, 252, "channel", None, "e4m3", "float32"),
    "float4_e2m1fn": ("float4_e2m1fn", 4, 14, "channel", None, "e2m1", "float32"),
    "fp4": ("float4_e2m1fn", 4, 14, "channel", None, "e2m1", "float32"),
    "mxfp8": ("mxfp8", 8, 252, "group", 32, "e4m3", "e8m0"),
    "mxfp4": ("mxfp4", 4, 14, "group", 32, "e2m1", "e8m0"),
    "nvfp4": ("nvfp4", 4, 14, "group", 16, "e2m1", "e4m3"),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_formats_and_what_they_imply(dtype: Any) -> None:
    name, bits, last, strategy, size, element, scales = FLOATS[dtype]
    expected = LayerFormat(FORMATS[name], 0, last, True, strategy, size, SCALE_FORMATS[scales], "mse", 99.9)  # type: ignore[arg-type]
    assert layer_format(QuantizeSpec(dtype=dtype), "a") == expected
    number = expected.number
    assert number.element is not None
    assert (number.name, number.bits, number.element.name, last + 1) == (
        name,
        bits,
        element,
        len(number.element.values),
    )
    if size is not None:
        given = QuantizeSpec(dtype=dtype, qscheme="per_group_symmetric", group_size=size)
        assert layer_format(given, "a") == expected
        with pytest.raises(SpecError, match=f"quantize.dtype: '{name}', blocks of {size} must divide the 24 .*another"):
            expected.check("a", 24)
    else:
        grouped = layer_format(QuantizeSpec(dtype=dtype, qscheme="per_group_symmetric", group_size=8), "a")
        assert (grouped.strategy, grouped.group_size) == ("group", 8)


def test_overrides_between_integers_and_block_formats() -> None:
    overrides: list[Any] = [
        {"match": "a", "dtype": "mxfp4"},
        {"match": "b", "dtype": "fp8"},
        {"match": "c", "dtype": "nvfp4", "group_size": 16},
    ]
    spec = QuantizeSpec(qscheme="per_group_affine", group_size=128, quant_min=-6, overrides=[overrides[0]])
    assert layer_format(spec, "a") == layer_format(QuantizeSpec(dtype="mxfp4"), "a")
    spec = QuantizeSpec(qscheme="per_group_symmetric", group_size=128, overrides=overrides)
    assert layer_format(spec, "a") == layer_format(QuantizeSpec(dtype="mxfp4"), "a")
    assert (layer_format(spec, "b").number.name, layer_format(spec, "b").group_size) == ("float8_e4m3fn", 128)
    assert layer_format(spec, "c") == layer_format(QuantizeSpec(dtype="nvfp4"), "c")
    spec = QuantizeSpec(
        dtype="mxfp4", overrides=[{"match": "a", "dtype": "int8"}, {"match": "b", "observer": "minmax"}]
    )
    assert layer_format(spec, "a") == layer_format(QuantizeSpec(dtype="int8"), "a")
    assert (layer_format(spec, "b").number.name, layer_format(spec, "b").observer) == ("mxfp4", "minmax")


def test_a_block_format_beside_a_preset_and_after_a_dump() -> None:
    spec = MethodSpec(preset="pytorch", quantize={"dtype": "mxfp4"})
    found = layer_format(spec.quantize, "a")
    assert (found.group_size, found.scale.name, found.observer) == (32, "e8m0", "minmax")
    assert QuantizeSpec(**spec.quantize.model_dump()) == spec.quantize


def test_overrides_that_contradict_each_other_only_together_are_refused_for_the_layer() -> None:
    spec = QuantizeSpec(overrides=[{"match": "Linear", "quant_min": 2, "quant_max": 4, "qscheme": "per_tensor_affine"},
                                   {"match": "a", "quant_min": -4}])  # fmt: skip
    assert layer_format(spec, "a", "Conv2d").quant_min == -4
    with pytest.raises(
        SpecError, match=r"^layer 'a', all its overrides together: quantize.qscheme: 'per_tensor_affine'"
    ):
        spec.for_layer("a", "Linear")


def test_percentile_may_serve_an_override_only() -> None:
    spec = QuantizeSpec(percentile=99.0, overrides=[{"match": "a", "observer": "percentile"}])
    assert (layer_format(spec, "a").observer, layer_format(spec, "a").percentile) == ("percentile", 99.0)


def test_unmatched_patterns_are_found() -> None:
    spec = QuantizeSpec(
        ignore=["Conv2d", "head", "re:.*typo"],
        overrides=[{"match": ["body.0", "body.9"], "dtype": "int8"}, {"match": "re:.*typo", "dtype": "int8"}],
    )
    assert spec.unmatched([("body.0", "Linear"), ("head", "Linear")]) == ["Conv2d", "re:.*typo", "body.9"]
    assert QuantizeSpec().unmatched([]) == []


def test_group_size_that_does_not_divide_is_refused_for_the_layer() -> None:
    layer = layer_format(QuantizeSpec(qscheme="per_group_symmetric", group_size=128), "stem")
    layer.check("stem", 256)
    expected = (
        r"^quantize.group_size: 128 must divide the 27 inputs .* layer 'stem'; add an override .*\(group_size: 27 fits"
    )
    with pytest.raises(SpecError, match=expected):
        layer.check("stem", 27)
    with pytest.raises(SpecError, match=r"group_size: 96 fits"):
        layer.check("stem", 576)
    layer_format(QuantizeSpec(), "stem").check("stem", 27)
