"""Float formats through a whole job: commits, restart and files, read here with nothing of the program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import toy_models
from packed_codes import read_by_hand
from sample_jobs import write_job
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError
from distributed_adaround.export.codes import read_codes
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job
from distributed_adaround.plan import plan_job
from distributed_adaround.solve.record import LayerRecord

FORMATS = {
    "fp8": "float8_e4m3fn per_channel_symmetric",
    "mxfp4": "mxfp4 per_group_symmetric 32",
    "mxfp8": "mxfp8 per_group_symmetric 32",
    "nvfp4": "nvfp4 per_group_symmetric 16",
    "fp4": "float4_e2m1fn per_group_symmetric 8",
    "int4": "int4 per_channel_symmetric",
}
QUANTIZE: dict[str, Any] = {
    "dtype": "int4",
    "observer": "mse",
    "overrides": [
        *({"match": name, "dtype": name} for name in FORMATS if name != "int4"),
        {"match": "fp4", "qscheme": "per_group_symmetric", "group_size": 8},
    ],
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
RESULTS = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    table = run_job(load_spec(str(write_job(folder, "wide", quantize=QUANTIZE))), folder)
    assert {row.name: row.format for row in table} == FORMATS
    assert all(row.hard_error <= row.nearest_error for row in table)
    # It learned: somewhere another neighbour was taken than the nearest.
    assert any(row.flipped for row in table)
    return folder / "out"


def by_hand(codes: Tensor, scale: Tensor, layer: dict[str, Any]) -> Tensor:
    """The weight of a layer, from what quantized.json says."""
    if layer["element_format"] == "e4m3":
        assert codes.dtype == torch.float8_e4m3fn
        assert not (codes.view(torch.uint8) == 0x80).any()
        values = codes.float()
    else:
        assert codes.dtype == torch.uint8
        assert not (codes == 8).any()
        values = torch.where(codes < 8, 1.0, -1.0) * E2M1[(codes % 8).long()]
    scale = scale.reshape(codes.shape[0], -1)
    return values * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def test_files_hold_what_a_runtime_needs(finished: Path) -> None:
    layers = json.loads((finished / "quantized.json").read_text())["layers"]
    stored = read_by_hand(finished)
    plain = safetensors.torch.load_file(finished / "dequantized.safetensors")
    again = read_codes(str(finished))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    scale_formats = {"fp8": "float32", "fp4": "float32", "mxfp4": "e8m0", "mxfp8": "e8m0", "nvfp4": "e4m3"}
    for name, scale_format in scale_formats.items():
        layer, scale = layers[f"{name}.weight"], stored[f"{name}.weight_scale"]
        assert layer["scale_format"] == scale_format
        assert (layer["quant_min"], layer["quant_max"]) == (None, None)
        assert torch.equal(by_hand(stored[f"{name}.weight"], scale, layer), plain[f"{name}.weight"])
        assert not stored[f"{name}.weight_zero_point"].any()
        if scale_format == "e8m0":
            assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
        if scale_format == "e4m3":
            # The scales of the blocks as NVFP4 keeps them, and the factor of the tensor: back to the bit.
            assert torch.equal(
                (scale / layer["tensor_scale"]).to(torch.float8_e4m3fn).float() * layer["tensor_scale"], scale
            )
        else:
            assert layer["tensor_scale"] is None
    plain_format = {name: layers["int4.weight"][name] for name in ("element_format", "scale_format", "tensor_scale")}
    assert plain_format == {"element_format": None, "scale_format": "float32", "tensor_scale": None}
    # No weight went further than to one of its neighbours.
    weight = dict(toy_models.wide().named_parameters())["mxfp8.weight"].detach()
    scale = stored["mxfp8.weight_scale"]
    steps = (plain["mxfp8.weight"] - weight).abs() / scale
    assert (steps <= (weight / scale).abs().clamp(min=2.0**-6) / 8).all()


def test_a_restart_in_the_middle_gives_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_job(tmp_path, "wide", quantize=QUANTIZE)
    make, calls = LayerRecord.of, []

    def stop_at_the_last(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == len(FORMATS):
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LayerRecord, "of", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            run_job(load_spec(str(path)), tmp_path)
    table = run_job(load_spec(str(path)), tmp_path)
    assert [row.resumed for row in table] == [True] * 5 + [False]
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


def write_with_size(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the file of codes, and its size into the description."""
    safetensors.torch.save_file(tensors, folder / "quantized.safetensors", metadata)
    text = json.loads((folder / "quantized.json").read_text())
    text["files"]["quantized.safetensors"]["size"] = (folder / "quantized.safetensors").stat().st_size
    (folder / "quantized.json").write_text(json.dumps(text))


def test_records_that_are_not_of_their_format_are_refused(finished: Path, tmp_path: Path) -> None:
    stored = finished / "quantized.safetensors"
    good = stored.read_bytes()
    with safetensors.safe_open(stored, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(good)
    broken = {
        "fp8.weight.codes": tensors["fp8.weight.codes"].view(torch.uint8),
        "mxfp4.weight.scale": tensors["mxfp4.weight.scale"] * 1.5,
        "nvfp4.weight.scale": tensors["nvfp4.weight.scale"] * 1.02,
    }
    shutil.copyfile(finished / "quantized.json", tmp_path / "quantized.json")
    for name, tensor in broken.items():
        # Names of dtypes may have other lengths: only what the tensors hold counts here.
        write_with_size(tmp_path, tensors | {name: tensor}, metadata)
        with pytest.raises(InputError, match="is damaged") as caught:
            read_codes(str(tmp_path))
        assert isinstance(caught.value.__cause__, AdaRoundError), name
    write_with_size(tmp_path, tensors, metadata)
    assert read_codes(str(tmp_path)).keys() == read_codes(str(finished)).keys()


def test_a_plan_names_the_formats(tmp_path: Path) -> None:
    path = write_job(tmp_path, "wide", quantize=QUANTIZE)
    plan = plan_job(load_spec(str(path)), tmp_path, 1)
    assert {layer.name: layer.format for layer in plan.layers} == FORMATS
