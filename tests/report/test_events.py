import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from distributed_adaround.errors import OutputError
from distributed_adaround.report.job_log import EventLog


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_file_per_rank_that_a_resumed_job_continues(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), 3)
    log.write("start", world_size=4)
    log.flush()
    log.write("layer", name="conv1", shape=(1, 2))
    log.flush()
    log.write("lost", reason="killed before the flush")

    again = EventLog(str(tmp_path), 3)
    again.write("start", world_size=2)
    again.flush()
    EventLog(str(tmp_path), 0).flush()
    path = tmp_path / "events/rank-3.jsonl"
    assert list(tmp_path.rglob("*.*")) == [path]
    lines = _lines(path)
    assert [line["event"] for line in lines] == ["start", "layer", "start"]
    assert lines[1] | {"time": 0} == {"time": 0, "rank": 3, "event": "layer", "name": "conv1", "shape": [1, 2]}
    assert list(lines[0]) == ["time", "rank", "event", "world_size"]


def test_times_are_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    log = EventLog(str(tmp_path), 0)
    log.write("x")
    log.flush()
    time = datetime.fromisoformat(str(_lines(tmp_path / "events/rank-0.jsonl")[0]["time"]))
    assert time.utcoffset() == timedelta(0)
    assert before < time <= datetime.now(UTC)


def test_a_last_line_without_end_stays_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events/rank-0.jsonl"
    path.parent.mkdir()
    path.write_text('{"event": "old"}')
    log = EventLog(str(tmp_path), 0)
    log.write("new")
    log.flush()
    assert [line["event"] for line in _lines(path)] == ["old", "new"]


def test_lines_are_json_without_secrets(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), 0)
    log.write(
        "x",
        loss=math.inf,
        deep=[{"uri": "s3://key:secret@bucket/a.npz"}, math.nan],
        message="https://h/a?token=secret: cannot\nbe read",
    )
    log.flush()
    text = (tmp_path / "events/rank-0.jsonl").read_text()
    assert "secret" not in text
    (line,) = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert line["loss"] is None
    assert line["deep"] == [{"uri": "s3://bucket/a.npz"}, None]
    assert str(line["message"]).endswith("cannot\nbe read")


def test_stores_that_cannot_append() -> None:
    try:
        for event in ("first", "second"):
            log = EventLog("memory://events-test/out", 0)
            log.write(event)
            log.flush()
        data = fsspec.filesystem("memory").cat("/events-test/out/events/rank-0.jsonl")
    finally:
        fsspec.filesystem("memory").rm("/events-test", recursive=True)
    assert [json.loads(line)["event"] for line in data.splitlines()] == ["first", "second"]


def test_the_null_log_writes_nothing_but_still_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = EventLog(None, 0)
    log.write("x", a=1)
    log.flush()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        log.write("x", a=object())


def test_an_unwritable_target_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = EventLog(str(tmp_path / "file"), 0)
    log.write("x")
    with pytest.raises(OutputError):
        log.flush()
