"""The section `runtime` of a job: where it runs, and sizes of memory."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.explain import ContradictionError, Section, one_rule, shown
from distributed_adaround.spec.fields import PositiveInt, Text

_MAX_BYTES = 2**63 - 1


def parse_bytes(value: int | str) -> int:
    """4096, "4096 B", "500MB" (powers of 1000) or "4GiB" (powers of 1024) as a number of bytes.

    Raises SpecError when the text is no size, or the size is not between 1 byte and 2^63 - 1.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMGT])(i?))?B", value, re.ASCII)
        if match is None:
            raise SpecError(f"{shown(value)} is not a size; write bytes as a number, or for instance 4GiB or 500MB")
        number = float(match[1]) if "." in match[1] else int(match[1])
        value = int(number * (1024 if match[3] else 1000) ** (" KMGT".index(match[2] or " ")))
    if not 1 <= value <= _MAX_BYTES:
        raise SpecError(f"{shown(value)} bytes are no size of a memory; write for instance 4GiB, or leave it out")
    return value


def _check_memory(value: int | str) -> int | str:
    parse_bytes(value)
    return value


Memory = Annotated[
    int | str,
    AfterValidator(_check_memory),
    one_rule("must be a size, 1 byte or more; write for instance 4GiB or 500MB, or leave it out"),
]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,4})?)$", examples=["auto, cpu, cuda or cuda:0"])]
Minutes = Annotated[float, Field(gt=0, le=525_600)]


class RuntimeSpec(Section):
    """Where the job runs. Only `seed` changes the result."""

    device: Device = "auto"
    """auto, cpu, cuda (each rank its own GPU) or cuda:N; auto: GPUs when there are any."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of torch.distributed; auto: nccl on GPUs, gloo on CPUs."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of every random draw."""
    timeout_minutes: Minutes = 30.0
    """Minutes after which a rank that waits for others gives up."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; null: as OMP_NUM_THREADS says, else torchrun gives each of several ranks one thread,
    and a single rank takes all cores. On CPUs the last bits of a result depend on it."""
    save_minutes: Minutes = 2.0
    """How often a solver's state is saved in a layer that takes longer; a restart loses no more."""
    activation_memory: Memory | None = None
    """Host memory of one rank for activations, in bytes or as 4GiB, 500MB; the rest is spilled to disk. null: half of
    the free memory."""
    device_memory: Memory | None = None
    """GPU memory of one rank for activations; the rest goes to the host. null: half of the free."""
    spill_dir: Text | None = None
    """Local folder for activations that do not fit into memory; null: the temporary folder."""

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "nccl" and self.device == "cpu":
            raise ContradictionError(("backend",), self.backend, "needs GPUs, but the device is cpu; use gloo or auto")
        return self
