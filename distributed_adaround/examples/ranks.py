"""How the examples start their jobs: by a command that is printed first, so that it can be repeated by hand."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_on_ranks(folder: Path, num_ranks: int, arguments: Sequence[str]) -> int:
    """Runs the program with these arguments in the folder, on ranks of this machine; returns the exit code."""
    torchrun = ["--standalone", f"--nproc_per_node={num_ranks}", "-m", "distributed_adaround", *arguments]
    print(f"(cd {shlex.quote(str(folder))} && {shlex.join(['torchrun', *torchrun])})", flush=True)
    # One thread per rank is torchrun's own default; naming it saves its warning.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
