"""One run over a whole network, in a process of its own or in one process per rank."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distributed_adaround.api import quantize
from distributed_adaround.errors import SpecError
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.spec.job import MethodSpec
from tests.benchmarks import records
from tests.benchmarks.ancestor import AncestorSettings, round_network
from tests.benchmarks.cases import Batch, batches, load_case, metrics_of
from tests.benchmarks.compare import held_out_errors
from tests.benchmarks.configurations import (
    ANCESTOR,
    CASES,
    inputs_of_layers,
    method_spec,
    quantize_fields,
)
from tests.benchmarks.measure import Stopwatch, counted_collectives, peak_memory


@dataclass(frozen=True)
class Setting:
    """What every solver gets."""

    head: records.Record
    module: ModuleType
    model: nn.Module
    calibration: list[Batch]
    held_out: list[Batch]
    out: Path
    device: torch.device


def run(job: Mapping[str, Any]) -> None:
    """Do one run and append its line; the line of a spec that the package refuses says so."""
    head, out = job["head"], Path(job["out"])
    case, solver = CASES[head["case"]], head["solver"].partition("@")[0]
    module = load_case(case, Path(job["folder"]))
    model = module.load_model().eval()
    try:
        fields = quantize_fields(head["format"], inputs_of_layers(model), case.ignore)
        base = "pytorch" if solver == ANCESTOR else head["solver"]
        spec = method_spec(base, fields, seed=head["seed"], device=head["device"], settings=head["settings"])
    except SpecError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"refused: {error}")
            records.append(out, {**head, "refused": str(error)})
        return
    draw = head["seed"] if head["vary_samples"] else 0
    samples = batches(module, case, tuple(head["samples"]), draw)
    setting = Setting(head, module, model, *samples, out, torch.device(head["device"]))
    lines = _run_ancestor(setting, spec) if solver == ANCESTOR else _run_package(setting, spec)
    for line in lines:
        records.append(out, line)
        print({name: value for name, value in line.items() if name not in head}, flush=True)


def _run_package(setting: Setting, spec: MethodSpec) -> list[records.Record]:
    """One line from rank 0, none from the others."""
    context = RankContext.from_environment(setting.head["device"])
    start = peak_memory()["peak_host"]
    with process_group(context, timeout_minutes=120) as comm, counted_collectives() as sent:
        watch = Stopwatch(context.device)
        result = quantize(setting.model, setting.calibration, spec, progress=False)
        seconds = watch.seconds
        totals = _over_ranks(comm, dict(sent))
    if context.rank:
        return []
    layers = [row.name for row in result.table]
    line = {
        **setting.head,
        **totals,
        **_quality(setting, result.model, layers),
        "start_host": start,
        "seconds": seconds,
        "layers_seconds": result.table.totals.seconds,
        "calibration_error": result.table.totals.hard_error,
        "unsettled": result.table.totals.unsettled,
        "num_kept_nearest": result.table.totals.num_kept_nearest,
        "num_layers": len(layers),
        "load": os.getloadavg()[0],
    }
    return [line]


def _over_ranks(comm: Comm, sent: Mapping[str, int]) -> dict[str, int]:
    """Peak memory of the largest rank; bytes and calls of all ranks together."""
    gathered = comm.all_gather_object({**peak_memory(), **sent})
    peaks = {name: max(rank[name] for rank in gathered) for name in gathered[0] if name.startswith("peak")}
    return {**peaks, "sent_bytes": sum(r["bytes"] for r in gathered), "sent_calls": sum(r["calls"] for r in gathered)}


def _quality(setting: Setting, quantized: nn.Module, layers: list[str]) -> dict[str, Any]:
    metrics = metrics_of(setting.module, quantized, setting.model, setting.device, setting.out)
    return {"metrics": metrics, **held_out_errors(setting.model, quantized, layers, setting.held_out, setting.device)}


def _run_ancestor(setting: Setting, spec: MethodSpec) -> list[records.Record]:
    """Two lines: the soft weights as they come, and their hard version as solver `ancestor-hard`."""
    head = setting.head
    names = {name: type(module).__name__ for name, module in setting.model.named_modules()}
    layers = inputs_of_layers(setting.model)
    formats = {name: found for name in layers if (found := spec.quantize.for_layer(name, names[name])) is not None}
    steps = head["solver"].partition("@")[2]
    max_layers, max_steps = head["partial"]
    defaults = AncestorSettings()
    settings = AncestorSettings(
        max_iter=int(steps) if steps else defaults.max_iter,
        max_layers=max_layers,
        max_steps=max_steps,
        seed=head["seed"],
    )
    result = round_network(copy.deepcopy(setting.model), setting.calibration, formats, settings, setting.device)
    common = {
        **peak_memory(),
        "sent_bytes": 0,
        "seconds": result.seconds,
        "measured_seconds": result.measured_seconds,
        "num_layers": len(formats),
        "load": os.getloadavg()[0],
    }
    if not result.complete:
        return [{**head, **common, "note": result.note}]
    versions = ((ANCESTOR, result.soft, "soft weights as they come"), (f"{ANCESTOR}-hard", result.hard, "hardened"))
    return [
        {**head, **common, "solver": head["solver"].replace(ANCESTOR, name), "note": note,
         **_quality(setting, model, list(formats))}
        for name, model, note in versions
    ]  # fmt: skip
