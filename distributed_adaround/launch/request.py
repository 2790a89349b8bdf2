"""What is asked of a cluster, checked before a file is written. Whatever is wrong is a SpecError of one line."""

import re
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.runtime import Memory, parse_bytes

_MAX_COUNT = 100_000
_Count = Annotated[int, Field(ge=1, le=_MAX_COUNT)]


def form(pattern: str, rule: str) -> AfterValidator:
    """A field's text must match the pattern as a whole. rule: for the message, with the remedy."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text, re.ASCII) is None:
            raise ValueError(rule)
        return text

    return AfterValidator(check)


# Host names of pods are the job's name with up to 14 more characters, and 63 at most.
_NAME = form(
    r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "must be 1 to 40 of a-z, 0-9 and -, from a letter on; give another --name"
)


class LaunchRequest(Section):
    """A job and the machines for it. Numbers are per machine: gpus, ranks, memory; cpus: cores per rank.

    arguments: what the job is started with, the job file first. made_by: the command line, for the file's first lines.
    Made of the command line's options: numbers are given as text, and messages name the option.
    """

    model_config = ConfigDict(strict=False)

    spec: JobSpec
    arguments: tuple[str, ...]
    made_by: str
    name: Annotated[str, _NAME]
    nodes: _Count = Field(examples=["2"])
    gpus: int = Field(0, ge=0, le=_MAX_COUNT)
    ranks: _Count | None = None
    cpus: _Count = 4
    memory: Memory | None = None
    grace: int = Field(60, ge=10, le=_MAX_COUNT)

    @classmethod
    def place(cls, loc: Sequence[str | int]) -> str:
        return f"--{loc[0]}".replace("_", "-")

    @property
    def num_ranks(self) -> int:
        """Of each machine."""
        return self.ranks or self.gpus or 1

    @property
    def memory_mib(self) -> int | None:
        return None if self.memory is None else -(-parse_bytes(self.memory) // 2**20)

    @model_validator(mode="after")
    def _fits_the_job(self) -> Self:
        device, shards, ranks = self.spec.runtime.device, self.spec.data.virtual_shards, self.num_ranks
        if self.gpus and ranks != self.gpus:
            text = f"with {self.gpus} GPUs; each rank has one GPU, so leave --ranks out"
            raise ContradictionError(("ranks",), self.ranks, text)
        if self.gpus and device == "cpu":
            text = f"{self.gpus}, but the job has runtime.device=cpu; leave --gpus out or change the job"
            raise ContradictionError(("gpus",), ABSENT, text)
        if not self.gpus and device.startswith("cuda"):
            text = f"0, but the job has runtime.device={device}; give the GPUs of a machine as --gpus"
            raise ContradictionError(("gpus",), ABSENT, text)
        if self.nodes * ranks > shards:
            text = (
                f"with {ranks} ranks each are {self.nodes * ranks} ranks, but data.virtual_shards is {shards} and the "
                "rest would have no data; take fewer, or raise data.virtual_shards"
            )
            raise ContradictionError(("nodes",), self.nodes, text)
        return self
