"""An sbatch script for a job: slurm.sbatch with its blanks filled in."""

import re
import shlex
from importlib.resources import files
from string import Template
from typing import Annotated, Literal, Self

from pydantic import model_validator

from distributed_adaround.launch.request import LaunchRequest, form
from distributed_adaround.spec.explain import ABSENT, ContradictionError

# Slurm sends the warning up to a minute late.
_SLURM_DELAY_SECONDS = 60
_WORD = form(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", "must be letters, digits and _ . + -; correct it")
_TIME = form(
    r"([0-9]{1,3}-)?[0-9]{1,3}(:[0-9]{2}){1,2}|[0-9]{1,6}", "is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS"
)
_IMAGE = form(r"[A-Za-z0-9_./][A-Za-z0-9_./:@#+-]{0,511}", "is no image name or file; correct it")
_FOLDER = form(r"/[^:,\s]{0,511}", "must be an absolute path without ':', ',' and spaces; correct it")


class SlurmRequest(LaunchRequest):
    """With what only Slurm knows. container: what runs `image`; mount: folders that it sees too."""

    time: Annotated[str, _TIME] | None = None
    partition: Annotated[str, _WORD] | None = None
    account: Annotated[str, _WORD] | None = None
    image: Annotated[str, _IMAGE] | None = None
    container: Literal["pyxis", "apptainer"] | None = None
    mount: tuple[Annotated[str, _FOLDER], ...] = ()

    @model_validator(mode="after")
    def _container_has_an_image(self) -> Self:
        if (self.image is None) != (self.container is None):
            missing = "image" if self.image is None else "container"
            raise ContradictionError((missing,), ABSENT, "is missing; --image and --container go together")
        if self.mount and self.image is None:
            raise ContradictionError(("mount",), ABSENT, "without --image there is no container to mount in; remove it")
        return self


def render(request: SlurmRequest) -> str:
    """The text of an sbatch script. The same request gives the same text."""
    template = Template(files(__package__).joinpath("slurm.sbatch").read_text(encoding="utf-8"))
    container, program = _container(request)
    directives = {
        "job-name": request.name,
        "nodes": request.nodes,
        "cpus-per-task": request.num_ranks * request.cpus,
        "gpus-per-node": request.gpus,
        "mem": request.memory_mib and f"{request.memory_mib}M",
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
    }
    return template.substitute(
        title=f"AdaRound on {request.nodes} x {request.num_ranks} ranks (machines x ranks of each).",
        made_by=request.made_by,
        name=request.name,
        directives="\n".join(f"#SBATCH --{name}={value}" for name, value in directives.items() if value),
        warning_seconds=request.grace + _SLURM_DELAY_SECONDS,
        grace_seconds=request.grace,
        job=shlex.join(request.arguments),
        container=container,
        program=program,
        ranks=request.num_ranks,
        cpus=request.cpus,
    )


def _container(request: SlurmRequest) -> tuple[str, str]:
    """More options of srun, and the words that call the program, both as shell text. $PWD is the folder of sbatch."""
    program = "python -m distributed_adaround"
    if request.image is None:
        return "", program
    image = shlex.quote(request.image)
    if request.container == "pyxis":
        mounts = shlex.quote(",".join(f"{folder}:{folder}" for folder in request.mount))
        mounts = f'"$PWD:$PWD",{mounts}' if request.mount else '"$PWD:$PWD"'
        return f'--container-image={image} --container-mounts={mounts} --container-workdir="$PWD"', program
    binds = " ".join(f"--bind {shlex.quote(folder)}" for folder in request.mount)
    return "", re.sub(" +", " ", f'apptainer exec --nv --bind "$PWD" --pwd "$PWD" {binds} {image} {program}')
