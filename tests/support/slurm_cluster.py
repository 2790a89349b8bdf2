"""A real Slurm of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd.

Needs root and Debian's packages:

    apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from launched import DEADLINE, tree, until

NEEDED = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=60
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=8 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=8 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class SlurmCluster:
    """Commands of a user of the cluster. folder: where its daemons keep everything, also their logs."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in NEEDED if shutil.which(name) is None]
        assert not missing, f"{', '.join(missing)} not found; install what the first lines of {__file__} name"
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @contextmanager
    def running(self) -> Iterator["SlurmCluster"]:
        """The daemons, until the end of the block; jobs do not outlive them."""
        ports = dict(zip(("controller_port", "port_1", "port_2"), _free_ports(3), strict=True))
        text = _CONF.format(host=socket.gethostname(), folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(text, encoding="ascii")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        try:
            self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *files)
            until((self.folder / "munge.socket").exists, "munge")
            self._daemon("slurmctld", "slurmctld", "-D", "-c")
            for node in ("n1", "n2"):
                self._daemon(node, "slurmd", "-D", "-N", node)
            self._wait_until_idle()
            yield self
        finally:
            self.call("scancel", "--signal=KILL", "--full", "--user=root")
            self.call("scancel", "--user=root")
            for daemon in reversed(self._daemons.values()):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(timeout=DEADLINE)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def _wait_until_idle(self) -> None:
        until(lambda: self.call("sinfo", "-h", "-o", "%D %t").stdout.strip() == "2 idle", "idle cluster", pause=0.2)

    def cut_off(self, node: str, steps: Sequence[int]) -> None:
        """As when a node loses its power: its slurmd and the steps on it, given by process id, are gone."""
        self._daemons[node].kill()
        self._daemons[node].wait(timeout=DEADLINE)
        for pid in [below for step in steps for below in tree(step)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def call(self, *command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)

    def submit(self, script: Path) -> str:
        """sbatch in the folder of the script; returns the number of the job."""
        submitted = self.call("sbatch", "--parsable", script.name, cwd=script.parent)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, or an empty text."""
        found = re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", job).stdout)
        return found[1] if found else ""

    def ended(self, job: str) -> str:
        """Wait for the end of a job; returns its state. A queued job starts now, not after the usual two minutes."""

        def over() -> bool:
            state = self.field(job, "JobState")
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime":
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state in _FINAL

        until(over, f"end of job {job}", 2 * DEADLINE, pause=0.2)
        return self.field(job, "JobState")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports
