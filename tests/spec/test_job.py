"""The job spec: defaults, presets, digest, schema, sizes, and no crash on random jobs."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import subprocess
import sys
from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.job import PRESETS, JobSpec, MethodSpec, OutputSpec, json_schema
from distributed_adaround.spec.model import ModelSpec
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.rounding import RoundingSpec
from distributed_adaround.spec.runtime import RuntimeSpec, parse_bytes
from tests.support.job_mapping import JOB, job_with


def test_specs_are_frozen_and_can_be_sent_to_other_processes() -> None:
    spec = JobSpec(**JOB, preset="paper", quantize={"overrides": [{"match": "a", "dtype": "int8"}]})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert JobSpec(**spec.model_dump()) == spec
    assert JobSpec(**json.loads(spec.model_dump_json())) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.rounding.max_iter = 3  # type: ignore[misc]


def test_defaults() -> None:
    spec = JobSpec(**JOB)
    assert (spec.quantize.dtype, spec.quantize.qscheme, spec.quantize.observer) == ("int4", None, "mse")
    layer = spec.quantize.for_layer("a", "Linear")
    assert layer is not None
    assert (layer.strategy, layer.symmetric, layer.group_size) == ("channel", True, None)
    assert (spec.rounding.max_iter, spec.rounding.batch_size, spec.rounding.batch_unit) == (2000, 256, "rows")
    assert (spec.rounding.beta, spec.rounding.reg_param, spec.rounding.normalization) == ((20.0, 2.0), None, "nearest")
    assert (spec.data.microbatch_size, spec.data.virtual_shards, spec.data.num_samples) == (32, 64, None)
    assert spec.output.formats == ["safetensors", "dequantized"]
    assert (spec.runtime.device, spec.runtime.timeout_minutes) == ("auto", 30.0)


# --- presets ---


def test_preset_pytorch_is_the_pytorch_ancestor() -> None:
    spec = MethodSpec(preset="pytorch")
    layer = spec.quantize.for_layer("a", "Linear")
    assert layer is not None
    assert (layer.number.bits, layer.number.signed, layer.quant_min, layer.quant_max) == (8, True, -128, 127)
    assert (layer.strategy, layer.symmetric, layer.observer) == ("tensor", True, "minmax")
    assert spec.rounding == RoundingSpec(
        max_iter=10000,
        batch_size=256,
        batch_unit="samples",
        lr=1e-3,
        warm_start=0.2,
        beta=(20, 2),
        reg_param=0.001,
        normalization="mean",
        asymmetry=1.0,
        activation_in_loss=False,
        polish=False,
    )


def test_preset_paper_leaves_the_grid_alone() -> None:
    spec = MethodSpec(preset="paper", quantize={"dtype": "int3", "quant_min": -3})
    assert spec.quantize == QuantizeSpec(dtype="int3", quant_min=-3, observer="mse")
    assert spec.rounding == RoundingSpec(
        max_iter=10000,
        batch_size=32,
        batch_unit="samples",
        lr=1e-3,
        reg_param=0.01,
        normalization="sum",
        asymmetry=1.0,
        polish=False,
    )


def test_explicit_values_win_over_the_preset_from_files_and_from_python() -> None:
    from_dict = MethodSpec(preset="pytorch", rounding={"max_iter": 7}, quantize={"observer": "mse"})
    from_objects = MethodSpec(
        preset="pytorch", rounding=RoundingSpec(max_iter=7), quantize=QuantizeSpec(observer="mse")
    )
    assert from_dict == from_objects
    assert (from_dict.rounding.max_iter, from_dict.rounding.reg_param) == (7, 0.001)
    assert (from_dict.quantize.observer, from_dict.quantize.dtype) == ("mse", "qint8")
    # Also when the explicit value is the general default.
    assert MethodSpec(preset="pytorch", rounding=RoundingSpec(reg_param=0.01)).rounding.reg_param == 0.01


def test_the_range_of_preset_pytorch_does_not_outlive_its_dtype() -> None:
    layer = MethodSpec(preset="pytorch", quantize={"dtype": "int4"}).quantize.for_layer("a", "Linear")
    assert layer is not None
    assert (layer.quant_min, layer.quant_max, layer.strategy) == (-8, 7, "tensor")
    narrowed = MethodSpec(preset="pytorch", quantize={"quant_min": -127}).quantize
    assert (narrowed.quant_min, narrowed.quant_max, narrowed.dtype) == (-127, 127, "qint8")


def test_presets_hold_only_known_fields_and_hide_no_fault() -> None:
    for name in PRESETS:
        MethodSpec(preset=name)
        with pytest.raises(SpecError, match=r"^rounding: null must be a section"):
            MethodSpec(preset=name, rounding=None)


# --- digest, schema, sizes ---


def test_digest_is_the_hash_of_what_changes_the_result() -> None:
    spec = JobSpec(**JOB, quantize={"overrides": [{"match": "a", "dtype": "int8"}]}, runtime={"seed": 3})
    none = dict.fromkeys(["qscheme", "group_size", "quant_min", "quant_max", "scale_dtype", "observer", "percentile"])
    content = {
        "quantize": {
            "dtype": "int4",
            "qscheme": None,
            "group_size": None,
            "quant_min": None,
            "quant_max": None,
            "scale_dtype": None,
            "observer": "mse",
            "percentile": 99.9,
            "keep_zeros": False,
            "embeddings": False,
            "routers": False,
            "heads": False,
            "fused": "check",
            "ignore": [],
            "overrides": [{"match": "a", "dtype": "int8"} | none],
        },
        "rounding": {
            "solver": "minibatch",
            "solver_args": {},
            "max_iter": 2000,
            "batch_size": 256,
            "batch_unit": "rows",
            "lr": 0.05,
            "warm_start": 0.2,
            "beta": [20.0, 2.0],
            "reg_param": 10.0,
            "normalization": "nearest",
            "activation_in_loss": True,
            "asymmetry": 0.5,
            "compute_dtype": "float32",
            "sweeps": 100,
            "polish": True,
            "correct_bias": False,
            "correct_scale": False,
            "damping": 0.01,
            "rows_per_input": 128,
            "starts": 4,
            "reproducible": False,
        },
        "seed": 3,
        "data": {
            "num_samples": None,
            "max_samples": None,
            "microbatch_size": 32,
            "virtual_shards": 64,
            "fields": None,
            "one_sample_per_file": False,
            "encoder": "arrays",
            "encoder_args": {},
            "text": None,
            "images": None,
            "audio": None,
            "transform": None,
            "mask_field": "attention_mask",
            "pad_value": 0.0,
        },
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert spec.result_digest() == hashlib.sha256(text.encode()).hexdigest()


def test_digest_changes_with_the_result_and_with_nothing_else() -> None:
    digest = JobSpec(**JOB).result_digest()
    same = [
        ("rounding.lr", 0.05), ("rounding.beta", [20, 2]), ("rounding.reg_param", 10),
        ("rounding.polish", True), ("rounding.correct_bias", False),
        ("rounding.correct_scale", False), ("rounding.asymmetry", 0.5),
        ("rounding.activation_in_loss", True),
        ("data.uri", ["x", "y"]), ("data.prefetch", 0), ("data.processor", "p"), ("data.encoder", "arrays"),
        ("output.uri", "other"), ("output.overwrite", True), ("output.formats", ["dequantized"]),
        ("runtime.device", "cpu"), ("runtime.backend", "gloo"), ("runtime.timeout_minutes", 1),
        ("runtime.activation_memory", "1GiB"), ("runtime.device_memory", 5), ("runtime.spill_dir", "/x"),
        ("model.factory", "a:b"), ("model.weights", "w.pt"), ("model.factory_args", {"n": 1}),
    ]  # fmt: skip
    for path, value in same:
        assert JobSpec(**job_with(path, value)).result_digest() == digest, path
    different = [
        ("rounding.lr", 0.002), ("rounding.max_iter", 9999), ("rounding.compute_dtype", "float64"),
        ("rounding.solver", "gram"), ("rounding.polish", False), ("rounding.correct_bias", True),
        ("rounding.correct_scale", True),
        ("rounding.sweeps", 7), ("rounding.damping", 0.1), ("rounding.rows_per_input", None), ("rounding.asymmetry", 1),
        ("rounding.activation_in_loss", False), ("quantize.observer", "output_mse"),
        ("quantize.dtype", "int3"), ("quantize.ignore", ["a"]), ("quantize.overrides", [{"match": "a"}]),
        ("runtime.seed", 1), ("data.num_samples", 5), ("data.microbatch_size", 5), ("data.virtual_shards", 5),
        ("data.fields", {"a": "b"}), ("data.transform", "a:b"), ("data.mask_field", "m"), ("data.pad_value", 1),
        ("data.one_sample_per_file", True), ("data.text", {}), ("data.text", {"sequence_length": 5}),
        ("preset", "paper"),
    ]  # fmt: skip
    digests = {JobSpec(**job_with(path, value)).result_digest() for path, value in different}
    assert len(digests | {digest}) == len(different) + 1
    resolved = MethodSpec(preset="paper")
    explicit = JobSpec(**JOB, quantize=resolved.quantize, rounding=resolved.rounding)
    assert explicit.result_digest() == JobSpec(**JOB, preset="paper").result_digest()


def test_schema_describes_every_field() -> None:
    schema = json_schema()
    assert schema["title"] == "JobSpec"
    json.dumps(schema, allow_nan=False)
    objects = [schema, *schema["$defs"].values()]
    names = {cls.__name__ for cls in (ModelSpec, DataSpec, QuantizeSpec, RoundingSpec, OutputSpec, RuntimeSpec)}
    assert names <= {entry.get("title") for entry in objects}
    for entry in objects:
        if entry.get("type") == "object":
            assert entry["description"]
            assert entry["additionalProperties"] is False
            for name, field in entry["properties"].items():
                # A section's text may stand at the class that the field refers to.
                target = schema["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
                assert len(field.get("description", target.get("description", ""))) > 10, name
    assert schema["$defs"]["RoundingSpec"]["properties"]["max_iter"]["default"] == 2000


@pytest.mark.parametrize(
    ("text", "expected"),
    [(4096, 4096), ("12B", 12), ("500MB", 500_000_000), ("4GiB", 4 * 2**30), ("1.5 KiB", 1536), ("2TB", 2 * 10**12)],
)
def test_parse_bytes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "4G", "GiB", "-1MB", "1e3MB", "4 gib", "0GiB", "0.1B", "nanB", "iB", "1iB", 0, -1]
)
def test_parse_bytes_refuses(text: int | str) -> None:
    with pytest.raises(SpecError, match="4GiB"):
        parse_bytes(text)


# --- robustness ---


def mutated(job: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The job with a few fields replaced, added or removed anywhere."""
    job = copy.deepcopy(job)
    values: list[Any] = [
        None, True, -1, 0, 1, 3, 10**400, 0.5, float("nan"), -float("inf"), "", "5", "int8", "re:(", "a:b", "x.pt2",
        "per_group_affine", "http://[", "s3://a:b@c", "\x00\n", "é" * 200, [], [1], ["a"], [[]], {}, {"match": "a"},
        {1: 2}, {"": ""}, b"x", (1, 2), {20, 2}, object(), "seed", "paper", "4GiB", [{"match": "x", "group_size": 3}],
    ]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        node: Any = job
        while isinstance(node, dict) and rng.random() < 0.8 and any(isinstance(v, dict) for v in node.values()):
            node = rng.choice([value for value in node.values() if isinstance(value, dict)])
        names = sorted(map(str, node)) or ["dtype"]
        name = rng.choice([*names, *names, "dtype", "preset", "", "x" * 100, "self", "cls"])
        if rng.random() < 0.15:
            node.pop(name, None)
        else:
            node[name] = rng.choice(values)
    return job


def test_random_jobs_give_a_job_or_a_spec_error() -> None:
    rng = random.Random(20)
    full = JobSpec(**JOB, preset="paper").model_dump()
    full["quantize"]["overrides"] = [{"match": "a", "dtype": "int8"}]
    accepted = 0
    messages: list[str] = []
    for _ in range(400):
        job = mutated(full, rng)
        try:
            spec = JobSpec(**job)
        except SpecError as error:
            messages += str(error).splitlines()
            continue
        accepted += 1
        spec.result_digest()
        spec.model_dump_json()
        spec.quantize.for_layer("b", "Linear")
    assert all(line.isprintable() and len(line) < 500 for line in messages)
    assert 20 < accepted < 380


def test_deep_arguments_do_not_crash() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(SpecError):
        JobSpec(**job_with("model.factory_args", {"a": deep}))


def test_a_spec_is_validated_without_torch() -> None:
    code = (
        "import sys\n"
        "from distributed_adaround.spec.job import JobSpec, json_schema\n"
        f"JobSpec(**{JOB!r}, preset='pytorch').result_digest(); json_schema()\n"
        "assert 'pydantic' in sys.modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
