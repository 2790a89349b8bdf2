"""Builds the image of docker/Dockerfile and runs it, with neither a registry nor Docker: buildah, podman, mmdebstrap.

Needs root and Debian's packages:

    apt-get install -y --no-install-recommends buildah podman runc crun mmdebstrap fuse-overlayfs uidmap netbase
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("buildah", "podman", "runc", "mmdebstrap")
BASE, IMAGE = "localhost/base:bookworm", "localhost/adaround:test"
# As a cluster runs it: nothing to write to but /tmp and /data, no rights, no network.
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "none", "--shm-size", "128m"),
)


class ImageStore:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in NEEDED if shutil.which(name) is None]
        assert not missing, f"{', '.join(missing)} not found; install what the first lines of {__file__} name"
        self._folder = folder
        (folder / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n', encoding="ascii"
        )
        self._environment = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        places = [f"--root={folder}/root", f"--runroot={folder}/run", "--storage-driver=overlay"]
        self._buildah = ["buildah", *places]
        self._podman = ["podman", *places, "--cgroup-manager=cgroupfs", "--runtime=runc"]

    def build(self) -> None:
        """The base from Debian's packages, wheels from pip as this machine has it set up, then the Dockerfile."""
        rootfs, wheels = self._folder / "rootfs.tar", self._folder / "wheels"
        packages = "--include=python3,python3-venv,ca-certificates"
        self._call(["mmdebstrap", "--variant=minbase", packages, "bookworm", str(rootfs)])
        self._call([*self._podman, "import", str(rootfs), BASE])
        rootfs.unlink()
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)]
        self._call([*pip, "--constraint", str(ROOT / "constraints.txt"), str(ROOT), "setuptools>=77"])
        arguments = {"BASE": BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "PIP_EXTRA_INDEX_URL": ""}
        options = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        place = ["--isolation=chroot", "--network=host", f"--volume={wheels}:/wheels:ro"]
        dockerfile = ["--file", str(ROOT / "docker" / "Dockerfile"), "--tag", IMAGE, str(ROOT)]
        self._call([*self._buildah, "bud", *place, *options, *dockerfile])

    def remove(self) -> None:
        """Everything, also what images and containers have mounted."""
        self._call([*self._buildah, "unmount", "--all"])
        self._call([*self._podman, "rmi", "--all", "--force"])
        shutil.rmtree(self._folder, ignore_errors=True)

    def inspect(self, template: str) -> str:
        """A field of the image, as a Go template."""
        return self._call([*self._podman, "image", "inspect", "--format", template, IMAGE]).stdout.strip()

    def command(self, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command that runs the image, hardened. options: more of them for podman."""
        return [*self._podman, "run", "--rm", *HARDENED, *options, IMAGE, *arguments]

    def run(self, *arguments: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        command = self.command(*arguments, options=options)
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)

    def start(self, *arguments: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        command = self.command(*arguments, options=options)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, stdout=pipe, stderr=pipe, text=True)

    def podman(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._call([*self._podman, *arguments])

    def _call(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        ended = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
        return ended
