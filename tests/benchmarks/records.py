"""Results as JSON lines: one line per run, written as soon as it is done, so that a long benchmark can be cut."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FILE_NAME = "results.jsonl"
# What a run is: two lines that agree in all of these are the same run, and the later one counts.
KEY = ("part", "case", "format", "solver", "seed", "layer", "samples", "settings", "ranks", "device", "vary_samples",
       "partial", "shape")  # fmt: skip


def key(record: Mapping[str, Any]) -> str:
    return json.dumps([record.get(name) for name in KEY])


def append(folder: Path, record: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> None:
    """Add one line. machine: facts about it (default: of this one, which imports torch)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    line = json.dumps({**record, "machine": machine_facts() if machine is None else machine}) + "\n"
    # A line that an earlier run was killed in the middle of stays alone.
    begun = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + line if begun and path.stat().st_size else line)


def read(folder: Path) -> list[Record]:
    """The last line of every run. Lines that were cut in the middle are left out, and said so."""
    path = folder / FILE_NAME
    latest: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            print(f"{path}, line {number}: not whole, left out: {line[:60]}", file=sys.stderr)
            continue
        latest[key(record)] = record
    return list(latest.values())


def finished(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys of the runs that need not be done again. Those that were refused or failed are tried again."""
    return {key(record) for record in records if "failed" not in record and "refused" not in record}


@cache
def machine_facts() -> Mapping[str, Any]:
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": cuda,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Commit of the code that was measured; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
