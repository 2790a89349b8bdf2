"""The pods of a manifest without a cluster: each in its own network namespace and its own read-only root.

The Job of the manifest is played by hand: arguments, variables, volumes, host names, user and restart rules are taken
from it as they stand. The files of this machine stand for the image, docker/entrypoint.sh for its entrypoint.

Needs root, `ip` (Debian's iproute2) and `bwrap` (bubblewrap):

    apt-get install -y --no-install-recommends iproute2 bubblewrap
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launched import DEADLINE, tree, until

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "bwrap")
# What Kubernetes and the image give besides the manifest.
_FILES = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc/passwd",
    "/etc/nsswitch.conf",
    "/etc/ld.so.cache",
    "/etc/ssl",
)


class Network:
    """Two network namespaces with a cable between them."""

    def __init__(self, name: str) -> None:
        missing = [tool for tool in NEEDED if shutil.which(tool) is None]
        assert not missing, f"{', '.join(missing)} not found; install what the first lines of {__file__} name"
        self.spaces = [f"{name}-{index}" for index in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    @contextmanager
    def up(self) -> Iterator["Network"]:
        try:
            for space in self.spaces:
                _ip("netns", "add", space)
            one, two = self.spaces
            _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
            for space, address in zip(self.spaces, self.addresses, strict=True):
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    _ip("-n", space, "link", "set", device, "up")
            yield self
        finally:
            for space in self.spaces:
                subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class PlayedJob:
    """An Indexed Job of two pods. manifest: its objects by kind. data: the folder behind the claim."""

    def __init__(self, network: Network, manifest: dict[str, Any], folder: Path, data: Path) -> None:
        self._network, self._folder, self._data = network, folder, data
        self._job = manifest["Job"]
        self._spec = self._job["spec"]
        self._pod = self._spec["template"]["spec"]
        self._files = manifest["ConfigMap"]["data"]
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        self.exits: list[tuple[int, int]] = []
        self._hosts = folder / "hosts"
        names = [f"{self._job['metadata']['name']}-{index}" for index in range(2)]
        self._names = names
        lines = [f"{a} {n}.{self._pod['subdomain']} {n}" for a, n in zip(network.addresses, names, strict=True)]
        self._hosts.write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n", encoding="ascii")
        (folder / "job").mkdir()
        for name, text in self._files.items():
            (folder / "job" / name).write_text(text, encoding="utf-8")

    @contextmanager
    def running(self) -> Iterator["PlayedJob"]:
        assert self._spec["completionMode"] == "Indexed"
        assert self._spec["completions"] == self._spec["parallelism"] == 2
        try:
            for index in range(2):
                self._create(index)
            yield self
        finally:
            self._end_all()

    def log(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(self._folder.glob("pod-*.log"))
        )

    def result(self) -> str:
        """Wait for the end, making up for lost pods as the Job's rules say: "Complete", or why it failed."""
        outcomes: list[str] = []

        def over() -> bool:
            outcomes.extend(filter(None, [self._outcome()]))
            return bool(outcomes)

        until(over, "end of the job", 2 * DEADLINE, pause=0.2)
        return outcomes[0]

    def cut_off(self, index: int) -> None:
        """As when the machine of a pod loses its power."""
        self.pods[index].kill()

    def drain(self, index: int) -> None:
        """SIGTERM to the container's first process, as the kubelet does it."""
        os.kill(self.container(index), signal.SIGTERM)

    def container(self, index: int) -> int:
        """Process id of the container's first process: the first below bwrap that is not bwrap itself."""
        found = [pid for pid in tree(self.pods[index].pid) if Path(f"/proc/{pid}/comm").read_text().strip() != "bwrap"]
        return found[0]

    def _outcome(self) -> str | None:
        """Looks once at each pod; None while the job goes on."""
        for index, pod in list(self.pods.items()):
            code = pod.poll()
            if code is None:
                continue
            del self.pods[index]
            self.exits.append((index, code))
            for rule in self._spec["podFailurePolicy"]["rules"]:
                if rule["action"] == "FailJob" and code in rule["onExitCodes"]["values"]:
                    self._end_all()
                    return f"PodFailurePolicy {code}"
            if code != 0:
                if sum(one != 0 for _, one in self.exits) > self._spec["backoffLimit"]:
                    return "BackoffLimitExceeded"
                self._create(index)
        return None if self.pods else "Complete"

    def _end_all(self) -> None:
        for pod in self.pods.values():
            pod.kill()
            pod.wait(timeout=DEADLINE)
        self.pods.clear()

    def _create(self, index: int) -> None:
        (container,) = self._pod["containers"]
        security = self._pod["securityContext"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        binds = [
            part for name in (*_FILES, sys.prefix, sys.base_prefix, str(ROOT)) for part in ("--ro-bind", name, name)
        ]
        mounts = [part for mount in container["volumeMounts"] for part in self._mount(mount)]
        variables = self._variables(container, index)
        command = [
            *("ip", "netns", "exec", self._network.spaces[index], "bwrap", "--die-with-parent", "--as-pid-1"),
            *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", self._names[index]),
            *("--uid", str(security["runAsUser"]), "--gid", str(security["runAsGroup"]), "--cap-drop", "ALL"),
            *("--proc", "/proc", "--dev", "/dev", *mounts, *binds, "--ro-bind", str(self._hosts), "/etc/hosts"),
            *("--remount-ro", "/", "--chdir", container["workingDir"], "--clearenv"),
            *(part for name, value in variables.items() for part in ("--setenv", name, value)),
            *("/bin/sh", str(ROOT / "docker" / "entrypoint.sh"), *container["args"]),
        ]
        with (self._folder / f"pod-{index}-{len(self.exits)}.log").open("wb") as log:
            self.pods[index] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def _mount(self, mount: dict[str, Any]) -> list[str]:
        (volume,) = [volume for volume in self._pod["volumes"] if volume["name"] == mount["name"]]
        if "configMap" in volume:
            assert mount["readOnly"]
            return ["--ro-bind", str(self._folder / "job"), mount["mountPath"]]
        if "persistentVolumeClaim" in volume:
            return ["--bind", str(self._data), mount["mountPath"]]
        assert "emptyDir" in volume
        return ["--tmpfs", mount["mountPath"]]

    def _variables(self, container: dict[str, Any], index: int) -> dict[str, str]:
        found = {
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/tmp",
            "USER": "adaround",
            "JOB_COMPLETION_INDEX": str(index),
        }
        for entry in container["env"]:
            if "value" in entry:
                found[entry["name"]] = entry["value"]
            else:
                assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
                found[entry["name"]] = self._network.addresses[index]
        return found
