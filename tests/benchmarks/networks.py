"""Starts the runs over whole networks, each in a process of its own, so that its peak memory is its own.

This process imports no torch: a child starts with its parent's size as its largest one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import records
from tests.benchmarks.configurations import ANCESTOR, CASES, is_random


@dataclass(frozen=True)
class NetworkOptions:
    """What the command line says. partial: (layers, steps) of the ancestor that are measured, None: all."""

    folder: Path
    out: Path
    cases: Sequence[str]
    formats: Sequence[str]
    solvers: Sequence[str]
    seeds: Sequence[int]
    settings: Sequence[str] = ()
    samples: tuple[int, int] | None = None
    vary_samples: bool = False
    ranks: int = 1
    partial: tuple[int | None, int | None] = (None, None)
    device: str = "cpu"
    again: bool = False


def run_networks(options: NetworkOptions) -> None:
    """All runs that have no line yet, one after the other."""
    for head in _heads(options):
        done = set() if options.again else records.finished(records.read(options.out))
        if records.key(head) in done:
            continue
        print(f"{head['case']} {head['format']} {head['solver']} seed {head['seed']} ...", flush=True)
        job = {"head": head, "folder": str(options.folder), "out": str(options.out)}
        result = subprocess.run(_command(job, head["ranks"]), stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            print(result.stderr, file=sys.stderr)
            lines = result.stderr.strip().splitlines() or ["no message"]
            # The line of an exception, not what torchrun says after it.
            errors = [line for line in lines if "Error: " in line and not line.startswith(" ")]
            error = next((line for line in reversed(errors) if "ChildFailedError" not in line), lines[-1])
            records.append(options.out, {**head, "failed": f"exit {result.returncode}: {error[:300]}"}, machine={})


def _heads(options: NetworkOptions) -> Iterator[records.Record]:
    for case in options.cases:
        samples = options.samples or (CASES[case].num_calibration, CASES[case].num_held_out)
        for number_format in options.formats:
            for solver in options.solvers:
                random = options.vary_samples or is_random(solver)
                for seed in options.seeds if random else options.seeds[:1]:
                    ancestor = solver.partition("@")[0] == ANCESTOR
                    yield {
                        "part": "networks", "case": case, "format": number_format, "solver": solver, "seed": seed,
                        "samples": list(samples), "settings": list(options.settings),
                        "vary_samples": options.vary_samples, "ranks": 1 if ancestor else options.ranks,
                        "partial": list(options.partial) if ancestor else None, "device": options.device,
                    }  # fmt: skip


def _command(job: dict[str, Any], ranks: int) -> list[str]:
    here = ["-m", "tests.benchmarks", "one", json.dumps(job)]
    if ranks == 1:
        return [sys.executable, *here]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, *here]
