"""What is asked of a cluster, checked before a file is written. Whatever is wrong is a SpecError of one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.explain import shown
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.runtime import parse_bytes

# Host names of pods are the job's name with up to 14 more characters, and 63 at most.
_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
_MAX_COUNT = 100_000


def match(option: str, value: str, pattern: str, rule: str) -> str:
    """The value, when all of it has the form of the option. Raises SpecError, with the rule."""
    if re.fullmatch(pattern, value, re.ASCII) is None:
        raise SpecError(f"--{option}: {shown(value)} {rule}")
    return value


def count(option: str, value: str, least: int) -> int:
    """A whole number of `least` or more. Raises SpecError."""
    number = int(value) if re.fullmatch(r"[0-9]{1,6}", value, re.ASCII) else -1
    if not least <= number <= _MAX_COUNT:
        raise SpecError(f"--{option}: {shown(value)} is not a whole number from {least} to {_MAX_COUNT}; correct it")
    return number


@dataclass(frozen=True)
class LaunchRequest:
    """A job and the machines for it. Numbers are per machine: gpus, ranks, memory (bytes); cpus: cores per rank.

    arguments: what the job is started with, the job file first. made_by: the command line, for the file's first lines.
    """

    spec: JobSpec
    arguments: tuple[str, ...]
    made_by: str
    name: str
    nodes: int
    gpus: int
    ranks: int
    cpus: int
    memory: int | None
    grace_seconds: int

    @classmethod
    def checked(
        cls,
        spec: JobSpec,
        arguments: Sequence[str],
        made_by: Sequence[str],
        *,
        name: str,
        nodes: str,
        gpus: str = "0",
        ranks: str | None = None,
        cpus: str = "4",
        memory: str | None = None,
        grace: str = "60",
    ) -> LaunchRequest:
        """From the texts of a command line.

        Raises:
            SpecError: a text is no number, size or name, or they contradict each other or the job.
        """
        for text in made_by:
            if not text.isprintable():
                raise SpecError(
                    f"{shown(text)} holds a control character, which no file name or option needs; remove it"
                )
        num_gpus = count("gpus", gpus, 0)
        request = cls(
            spec=spec,
            arguments=tuple(arguments),
            made_by=shlex.join(made_by),
            name=match("name", name, _NAME, "must be 1 to 40 of a-z, 0-9 and -, from a letter on; give another --name"),
            nodes=count("nodes", nodes, 1),
            gpus=num_gpus,
            ranks=num_gpus or 1 if ranks is None else count("ranks", ranks, 1),
            cpus=count("cpus", cpus, 1),
            memory=None if memory is None else _size(memory),
            grace_seconds=count("grace", grace, 10),
        )
        request._check_devices()
        return request

    def _check_devices(self) -> None:
        device = self.spec.runtime.device
        if self.gpus and self.ranks != self.gpus:
            raise SpecError(f"--ranks: {self.ranks} with {self.gpus} GPUs; each rank has one GPU, so leave --ranks out")
        if self.gpus and device == "cpu":
            raise SpecError(
                f"--gpus: {self.gpus}, but the job has runtime.device=cpu; leave --gpus out or change the job"
            )
        if not self.gpus and device.startswith("cuda"):
            raise SpecError(f"--gpus: 0, but the job has runtime.device={device}; give the GPUs of a machine as --gpus")
        ranks, shards = self.nodes * self.ranks, self.spec.data.virtual_shards
        if ranks > shards:
            raise SpecError(
                f"--nodes: {self.nodes} with {self.ranks} ranks each are {ranks} ranks, but data.virtual_shards is "
                f"{shards} and the rest would have no data; take fewer, or raise data.virtual_shards"
            )


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except SpecError as error:
        raise SpecError(f"--memory: {error}") from None
