"""launch/torchrun.sh: the loop around torchrun with a stand-in for Python, then real jobs on two ranks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import chdir
from pathlib import Path

import launched
import pytest
from held import hold
from launched import SCRIPT, SHORT, committed, finish, kill_rank, killed_at_the_end, prepare, results, start, until

from distributed_adaround import cli

# What the script calls: `validate`, `status`, torchrun, and real Python for the rest. Each start of torchrun does the
# next line of the plan: its exit code ("wait": until a signal ends it), what the ranks leave in the status file ("-":
# nothing), the job's status line.
STAND_IN = """#!/bin/bash
folder=$(dirname "$0")
case "$*" in
  "-m distributed_adaround validate"*) exit "$(cat "$folder/validate" 2>/dev/null || echo 0)" ;;
  "-m distributed_adaround status"*)
    [[ -s $folder/status ]] || exit 75
    IFS=: read -r code line <"$folder/status"; echo "$line"; exit "$code" ;;
  "-m torch.distributed.run"*)
    echo "$*" >>"$folder/starts"
    read -r code said status <<<"$(sed -n "$(wc -l <"$folder/starts")p" "$folder/plan")"
    echo "$status" >"$folder/status"
    [[ $code != wait ]] || exec sleep 600
    [[ $said == - ]] || echo "{\\"exit_code\\": $said}" >"$ADAROUND_STATUS_FILE"
    exit "$code" ;;
  *) exec REAL "$@" ;;
esac
"""


def play(
    folder: Path, plan: Iterable[str], before: str = "", stop: bool = False, **variables: str
) -> tuple[int, list[str], str]:
    """Exit code of the script, the arguments of each start of torchrun, stderr. before: the job's status line. stop:
    SIGTERM to the script at its first start."""
    python = folder / "python"
    python.write_text(STAND_IN.replace("REAL", sys.executable), encoding="utf-8")
    python.chmod(0o755)
    (folder / "plan").write_text("\n".join(plan) + "\n", encoding="utf-8")
    (folder / "starts").touch()
    (folder / "status").write_text(before, encoding="utf-8")
    environment = {**os.environ, "PYTHON": str(python), "NPROC": "2", **variables}
    process = subprocess.Popen(
        [str(SCRIPT), "job.yaml", "--set", "a=b c"], env=environment, stderr=subprocess.PIPE, text=True
    )
    with killed_at_the_end(process):
        if stop:
            # It has written the job's status when nothing but the signal is left to wait for.
            until((folder / "status").read_text, "first start")
            process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=launched.DEADLINE)
    return process.returncode, (folder / "starts").read_text(encoding="utf-8").splitlines(), stderr


def test_arguments_reach_torchrun_as_they_are(tmp_path: Path) -> None:
    code, starts, _ = play(tmp_path, ["0 - 0:done"], GRACE_SECONDS="7")
    assert code == 0
    (arguments,) = starts
    assert arguments.endswith(" --standalone -m distributed_adaround run job.yaml --set a=b c")
    assert "--nproc-per-node=2 --max-restarts=0 --shutdown-timeout=7 --log-dir=" in arguments


def test_several_machines_meet_at_the_first(tmp_path: Path) -> None:
    where = {"NNODES": "3", "RDZV_ENDPOINT": "n0:29400", "RDZV_ID": "j.1", "LOCAL_ADDR": "10.0.0.2"}
    code, (arguments,), _ = play(tmp_path, ["0 - 0:done"], NODE_RANK="1", JOIN_SECONDS="9", **where)
    assert code == 0
    meeting = "--nnodes=3 --rdzv-backend=c10d --rdzv-endpoint=n0:29400 --rdzv-id=j.1"
    assert f" {meeting} --rdzv-conf=join_timeout=9,is_host=0 --local-addr=10.0.0.2 -m " in arguments
    for variable in ("JOB_COMPLETION_INDEX", "SLURM_NODEID"):
        folder = tmp_path / variable
        folder.mkdir()
        code, (arguments,), _ = play(folder, ["0 - 0:done"], **where, **{variable: "0"})
        assert code == 0
        assert "join_timeout=120,is_host=1 " in arguments


@pytest.mark.parametrize("code", [64, 65, 70, 73])
def test_what_no_restart_can_mend_ends_at_once(tmp_path: Path, code: int) -> None:
    ended, starts, _ = play(tmp_path, [f"1 {code} {code}:failed"])
    assert (ended, len(starts)) == (code, 1)


def test_an_error_on_another_machine_ends_it_too(tmp_path: Path) -> None:
    """The ranks here only lost a peer, or torchrun ended them first; the job's record says why."""
    for said in ("75", "-"):
        (tmp_path / "starts").unlink(missing_ok=True)
        ended, starts, _ = play(tmp_path, [f"1 {said} 65:failed"])
        assert (ended, len(starts)) == (65, 1)


def test_a_record_of_an_earlier_start_is_not_believed(tmp_path: Path) -> None:
    """No rank of this machine began: the machines did not find each other."""
    ended, starts, _ = play(tmp_path, ["1 - 65:failed: a", "0 - 0:done"], before="65:failed: a")
    assert (ended, len(starts)) == (0, 2)
    (tmp_path / "starts").unlink()
    ended, starts, _ = play(tmp_path, ["1 - 65:failed: b"], before="65:failed: a")
    assert (ended, len(starts)) == (65, 1)


def test_a_record_that_cannot_be_read_is_not_believed(tmp_path: Path) -> None:
    ended, starts, _ = play(tmp_path, ["1 75 65:", "0 - 0:done"])
    assert (ended, len(starts)) == (0, 2)


def test_a_job_that_was_done_is_done_although_torchrun_failed(tmp_path: Path) -> None:
    assert play(tmp_path, ["1 - 0:done, 8 of 8 layers"])[0] == 0


def test_a_signal_ends_it_without_another_start(tmp_path: Path) -> None:
    ended, starts, stderr = play(tmp_path, ["wait - 75:stopped, 3 of 8 layers"], stop=True)
    assert (ended, len(starts)) == (75, 1)
    assert "starts again" not in stderr


def test_it_gives_up_when_no_layer_gets_done(tmp_path: Path) -> None:
    plan = ["1 - 75:running, 3 of 8 layers: port 1", "1 75 75:running, 3 of 8 layers: port 2"] * 2
    ended, starts, stderr = play(tmp_path, plan, RESTARTS="1")
    # The first failure shows the layers that were there; after that there is one more try.
    assert (ended, len(starts)) == (75, 2)
    assert "no new layer" in stderr


def test_new_layers_count_as_a_new_beginning(tmp_path: Path) -> None:
    plan = [f"1 - 75:running, {layers} of 8 layers" for layers in (1, 2, 3, 4)] + ["0 - 0:done"]
    ended, starts, _ = play(tmp_path, plan, RESTARTS="1")
    assert (ended, len(starts)) == (0, 5)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "0"}, "NPROC=0"),
        ({"NPROC": "08"}, "NPROC=08"),
        ({"NNODES": "a[$(touch made)]"}, "NNODES=a["),
        ({"RESTARTS": "-1"}, "RESTARTS=-1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "RDZV_ENDPOINT="),
        ({"NNODES": "2", "RDZV_ENDPOINT": "n0:1"}, "NODE_RANK="),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path: Path, variables: dict[str, str], named: str) -> None:
    ended, starts, stderr = play(tmp_path, ["0 - 0:done"], **variables)
    assert (ended, starts) == (64, [])
    (line,) = stderr.splitlines()
    assert line.startswith(f"torchrun.sh: {named}")
    assert not (Path.cwd() / "made").exists()


def test_help_shows_the_variables() -> None:
    shown = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert "RDZV_ENDPOINT" in shown
    assert "set -" not in shown
    assert subprocess.run([str(SCRIPT)], capture_output=True, check=False).returncode == 64


@pytest.mark.slow
def test_a_killed_rank_costs_one_start_and_no_byte(reference: dict[str, str], tmp_path: Path) -> None:
    job = prepare(tmp_path / "job")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    output = job.parent / "adaround"
    # The other rank waits behind its second layer until torchrun ends it.
    mark, variables = hold(tmp_path / "hold", "commits/manifest.json", count=2)
    with killed_at_the_end(start(job, *SHORT, TMPDIR=str(scratch), **variables)) as process:
        until(mark.exists, "second layer")
        kill_rank(process.pid, rank=1)
        ended = finish(process)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("torchrun.sh: the job ended before it was done; it starts again in 1 s") == 1
    assert results(output) == reference
    # Nothing is left behind but torch's own cache.
    assert {path.name.partition("_")[0] for path in scratch.iterdir()} <= {"torchinductor"}


@pytest.mark.slow
def test_sigterm_saves_and_ends_without_a_restart(reference: dict[str, str], tmp_path: Path) -> None:
    job = prepare(tmp_path / "job")
    output = job.parent / "adaround"
    mark, variables = hold(tmp_path / "hold", "commits/manifest.json", count=2)
    with killed_at_the_end(start(job, *SHORT, GRACE_SECONDS="60", **variables)) as process:
        until(mark.exists, "second layer")
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.returncode == 75, ended.stderr
    # Ranks that had to be killed would have said nothing.
    assert json.loads((output / "status.json").read_text(encoding="utf-8"))["state"] == "stopped"
    assert "starts again" not in ended.stderr
    layers = committed(output)
    assert 2 <= layers < 8
    with chdir(job.parent):
        assert cli.main([job.name, *SHORT]) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert sum(layer["resumed"] for layer in report["layers"]) == layers
    assert results(output) == reference


def test_a_bad_job_file_starts_nothing(tmp_path: Path) -> None:
    job = prepare(tmp_path)
    with killed_at_the_end(start(job, "--set", "rounding.max_iter=-1")) as process:
        ended = finish(process)
    assert ended.returncode == 64
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: rounding.max_iter: -1 ")


def test_the_command_line_runs_the_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distributed_adaround", "launch", "torchrun"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "RDZV_ENDPOINT" in shown
    job = prepare(tmp_path)
    ended = subprocess.run([*command, str(job), "--set", "a=1"], capture_output=True, text=True, check=False)
    assert ended.returncode == 64
    assert ended.stderr.startswith("error: a: ")
    assert launched.SCRIPT.resolve().is_relative_to(Path(sys.modules["distributed_adaround"].__file__).parent)
