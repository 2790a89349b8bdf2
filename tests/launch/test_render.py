"""`launch slurm` and `launch kubernetes`: what they write and refuse; shipped files are what they write."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_adaround import cli
from distributed_adaround.examples.digits import data

ROOT = Path(__file__).parents[2]
JOB = data.FOLDER / "job.yaml"
SLURM = ["launch", "slurm", str(JOB), "--nodes", "2"]
KUBERNETES = ["launch", "kubernetes", str(JOB), "--nodes", "2", "--image", "registry.example.com/a:1", "--claim", "c"]
REMOTE = """
model: {program: s3://m/model.pt2}
data: {uri: "s3://d/*.npz"}
output: {uri: s3://o/out}
"""


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why."""
    assert cli.main(arguments) == 64
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def objects(text: str) -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def shipped() -> list[Any]:
    """Each file below launch/ that is rendered, with the command in its first lines."""
    found = []
    for path in sorted((ROOT / "launch").rglob("*.*")):
        match = re.search(r"^# Made by: python -m distributed_adaround (.*)$", path.read_text(encoding="utf-8"), re.M)
        if match:
            found.append(pytest.param(path, shlex.split(match[1]), id=path.name))
    return found


@pytest.mark.parametrize(("path", "arguments"), shipped())
def test_shipped_files_are_rendered(
    path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To refresh them: run the command that each names, in the folder of the digits example, into the file."""
    monkeypatch.chdir(JOB.parent)
    assert rendered(capsys, *arguments) == path.read_text(encoding="utf-8")


def test_every_launcher_has_a_shipped_file() -> None:
    names = {str(param.values[0].relative_to(ROOT / "launch")) for param in shipped()}
    kinds = {f"kubernetes/digits-{kind}.yaml" for kind in ("job", "jobset", "trainjob")}
    assert names == {"slurm/digits.sbatch", "slurm/digits-container.sbatch", *kinds}


def test_torchrun_script_is_that_of_the_package() -> None:
    assert (ROOT / "launch" / "torchrun.sh").resolve() == ROOT / "distributed_adaround" / "launch" / "torchrun.sh"


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--nodes", "0", "--nodes: '0'"),
        ("--nodes", "-1", "--nodes: '-1'"),
        ("--nodes", "two", "--nodes: 'two'"),
        ("--nodes", "9", "--nodes: 9 with 1 ranks each"),
        ("--gpus", "1", "--gpus: 1, but the job has runtime.device=cpu"),
        ("--nodes", "9" * 5000, "--nodes: '99"),
        ("--cpus", "1.5", "--cpus: '1.5'"),
        ("--cpus", "0", "--cpus: '0' must be 1 or more; use 4, the default"),
        ("--ranks", "0", "--ranks: '0'"),
        ("--grace", "1", "--grace: '1'"),
        ("--memory", "many", "--memory: 'many'"),
        ("--name", "Upper", "--name: 'Upper'"),
        ("--name", "a" * 41, "--name: "),
        ("--name", "a\nb", "'a\\nb' holds a control character"),
        ("--name", "a;b", "--name: 'a;b'"),
        ("--name", "", "--name: ''"),
        ("--set", "rounding.max_iter=-1", "rounding.max_iter: -1"),
    ],
)
@pytest.mark.parametrize("command", [SLURM, KUBERNETES], ids=["slurm", "kubernetes"])
def test_bad_arguments_of_both_are_refused(
    command: list[str], option: str, value: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *command, option, value)
    assert line.startswith(f"error: {named}"), line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--time", "soon"], "--time: 'soon'"),
        (["--partition", "a b"], "--partition: 'a b'"),
        (["--account", "$(id)"], "--account: '$(id)'"),
        (["--image", "a.sif"], "--container: is missing; --image and --container go together"),
        (["--container", "pyxis"], "--image: is missing; --image and --container go together"),
        (["--container", "pyxis", "--image", "a b"], "--image: 'a b'"),
        (["--mount", "/data"], "--mount: without --image"),
        (["--container", "pyxis", "--image", "a", "--mount", "data"], "--mount: 'data'"),
        (["--container", "pyxis", "--image", "a", "--mount", "/a:/etc"], "--mount: '/a:/etc'"),
    ],
)
def test_bad_arguments_of_slurm_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *SLURM, *arguments).startswith(f"error: {named}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image", "Upper/Case:tag tag"], "--image: "),
        (["--claim", "a_b"], "--claim: 'a_b'"),
        (["--secret", "a/b"], "--secret: 'a/b'"),
        (["--service-account", ""], "--service-account: ''"),
        (["--set", "output.uri=/tmp/out"], "output.uri: '/tmp/out' would be lost"),
        (["--set", "output.uri=file:///out"], "output.uri: '/out' would be lost"),
        (["--set", "data.uri=https://me:secret@host/x.npz"], "data.uri: holds a password"),
    ],
)
def test_bad_arguments_of_kubernetes_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *KUBERNETES, *arguments)
    assert line.startswith(f"error: {named}")
    assert "secret@" not in line


def test_files_that_no_pod_could_see_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *KUBERNETES[:-2])
    assert line.startswith("error: data.uri: 'calibration.npz' is a path in the pod, where it does not exist")


def test_gpus_and_ranks_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(REMOTE, encoding="utf-8")
    command = ["launch", "slurm", str(tmp_path / "job.yaml"), "--nodes", "2"]
    assert refused(capsys, *command, "--gpus", "8", "--ranks", "4").startswith("error: --ranks: 4 with 8 GPUs")
    cuda = ["--set", "runtime.device=cuda"]
    assert refused(capsys, *command, *cuda).startswith("error: --gpus: 0, but the job has runtime.device=cuda")


def test_texts_of_any_kind_reach_the_job_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bash takes the words of the script apart again, a YAML reader those of the manifest."""
    job = tmp_path / "it's a $(touch job) `file`.yaml"
    job.write_text(REMOTE, encoding="utf-8")
    texts = [
        f"output.uri=s3://o/{text}" for text in ("a b", "'", '"', "$HOME", "`id`", "# no comment", "1e3", "ü", "\\")
    ]
    options = [part for text in texts for part in ("--set", text)]
    wanted = [str(job), *options]
    script = rendered(capsys, "launch", "slurm", *wanted, "--nodes", "2", "--name", "a")
    words = "\n".join(line for line in script.splitlines() if line.startswith("job="))
    print_them = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    show = f'{words}\nexec {shlex.join(print_them)} "${{job[@]}}"'
    ended = subprocess.run(["bash", "-c", show], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == wanted
    manifest = rendered(
        capsys, "launch", "kubernetes", *wanted, "--nodes", "2", "--name", "a", "--image", "a", "--secret", "1e3"
    )
    container = objects(manifest)["Job"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["/etc/adaround/job.yaml", *options]
    assert container["envFrom"] == [{"secretRef": {"name": "1e3"}}]
    # Other readers of YAML would take it for a number.
    assert '"name": "1e3"' in manifest
    assert list(tmp_path.iterdir()) == [job]


def test_the_job_file_is_carried_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_json = json.dumps(yaml.safe_load(REMOTE), indent=1)
    indented = f"  {REMOTE.strip()}  \n\n \n".replace("\n", "\n  ")
    odd = as_json.replace("o/out", "$name \u2028 \U0001f642")
    files = [(".yaml", REMOTE), (".yaml", REMOTE.strip()), (".yaml", indented)]
    files += [(".json", f"{as_json}\n\n"), (".json", f"\t{as_json}"), (".json", odd)]
    for suffix, text in files:
        job = tmp_path / f"a{suffix}"
        job.write_text(text, encoding="utf-8")
        found = objects(rendered(capsys, "launch", "kubernetes", str(job), "--nodes", "1", "--image", "a"))
        assert found["ConfigMap"]["data"] == {f"job{suffix}": text}


def test_memory_is_given_in_the_units_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert "#SBATCH --mem=1908M\n" in rendered(capsys, *SLURM, "--memory", "2GB")
    pod = objects(rendered(capsys, *KUBERNETES, "--memory", "2GB"))["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "1908Mi"}


def test_the_same_pod_runs_in_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    pods = {}
    for kind in ("job", "jobset", "trainjob"):
        found = objects(rendered(capsys, *KUBERNETES, "--kind", kind, "--name", "digits"))
        if kind == "job":
            job = found["Job"]["spec"]
            assert job["template"]["spec"].pop("subdomain") == found["Service"]["metadata"]["name"]
            assert found["Service"]["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
        else:
            of_set = (
                found["JobSet"]["spec"] if kind == "jobset" else found["TrainingRuntime"]["spec"]["template"]["spec"]
            )
            job = of_set["replicatedJobs"][0]["template"]["spec"]
        pods[kind] = pod = job["template"]["spec"]
        (endpoint,) = [entry for entry in pod["containers"][0]["env"] if entry["name"] == "RDZV_ENDPOINT"]
        assert endpoint.pop("value") == ("digits-0.digits" if kind == "job" else "digits-node-0-0.digits") + ":29400"
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [64, 65, 70, 73]
    assert pods["job"] == pods["jobset"] == pods["trainjob"]


def test_out_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rendered(capsys, *SLURM, "--out", str(tmp_path / "a.sbatch")) == ""
    assert (tmp_path / "a.sbatch").read_text(encoding="utf-8").startswith("#!/bin/bash\n")


def test_the_commands_of_the_guide_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of launch/README.md that write a file, for a job whose files are in an object store."""
    guide = (ROOT / "launch" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python -m distributed_adaround (launch (?:slurm|kubernetes) .*)$", guide, re.M)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(REMOTE, encoding="utf-8")
    for command in commands:
        words = shlex.split(command)
        assert rendered(capsys, *words) == ""
        assert Path(words[-1]).exists()
