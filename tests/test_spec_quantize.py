"""Number formats: ranges, matching, overrides, and what a layer gets in the end."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.spec import LayerFormat, QuantizeSpec


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
    assert layer == LayerFormat(dtype, num_bits, signed, low, high, True, "channel", None, "mse", 99.9)
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


def test_the_later_override_wins_and_ignore_wins_over_all() -> None:
    spec = QuantizeSpec(
        ignore=["c"],
        overrides=[
            {"match": "Linear", "dtype": "int8", "observer": "minmax"},
            {"match": ["re:b", "c"], "dtype": "int3"},
        ],
    )
    assert layer_format(spec, "a", "Conv2d").dtype == "int4"
    assert (layer_format(spec, "a").dtype, layer_format(spec, "a").observer) == ("int8", "minmax")
    assert (layer_format(spec, "b").dtype, layer_format(spec, "b").observer) == ("int3", "minmax")
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
