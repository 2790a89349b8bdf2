"""Results as JSON lines, one per case, written as soon as it is done; and the table that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]
FILE_NAME = "results.jsonl"


def append(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def table(folder: Path) -> str:
    """Of each trial the records of its last run, in Markdown."""
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    latest: dict[str, list[Record]] = {}
    for record in map(json.loads, lines):
        known = latest.setdefault(record["trial"], [])
        if known and known[0]["run"] != record["run"]:
            known.clear()
        known.append(record)
    head = ["| trial | went well | figures | command |", "|---|---|---|---|"]
    return "\n".join(head + [_row(trial, found) for trial, found in latest.items()])


def _row(trial: str, records: list[Record]) -> str:
    good = sum(record["ok"] for record in records)
    figures = []
    kills = [kill for record in records for kill in record.get("kills", ())]
    if kills:
        figures.append(f"{len(kills)} kills")
    for name, text in (
        ("recovery_seconds", "back at work"),
        ("end_seconds", "all ended"),
    ):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            figures.append(f"{text} after {median(values):.1f} s (median), {max(values):.1f} s (most)")
    return f"| {trial} | {good} of {len(records)} | {'; '.join(figures)} | `{records[0]['command']}` |"
