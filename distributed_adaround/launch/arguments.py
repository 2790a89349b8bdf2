"""The command `launch torchrun | slurm | kubernetes`."""

import argparse
import os
import shlex
import sys
from importlib.resources import files
from pathlib import PurePosixPath
from typing import TypeVar

from distributed_adaround.errors import SpecError
from distributed_adaround.files import storage, uris
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.launch import kubernetes, slurm
from distributed_adaround.launch.request import LaunchRequest
from distributed_adaround.spec.explain import shown

_Request = TypeVar("_Request", bound=LaunchRequest)


def add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `launch` to those of the program."""
    text = "run a job with restarts, or write the files that start it on a cluster; needs no torch"
    kinds = commands.add_parser("launch", help=text, description=text).add_subparsers(required=True, metavar="WHERE")
    text = "run a job on all GPUs of this machine, and start it again where that helps (see launch/torchrun.sh)"
    # All words after it belong to torchrun.sh, --help too.
    torchrun = kinds.add_parser("torchrun", help=text, description=text, add_help=False, prefix_chars="\0")
    torchrun.add_argument("rest", nargs="*")
    torchrun.set_defaults(command=_torchrun)
    text, common = "write an sbatch script", _common()
    script = kinds.add_parser("slurm", help=text, description=text, parents=[common])
    script.set_defaults(command=_slurm)
    add = script.add_argument
    add("--time", metavar="LIMIT", help="time limit, for instance 04:00:00; then the job saves and is queued again")
    add("--partition", metavar="NAME", help="partition")
    add("--account", metavar="NAME", help="account to charge")
    add("--image", metavar="IMAGE", help="run in this container image, with --container")
    add("--container", choices=("pyxis", "apptainer"), help="what runs the image")
    add("--mount", action="append", metavar="FOLDER", help="a folder to see in the container")
    text = "write manifests for kubectl apply"
    manifests = kinds.add_parser("kubernetes", help=text, description=text, parents=[common])
    manifests.set_defaults(command=_kubernetes)
    add, kind = manifests.add_argument, "Indexed Job, JobSet or Kubeflow TrainJob (default: job)"
    add("--image", required=True, metavar="IMAGE", help="image built from docker/Dockerfile")
    add("--kind", choices=("job", "jobset", "trainjob"), help=kind)
    claim = f"PersistentVolumeClaim, mounted at {kubernetes.DATA_FOLDER}, where the job starts"
    add("--claim", metavar="NAME", help=claim)
    add("--secret", metavar="NAME", help="Secret whose keys become variables, for object stores")
    add("--service-account", metavar="NAME", help="ServiceAccount of the pods; its token is not mounted")


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("job", metavar="JOB", help="job file: .yaml, .json or .toml")
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field")
    add("--nodes", required=True, metavar="N", help="machines")
    add("--gpus", metavar="G", help="GPUs of each machine, one rank on each (default: 0, the job runs on CPUs)")
    add("--ranks", metavar="R", help="ranks on each machine, without GPUs (default: 1)")
    add("--cpus", metavar="C", help="CPU cores of each rank (default: 4)")
    add("--memory", metavar="SIZE", help="memory of each machine, for instance 64GiB (default: what the cluster gives)")
    add("--grace", metavar="SECONDS", help="time to save before ranks are killed (default: 60)")
    add("--name", metavar="NAME", help="name of the job on the cluster (default: that of the job file)")
    add("--out", metavar="FILE", help="write to this file (default: print)")
    return parser


def _torchrun(options: argparse.Namespace) -> None:
    script = files(__package__).joinpath("torchrun.sh")
    os.execvpe("bash", ["bash", str(script), *options.rest], {"PYTHON": sys.executable, **os.environ})


def _slurm(options: argparse.Namespace) -> None:
    _deliver(options, slurm.render(_request(options, slurm.SlurmRequest)))


def _kubernetes(options: argparse.Namespace) -> None:
    job_text = storage.read_bytes(options.job).decode("utf-8-sig")
    suffix = PurePosixPath(uris.file_name(options.job)).suffix.lower()
    _deliver(options, kubernetes.render(_request(options, kubernetes.KubernetesRequest), job_text, suffix))


def _request(options: argparse.Namespace, cls: type[_Request]) -> _Request:
    """Of the options that the user gave, and what follows from the job file."""
    spec = load_spec(options.job, options.overrides)
    for text in options.given:
        if not text.isprintable():
            raise SpecError(f"{shown(text)} holds a control character, which no file name or option needs; remove it")
    own = {
        "spec": spec,
        "arguments": [options.job, *(part for override in options.overrides for part in ("--set", override))],
        "made_by": shlex.join(["python", "-m", "distributed_adaround", *options.given]),
        "name": PurePosixPath(uris.file_name(options.job)).stem,
    }
    given = {name: value for name, value in vars(options).items() if name in cls.model_fields and value is not None}
    return cls(**own | given)


def _deliver(options: argparse.Namespace, text: str) -> None:
    if options.out is None:
        sys.stdout.write(text)
    else:
        storage.write_bytes(options.out, text.encode())
