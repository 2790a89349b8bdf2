"""A few of the fault trials, on jobs of some seconds, and proof that their verdicts can be bad."""

import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import disk, hang, jobs, kills, launch, records, saves, stop
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Verdict

CHANGES = {"data": {"num_samples": 30}, "rounding": {"sweeps": 10}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("faults"), seed=0, changes=CHANGES, steady=True)
    launch.end_all()


@pytest.fixture
def job(bench: Bench) -> Job:
    bench.draw = random.Random(0)
    return bench.job("transformer-gram")


@pytest.mark.slow
def test_killed_behind_a_layer(bench: Bench, job: Job) -> None:
    record = kills.one_job(bench, job, 1)
    assert record["problems"] == []
    assert len(record["kills"]) == 1


@pytest.mark.slow
def test_torchrun_dies_and_takes_its_ranks_along(bench: Bench, job: Job) -> None:
    output, verdict = bench.output(), Verdict()
    attempt, reached = bench.start(job, output, 2)
    assert attempt.wait_until(reached)
    attempt.process.kill()
    attempt.thaw()
    verdict.ended(attempt)
    assert verdict.problems == []
    assert jobs.committed(output) < jobs.committed(bench.reference(job))


@pytest.mark.slow
def test_killed_inside_a_save(bench: Bench, job: Job) -> None:
    assert saves.one_save(bench, job, Fault.parse("kill:half:commits/manifest.json:2:0"))["problems"] == []


@pytest.mark.slow
def test_a_full_disk(bench: Bench, job: Job) -> None:
    """Only root may mount a small one; a limit on file sizes does for others."""
    kind = "full" if os.geteuid() == 0 else "file size"
    assert disk.one_case(bench, job, kind, 2)["problems"] == []


@pytest.mark.slow
def test_asked_to_stop_twice(bench: Bench, job: Job) -> None:
    assert stop.one_stop(bench, job, "twice", 2)["problems"] == []


def test_a_rank_that_hangs(bench: Bench, job: Job) -> None:
    assert hang.one_hang(bench, job, "talk", 2, 1, timeout=8)["problems"] == []


def _copy(bench: Bench, job: Job) -> tuple[Path, Path]:
    reference, output = bench.reference(job), bench.output()
    shutil.copytree(reference, output)
    return output, reference


@pytest.mark.parametrize("name", [*jobs.PUBLISHED, "commits/layers/00000-blocks.0.query.safetensors"])
def test_a_changed_bit_and_a_missing_file_are_noticed(bench: Bench, job: Job, name: str) -> None:
    output, reference = _copy(bench, job)
    data = bytearray((output / name).read_bytes())
    data[len(data) // 2] ^= 1
    (output / name).write_bytes(data)
    for judge in ("same_bytes", "whole"):
        verdict = Verdict()
        getattr(verdict, judge)(output, reference)
        assert verdict.problems, judge
    (output / name).unlink()
    verdict = Verdict()
    verdict.same_bytes(output, reference)
    assert len(verdict.problems) == 1


def test_temporary_files_and_half_lines_are_noticed(bench: Bench, job: Job) -> None:
    output, reference = _copy(bench, job)
    (output / "commits" / ".x.tmp").touch()
    (output / "events" / "rank-0.jsonl").write_text('{"event": "sta', encoding="utf-8")
    verdict = Verdict()
    verdict.same_bytes(output, reference)
    verdict.whole(output, reference)
    assert len(verdict.problems) == 2


def test_orphans_and_spilled_files_are_noticed(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex  # others may run this test at the same time
    environment = {**os.environ, launch.MARK: mark}
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)"
    process = subprocess.Popen([sys.executable, "-c", child + "; import os; os._exit(0)"], env=environment)
    process.wait()
    (tmp_path / "adaround-1.spill").touch()
    attempt = launch.Attempt(process, mark, tmp_path / "log", tmp_path)
    (pid,) = launch.marked(mark) or (0,)
    found = attempt.leftovers(grace=0)
    assert [text for text in found if "adaround-1.spill" in text]
    assert [text for text in found if str(pid) in text] or pid == 0
    attempt.wait_for_ranks()
    assert launch.marked(mark) == []


@pytest.mark.parametrize("text", ["kill:nowhere:x:1:0", "shout:talk:-:1:0", "term:half:x:1:0"])
def test_faults_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        Fault.parse(text)


def test_the_table_shows_the_last_run_of_each_trial(tmp_path: Path) -> None:
    base = {"job": "cnn-gram", "problems": [], "command": "c", "seconds": 1.0, "case": "x"}
    for run, ok in ((1, False), (2, True), (2, True), (2, False)):
        records.append(tmp_path, {**base, "trial": "kills", "run": run, "ok": ok, "end_seconds": 2.0})
    records.append(tmp_path, {**base, "trial": "saves", "run": 3, "ok": False, "kills": [{}, {}]})
    assert records.table(tmp_path).splitlines()[2:] == [
        "| kills | 2 of 3 | all ended after 2.0 s (median), 2.0 s (most) | `c` |",
        "| saves | 0 of 1 | 2 kills | `c` |",
    ]
