"""An sbatch script for a job: slurm.sbatch with its blanks filled in."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from distributed_adaround.errors import SpecError
from distributed_adaround.launch.request import LaunchRequest, match

CONTAINERS = ("pyxis", "apptainer")
_PROGRAM = ("python", "-m", "distributed_adaround")
# Slurm sends the warning up to a minute late.
_SLURM_DELAY_SECONDS = 60
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}"
_WORD_RULE = "must be letters, digits and _ . + -; correct it"


@dataclass(frozen=True)
class SlurmOptions:
    """What only Slurm knows. container: how `image` is run, pyxis or apptainer; mounts: folders it sees too."""

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    image: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.time is not None:
            form = r"([0-9]{1,3}-)?[0-9]{1,3}(:[0-9]{2}){1,2}|[0-9]{1,6}"
            match("time", self.time, form, "is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
        for name in ("partition", "account"):
            if getattr(self, name) is not None:
                match(name, getattr(self, name), _WORD, _WORD_RULE)
        if (self.image is None) != (self.container is None):
            raise SpecError(f"--image and --container ({' or '.join(CONTAINERS)}) go together; give both or neither")
        if self.image is not None:
            match(
                "image", self.image, r"[A-Za-z0-9_./][A-Za-z0-9_./:@#+-]{0,511}", "is no image name or file; correct it"
            )
        if self.mounts and self.image is None:
            raise SpecError("--mount: without --image there is no container to mount anything in; remove it")
        for folder in self.mounts:
            match(
                "mount", folder, r"/[^:,\s]{0,511}", "must be an absolute path without ':', ',' and spaces; correct it"
            )


def render(request: LaunchRequest, options: SlurmOptions) -> str:
    """The text of an sbatch script. The same request gives the same text."""
    template = Template(files(__package__).joinpath("slurm.sbatch").read_text(encoding="utf-8"))
    container, program = _container(options)
    return template.substitute(
        title=f"AdaRound on {request.nodes} x {request.ranks} ranks (machines x ranks of each).",
        made_by=request.made_by,
        name=request.name,
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(request, options)),
        warning_seconds=request.grace_seconds + _SLURM_DELAY_SECONDS,
        grace_seconds=request.grace_seconds,
        job=shlex.join(request.arguments),
        container=container,
        program=program,
        ranks=request.ranks,
        cpus=request.cpus,
    )


def _directives(request: LaunchRequest, options: SlurmOptions) -> list[str]:
    lines = [f"job-name={request.name}", f"nodes={request.nodes}", f"cpus-per-task={request.ranks * request.cpus}"]
    if request.gpus:
        lines.append(f"gpus-per-node={request.gpus}")
    if request.memory is not None:
        lines.append(f"mem={-(-request.memory // 2**20)}M")
    lines += [f"{name}={getattr(options, name)}" for name in ("time", "partition", "account") if getattr(options, name)]
    return lines


def _container(options: SlurmOptions) -> tuple[str, str]:
    """More options of srun, and the words that call the program, both as shell text. $PWD is the folder of sbatch."""
    program = shlex.join(_PROGRAM)
    if options.image is None:
        return "", program
    image = shlex.quote(options.image)
    if options.container == "pyxis":
        mounts = shlex.quote(",".join(f"{folder}:{folder}" for folder in options.mounts))
        mounts = f'"$PWD:$PWD",{mounts}' if options.mounts else '"$PWD:$PWD"'
        return f'--container-image={image} --container-mounts={mounts} --container-workdir="$PWD"', program
    binds = " ".join(f"--bind {shlex.quote(folder)}" for folder in options.mounts)
    return "", re.sub(" +", " ", f'apptainer exec --nv --bind "$PWD" --pwd "$PWD" {binds} {image} {program}')
