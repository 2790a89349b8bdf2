"""Every fault of a job is one line with field, value and remedy, short and without credentials."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.model import ModelSpec
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.rounding import RoundingSpec
from tests.support.job_mapping import JOB, job_with

# (path set, value, path blamed, what the line must also say: rule and remedy)
BAD_VALUES = [
    ("rounding.max_iter", -5, "rounding.max_iter", ["-5", "must be greater than 0", "use 2000, the default"]),
    ("rounding.max_iter", 0, "rounding.max_iter", ["0 must be greater than 0"]),
    ("rounding.max_iter", True, "rounding.max_iter", ["true", "whole number"]),
    ("rounding.max_iter", "5", "rounding.max_iter", ["'5'", "whole number", "without quotes"]),
    ("rounding.max_iter", 5.0, "rounding.max_iter", ["5.0", "whole number"]),
    ("rounding.max_iter", 10**30, "rounding.max_iter", ["1000000000000000000000000000000", "or less"]),
    ("rounding.lr", 0, "rounding.lr", ["0 must be greater than 0", "0.05"]),
    ("rounding.lr", float("nan"), "rounding.lr", ["nan", "finite"]),
    ("rounding.reg_param", float("inf"), "rounding.reg_param", ["inf", "finite", "leave it out"]),
    ("rounding.reg_param", -0.1, "rounding.reg_param", ["-0.1", "0 or more"]),
    ("rounding.lr", True, "rounding.lr", ["true must be a number"]),
    ("rounding.warm_start", 1, "rounding.warm_start", ["1 must be less than 1", "0.2"]),
    ("rounding.beta", [2, 20], "rounding.beta", ["[2.0, 20.0]", "must not rise", "[20, 2]"]),
    ("rounding.beta", [20], "rounding.beta.1", ["is missing"]),
    ("rounding.beta", [20, 2, 1], "rounding.beta", ["[20, 2, 1]", "2 or fewer entries"]),
    ("rounding.beta", [20, 0], "rounding.beta.1", ["0 must be greater than 1"]),
    ("rounding.beta", [float("inf"), 2], "rounding.beta.0", ["inf", "finite"]),
    ("rounding.solver", "minibach", "rounding.solver", ["'minibach'", "did you mean 'minibatch'?"]),
    ("rounding.max_iters", 5, "rounding.max_iters", ["no such field", "did you mean max_iter?"]),
    ("max_iter", 5, "max_iter", ["no such field here", "section rounding"]),
    ("rounding", None, "rounding", ["null", "section", "remove it"]),
    ("quantize.dtype", "int9", "quantize.dtype", ["'int9'", "'int4'", "did you mean 'int"]),
    ("quantize.qscheme", "per_group_symmetric", "quantize.group_size", ["missing", "per_group_symmetric", "128"]),
    ("quantize.group_size", 64, "quantize.group_size", ["64", "per_channel_symmetric", "remove group_size"]),
    ("quantize.group_size", 0, "quantize.group_size", ["0 must be greater than 0"]),
    ("quantize.quant_min", -9, "quantize.quant_min", ["-9", "outside the range of int4, -8 to 7", "remove it"]),
    ("quantize.quant_max", 8, "quantize.quant_max", ["8", "outside the range of int4, -8 to 7"]),
    ("quantize.quant_min", 7, "quantize.quant_min", ["7", "must be below quant_max 7", "widen"]),
    ("quantize.quant_max", -8, "quantize.quant_max", ["-8", "quant_min -8 must be below", "widen"]),
    ("quantize.quant_min", 0, "quantize.quant_min", ["0", "zero point 0", "strictly between", "per_channel_affine"]),
    ("quantize.quant_max", 0, "quantize.quant_max", ["0", "zero point 0", "strictly between", "per_channel_affine"]),
    ("quantize", {"dtype": "fp8", "quant_min": -3}, "quantize.quant_min", ["-3 does not apply to fp8", "remove it"]),
    ("quantize", {"dtype": "mxfp4", "quant_max": 3}, "quantize.quant_max", ["3 does not apply to mxfp4"]),
    ("quantize", {"dtype": "fp4", "qscheme": "per_tensor_affine"}, "quantize.qscheme", ["fp4", "per_tensor_symmetric"]),
    (
        "quantize",
        {"dtype": "mxfp8", "qscheme": "per_channel_symmetric"},
        "quantize.qscheme",
        ["mxfp8", "per_group", "remove"],
    ),
    (
        "quantize",
        {"dtype": "mxfp4", "group_size": 16},
        "quantize.group_size",
        ["16 contradicts dtype mxfp4", "32", "remove"],
    ),
    (
        "quantize",
        {"dtype": "nvfp4", "group_size": 32},
        "quantize.group_size",
        ["32 contradicts dtype nvfp4", "16", "remove"],
    ),
    ("quantize.dtype", "mxfp5", "quantize.dtype", ["'mxfp5'", "did you mean 'mxfp"]),
    ("quantize.percentile", 50, "quantize.percentile", ["50", "greater than 50", "99.9"]),
    ("quantize.percentile", 99.0, "quantize.percentile", ["99.0", "only with observer: percentile", "not mse"]),
    ("quantize.ignore", ["a", "re:("], "quantize.ignore.1", ["'re:('", "not a regular expression", "correct it"]),
    ("quantize.ignore", "re:a", "quantize.ignore", ["'re:a' must be a list"]),
    ("quantize.ignore", ["re:x{99999999999}"], "quantize.ignore.0", ["not a regular expression"]),
    ("quantize.overrides", [{"dtype": "int8"}], "quantize.overrides.0.match", ["missing", "give it"]),
    ("quantize.overrides", [{"match": "re:["}], "quantize.overrides.0.match", ["'re:['", "not a regular expression"]),
    ("quantize.overrides", [{"match": []}], "quantize.overrides.0.match", ["[]", "a text or a list of texts"]),
    ("quantize.overrides", [{"match": "a", "bits": 4}], "quantize.overrides.0.bits", ["no such field", "group_size"]),
    ("model.factory", "resnet50", "model.factory", ["'resnet50'", "my_models:resnet50"]),
    ("model.program", "x.pt2", "model.program", ["'x.pt2'", "exclude each other", "remove one"]),
    (
        "model.factory",
        None,
        "model.factory",
        ["missing", "give hf (a directory), factory (module:callable) or program"],
    ),
    ("model.weights", "w.bin", "model.weights", ["'w.bin'", ".safetensors or .pt or .pth", "convert"]),
    ("model.factory_args", {"a": object()}, "model.factory_args", ["a mapping of 1", "finite numbers"]),
    ("model.factory_args", {"a": float("nan")}, "model.factory_args", ["finite numbers", "correct it"]),
    ("model", {}, "model.factory", ["missing"]),
    ("model", {"program": "x.pt"}, "model.program", ["'x.pt'", "must end in .pt2"]),
    (
        "model",
        {"program": "x.pt2", "weights": "w.pt"},
        "model.weights",
        ["'w.pt'", "needs factory, not program", "remove it"],
    ),
    ("model", {"program": "x.pt2", "factory_args": {"n": 1}}, "model.factory_args", ["needs factory"]),
    ("model", {"hf": "d", "factory": "a:b"}, "model.factory", ["'a:b'", "and hf exclude each other"]),
    ("model", {"hf": "d", "sha256": "0" * 64}, "model.sha256", ["needs a file", "remove it"]),
    ("model", {"hf": "d", "hf_class": "a b"}, "model.hf_class", ["'a b'", "name of a class", "ViTModel"]),
    ("model", {"hf": "d", "dtype": "int8"}, "model.dtype", ["'int8'", "'bfloat16'"]),
    ("model.hf_class", "ViTModel", "model.hf_class", ["'ViTModel'", "needs hf, not factory"]),
    ("data", {"uri": "a", "text": {}, "images": {}}, "data.images", ["and text exclude each other"]),
    ("data", {"uri": "a", "num_samples": 1, "max_samples": 2}, "data.max_samples", ["2 and num_samples exclude"]),
    ("data", {"uri": "a", "text": {}, "encoder": "arrays"}, "data.encoder", ["'arrays'", "contradicts text"]),
    ("data", {"uri": "a", "audio": {}, "fields": {"x": "y"}}, "data.fields", ["not with audio", "remove it"]),
    ("data", {"uri": "a", "images": {"mean": [0.5]}}, "data.images.mean", ["[0.5]", "needs std beside it"]),
    ("data", {"uri": "a", "images": {"mean": [0.5], "std": [1.0, 1.0]}}, "data.images.std", ["2 channels"]),
    ("data", {"uri": "a", "text": {"sequence_length": 0}}, "data.text.sequence_length", ["greater than 0"]),
    ("data.uri", [], "data.uri", ["[]", "a text or a list of texts"]),
    ("data.uri", ["a", 5], "data.uri", ["['a', 5]", "a text or a list of texts"]),
    ("data.num_samples", 0, "data.num_samples", ["0 must be greater than 0", "leave it out"]),
    ("data.prefetch", -1, "data.prefetch", ["-1 must be 0 or more", "2"]),
    ("data.fields", {"x": 1}, "data.fields.x", ["1 must be text"]),
    ("data.one_sample_per_file", "no", "data.one_sample_per_file", ["'no' must be true or false", "false"]),
    ("data.transform", "f", "data.transform", ["'f'", "my_models:normalize"]),
    ("output.formats", [], "output.formats", ["[]", "1 or more entries"]),
    ("output.formats", ["safetensors"] * 2, "output.formats", ["'safetensors', 'safetensors'", "twice", "remove"]),
    ("output.formats", ["tflite"], "output.formats.0", ["'tflite'", "'dequantized'"]),
    ("output.uri", "", "output.uri", ["'' must not be empty", "s3://out/resnet50-w4"]),
    ("runtime.device", "cuda:x", "runtime.device", ["'cuda:x'", "cuda:0"]),
    ("runtime.device", "cpu\n", "runtime.device", ["cuda:0"]),
    ("runtime.seed", -1, "runtime.seed", ["-1 must be 0 or more"]),
    ("runtime.timeout_minutes", 0, "runtime.timeout_minutes", ["0 must be greater than 0", "30.0"]),
    ("runtime.activation_memory", "4 gigs", "runtime.activation_memory", ["'4 gigs'", "4GiB"]),
    ("runtime.activation_memory", 0, "runtime.activation_memory", ["0", "1 byte or more", "4GiB"]),
    ("runtime.device_memory", True, "runtime.device_memory", ["true", "4GiB"]),
    ("runtime", {"device": "cpu", "backend": "nccl"}, "runtime.backend", ["'nccl'", "needs GPUs", "gloo"]),
    ("preset", "papers", "preset", ["'papers'", "'pytorch' or 'paper'", "did you mean 'paper'?"]),
    ("preset", ["pytorch"], "preset", ["['pytorch']", "'pytorch' or 'paper'"]),
]


@pytest.mark.parametrize(("path", "value", "blamed", "words"), BAD_VALUES)
def test_a_bad_value_is_one_line_with_field_value_and_remedy(
    path: str, value: object, blamed: str, words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec(**job_with(path, value))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{blamed}: ")
    for word in words:
        assert word in text
    assert caught.value.exit_code == 64


# (fields of the section quantize, override, field blamed, words)
BAD_OVERRIDES = [
    ({}, {"group_size": 32}, "group_size", ["32", "per_channel_symmetric"]),
    ({}, {"qscheme": "per_group_affine"}, "group_size", ["missing", "per_group_affine"]),
    ({}, {"dtype": "int3", "quant_min": -8}, "quant_min", ["-8", "int3, -4 to 3"]),
    ({"dtype": "int8", "quant_min": -100}, {"dtype": "uint8", "quant_min": -100}, "quant_min", ["uint8, 0 to 255"]),
    ({"quant_min": -7}, {"qscheme": "per_tensor_affine"}, "qscheme", ["per_tensor_affine", "symmetric around zero"]),
    ({"quant_min": -2}, {"quant_max": -3}, "quant_min", ["-2", "below quant_max -3"]),
    ({"dtype": "mxfp4"}, {"group_size": 16}, "group_size", ["16 contradicts dtype mxfp4"]),
    ({"dtype": "mxfp4"}, {"dtype": "int4", "group_size": 64}, "group_size", ["64", "per_channel_symmetric"]),
    ({"qscheme": "per_tensor_affine"}, {"dtype": "fp8"}, "qscheme", ["per_tensor_affine", "fp8", "symmetric"]),
    ({}, {"percentile": 99.0}, "percentile", ["99.0", "observer: percentile, not mse"]),
]


@pytest.mark.parametrize(("base", "override", "blamed", "words"), BAD_OVERRIDES)
def test_an_override_that_contradicts_the_base_is_refused(
    base: dict[str, Any], override: dict[str, Any], blamed: str, words: list[str]
) -> None:
    overrides = [{"match": "fine", "observer": "minmax"}, {"match": "a"} | override]
    with pytest.raises(SpecError) as caught:
        JobSpec(**JOB, quantize=base | {"overrides": overrides})
    assert str(caught.value).startswith(f"quantize.overrides.1.{blamed}: ")
    for word in words:
        assert word in str(caught.value)


def test_affine_with_a_range_symmetric_around_zero_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"^qscheme: 'per_group_affine' .* -7 to 7.*; use per_group_symmetric, or remove"
    ):
        QuantizeSpec(qscheme="per_group_affine", group_size=8, quant_min=-7)
    assert QuantizeSpec(qscheme="per_group_affine", group_size=8, quant_min=-6).for_layer("a", "Linear") is not None


def test_several_faults_are_one_line_each_and_many_are_cut() -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec(**job_with("rounding", {"lr": -1, "max_iter": 0}), runtime={"seed": "x"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "rounding.max_iter",
        "rounding.lr",
        "runtime.seed",
    ]
    with pytest.raises(SpecError) as caught:
        QuantizeSpec(ignore=list(range(1000)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 980 more"


LONG_VALUES = ["x" * 10_000, [["x" * 100] * 5] * 5, ["y" * 60] * 8, {"z" * 100: 1}, 10**5000, b"b" * 999]


@pytest.mark.parametrize("value", LONG_VALUES, ids=range(len(LONG_VALUES)))
def test_values_in_messages_are_short(value: object) -> None:
    for path in ("rounding.max_iter", "quantize.dtype", "data.uri.x", "runtime.device_memory"):
        with pytest.raises(SpecError) as caught:
            JobSpec(**job_with(path.removesuffix(".x"), [value, 1] if path.endswith(".x") else value))
        before, _, after = str(caught.value).partition(" must be ")
        assert after
        assert len(before) <= len(path) + 2 + 80
    with pytest.raises(SpecError) as caught:
        JobSpec(**JOB, **{"k" * 5000: 1})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("path", ["model.weights", "data.num_samples", "model.factory", "runtime.device", "data.uri"])
def test_credentials_are_not_shown(path: str) -> None:
    uri = "s3://key:hunter2@bucket/file.bin"
    with pytest.raises(SpecError, match=r"s3://bucket/file\.bin") as caught:
        JobSpec(**job_with(path, uri if path != "data.uri" else [uri, 1]))
    assert "hunter2" not in str(caught.value)


def test_sections_made_in_python_raise_spec_error_too() -> None:
    with pytest.raises(SpecError, match=r"^max_iter: -5 must be greater than 0; use 2000, the default$"):
        RoundingSpec(max_iter=-5)
    with pytest.raises(SpecError, match=r"^dtpe: there is no such field; did you mean dtype\?$"):
        QuantizeSpec(dtpe="int4")  # type: ignore[call-arg]
    with pytest.raises(SpecError, match="program"):
        ModelSpec()
