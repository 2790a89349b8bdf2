"""How a job stands: who may write it, and what a launcher reads from it."""

import json
from pathlib import Path

import pytest

from distributed_adaround.errors import InputError, OutputError, PeerError, SpecError, StoppedError
from distributed_adaround.report.status import LOCAL_FILE, JobStatus, Status, read_status, record_failure


def read(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_a_job_that_runs_and_ends(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert read_status(uri) is None
    status = JobStatus(uri, "abc", 5, rank=0)
    status.running(2)
    found = read_status(uri)
    assert found == Status("abc", "running", None, "", 2, 5)
    assert found.launch_code == 75
    assert str(found) == "running, 2 of 5 layers"
    status.done()
    found = read_status(uri)
    assert found == Status("abc", "done", 0, "", 5, 5)
    assert found.launch_code == 0
    assert str(found) == "done, 5 of 5 layers"
    assert read(tmp_path).keys() >= {"version", "time"}


def test_other_ranks_than_0_write_nothing(tmp_path: Path) -> None:
    status = JobStatus(str(tmp_path), "abc", 5, rank=1)
    status.running(0)
    status.done()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "state", "shown"),
    [
        (InputError("bad data"), "failed", "failed, 2 of 5 layers, exit code 65: bad data"),
        (OutputError("disk full"), "failed", "failed, 2 of 5 layers, exit code 73: disk full"),
        (PeerError("lost"), "failed", "failed, 2 of 5 layers, exit code 75: lost"),
        (StoppedError("stopped"), "stopped", "stopped, 2 of 5 layers, exit code 75: stopped"),
    ],
)
def test_a_job_that_failed(tmp_path: Path, error: Exception, state: str, shown: str) -> None:
    JobStatus(str(tmp_path), "abc", 5, rank=0).running(2)
    code = error.exit_code  # type: ignore[attr-defined]
    record_failure(str(tmp_path), "abc", error, code, str(error))
    found = read_status(str(tmp_path))
    assert found is not None
    assert (found.state, found.launch_code, str(found)) == (state, code, shown)


def test_a_job_that_failed_before_it_began(tmp_path: Path) -> None:
    record_failure(str(tmp_path), "abc", InputError("no such file"), 65, "no such file")
    assert read_status(str(tmp_path)) == Status("abc", "failed", 65, "no such file", 0, 0)


def test_a_wrong_job_file_leaves_no_trace_in_the_output(tmp_path: Path) -> None:
    record_failure(str(tmp_path / "out"), "abc", SpecError("x"), 64, "x")
    assert not (tmp_path / "out").exists()


def test_the_status_of_another_job_stays(tmp_path: Path) -> None:
    JobStatus(str(tmp_path), "theirs", 5, rank=0).done()
    before = read(tmp_path)
    record_failure(str(tmp_path), "ours", InputError("not yours"), 65, "not yours")
    assert read(tmp_path) == before


def test_a_lost_peer_does_not_hide_why_it_was_lost(tmp_path: Path) -> None:
    uri = str(tmp_path)
    JobStatus(uri, "abc", 5, rank=0).running(2)
    record_failure(uri, "abc", InputError("bad data"), 65, "bad data")
    record_failure(uri, "abc", PeerError("lost"), 75, "lost")
    assert read(tmp_path)["exit_code"] == 65
    # The other way round, too.
    JobStatus(uri, "abc", 5, rank=0).running(2)
    record_failure(uri, "abc", PeerError("lost"), 75, "lost")
    record_failure(uri, "abc", InputError("bad data"), 65, "bad data")
    assert read(tmp_path)["exit_code"] == 65


def test_no_credentials(tmp_path: Path) -> None:
    record_failure(str(tmp_path), "abc", InputError("x"), 65, "s3://me:secret@host/data: no such file")
    assert read(tmp_path)["message"] == "s3://host/data: no such file"


def test_an_output_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    record_failure(str(tmp_path / "out"), "abc", OutputError("full"), 73, "full")


_WHOLE = '{"job": "a", "state": "failed", "exit_code": 65, "message": "", "layers_done": 1, "layers": 2}'


@pytest.mark.parametrize(
    "content",
    [
        "", "{}", "[]", "{", '{"job": "abc"}', "[" * 100_000,
        _WHOLE.replace("65", '"65"'), _WHOLE.replace("65", "6.5"), _WHOLE.replace("65", "true"),
        _WHOLE.replace("failed", "fallen"), _WHOLE.replace('"failed"', "[]"), _WHOLE.replace("2", "null"),
    ],
)  # fmt: skip
def test_a_damaged_status_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"status.json is damaged"):
        read_status(str(tmp_path))


def test_the_local_file_has_the_code_that_matters_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status"
    monkeypatch.setenv(LOCAL_FILE, str(path))
    record_failure(None, "", PeerError("lost"), 75, "lost")
    assert json.loads(path.read_text()) == {"exit_code": 75, "message": "lost"}
    record_failure(None, "", InputError("bad"), 65, "bad")
    record_failure(None, "", PeerError("lost"), 75, "lost")
    assert json.loads(path.read_text()) == {"exit_code": 65, "message": "bad"}


def test_no_local_file_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    record_failure(None, "", InputError("bad"), 65, "bad")
    assert not list(tmp_path.iterdir())
