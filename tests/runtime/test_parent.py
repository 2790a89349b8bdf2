"""Ranks of a torchrun that is killed get SIGTERM; processes without torchrun do not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Starts a child and waits for it. The child writes a line when it gets SIGTERM, and one when its input ends.
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
CHILD = """
import os, signal, sys
from distributed_adaround.runtime.signals import end_with_launcher

def told(*_):
    os.write(1, b"told\\n")
    os._exit(0)

signal.signal(signal.SIGTERM, told)
end_with_launcher()
os.write(1, b"ready\\n")
sys.stdin.read()
os.write(1, b"not told\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_ranks_are_told_that_torchrun_was_killed(under_torchrun: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "1"
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        if not under_torchrun:
            # Only the end of its input ends the child: had it been told, it would not have seen this.
            parent.stdin.close()
        assert parent.stdout.read() == (b"told\n" if under_torchrun else b"not told\n")
