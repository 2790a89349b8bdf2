"""Finished jobs of small models, for tests of exporters: quantized, written and opened again, without a job file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import toy_records
from torch import nn

from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.open import capture_model, head_names
from distributed_adaround.capture.sites import Site
from distributed_adaround.data.microbatches import CallerBatch, Microbatches
from distributed_adaround.export.codes import SolvedModel, planned_layer, write_codes
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, scale_dtype
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.formats import LayerFormat
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.rounding import NetworkRounder
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.solve.record import LayerRecord
from distributed_adaround.spec.job import MethodSpec, OutputSpec
from distributed_adaround.spec.model import ModelSpec
from distributed_adaround.spec.quantize import QuantizeSpec


def finished(
    folder: Path,
    opened: OpenedModel | nn.Module,
    batches: Sequence[CallerBatch],
    exporter: Exporter,
    quantize: Mapping[str, Any],
    output: Mapping[str, Any],
    source: ModelSpec | None = None,
    directory: Path | None = None,
    capture: bool = True,
) -> ExportTask:
    """Round a model with deliberately not-nearest codes, write the result into `folder` / "out", and open it.

    capture: find the layers as a job does, which takes seconds; else all nn.Linear but the head are taken.

    The exporter's scale_dtype and check are asked as in a job. The model has the quantized weights afterwards.
    """
    opened = opened if isinstance(opened, OpenedModel) else OpenedModel(opened.eval().requires_grad_(False))
    uri, files = str(folder / "out"), LocalFiles(folder / "files")
    comm, context = SoloComm(), RankContext.from_environment("cpu", None)
    spec = MethodSpec(quantize=dict(quantize), rounding={"solver": "nearest"})
    source = ModelSpec(factory="toy:model") if source is None else source
    plan = ExportPlan((), OutputSpec(uri=uri, **output), source, opened.widest_dtype, directory, files)
    spec = spec.model_copy(update={"quantize": spec.quantize.with_scales(scale_dtype([exporter], plan))})
    microbatches = Microbatches.of_list(batches, comm, sharded=False)
    if capture:
        captured = capture_model(opened, microbatches, spec.quantize, spec.runtime, context, comm)
        planned = [(site, each.format) for each in captured.planned if each.format is not None for site in each.sites]
    else:
        planned = _linear_layers(opened.model, spec.quantize)
    tensors = opened.weights
    layers = {site.stored_name: planned_layer(site, form, tensors[site.weight_name]) for site, form in planned}
    exported = not capture or isinstance(captured.walker, GraphWalker)
    plan = replace(plan, layers=list(layers.values()), exported=exported)
    exporter.check(plan)
    if capture:
        records = list(NetworkRounder(spec, comm).run(captured, microbatches).records)
    else:
        records = [(site, _nearest(site, form, tensors[site.weight_name])) for site, form in planned]
    solved = []
    for site, record in records:
        moved = _moved(record)
        weight = opened.weights[site.weight_name]
        place = weight if site.view is None else site.view.of(weight)
        place.copy_(moved.dequantize(weight.dtype))
        solved.append((layers[site.stored_name], moved))
    write_codes(
        SolvedModel(opened.weights, solved, opened.widest_dtype, (), opened.checkpoint, opened.shard_bytes),
        uri,
        source="test",
    )
    return ExportTask(
        **vars(plan),
        result=StoredResult.open(uri, files),
        model=lambda: opened.model,
        inputs=lambda: [microbatches.load(0)],
    )


def _linear_layers(model: Any, quantize: QuantizeSpec) -> list[tuple[Site, LayerFormat]]:
    heads = head_names(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in heads:
            layer_format = quantize.for_layer(name, "Linear")
            if layer_format is not None:
                geometry = LayerGeometry(tuple(module.weight.shape))
                layer_format.check(name, geometry.inputs_per_output)
                found.append((Site(name, "Linear", f"{name}.weight", None, geometry), layer_format))
    return found


def _nearest(site: Site, layer_format: LayerFormat, weight: torch.Tensor) -> LayerRecord:
    channels = site.geometry.to_channels(weight.float())
    grid = choose_grid(channels, layer_format)
    figures = toy_records.figures_of(site.name)
    return LayerRecord.of(figures, site.geometry, layer_format, grid.quantize(channels), grid, None)


def _moved(record: LayerRecord) -> LayerRecord:
    """Every third code one step away from the nearest, where the range allows it."""
    codes = record.codes.clone(memory_format=torch.contiguous_format)
    if record.format["element_format"] is None:
        flat = codes.view(-1)[::3]
        flat.copy_((flat + 1).clamp(max=record.format["quant_max"]))
    else:
        # Of bit patterns, the next smaller magnitude; 0 stays, and with it no -0 comes up.
        flat = codes.view(torch.uint8).view(-1)[::3]
        bits = 0x7F if record.codes.dtype == torch.float8_e4m3fn else 0x7
        magnitude = flat & bits
        flat.copy_(torch.where(magnitude > 1, flat - 1, flat))
    return replace(record, codes=codes)
