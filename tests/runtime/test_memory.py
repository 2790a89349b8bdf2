"""Free memory within control groups: laid out as the kernel lays them out, in folders of the test."""

import os
from pathlib import Path

import pytest

from distributed_adaround.runtime.memory import free_bytes

MACHINE = 64 << 30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": MACHINE >> 12, "SC_PAGE_SIZE": 1 << 12}.__getitem__)


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


def group(folder: str, limit: str, usage: int, cache: int, *, version: int = 2) -> dict[str, str]:
    if version == 2:
        names = (f"sys/fs/cgroup{folder}", "memory.max", "memory.current", "inactive_file")
    else:
        names = (
            f"sys/fs/cgroup/memory{folder}",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    top, limit_name, usage_name, cache_name = names
    return {
        f"{top}/{limit_name}": limit,
        f"{top}/{usage_name}": str(usage),
        f"{top}/memory.stat": f"anon 5\n{cache_name} {cache}\nfile 7",
    }


def test_without_control_groups_it_is_that_of_the_machine(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == MACHINE


def test_a_group_without_limit_changes_nothing(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", **group("", "max", 100, 0)})
    assert free_bytes(root) == MACHINE


def test_a_container_sees_its_group_at_the_top(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", **group("", str(4 << 30), 1 << 30, 100)})
    assert free_bytes(root) == (3 << 30) + 100


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    groups = group("/a/b", str(8 << 30), 0, 0) | group("/a", str(2 << 30), 1 << 30, 0)
    assert free_bytes(lay_out(tmp_path, {"proc/self/cgroup": "0::/a/b", **groups})) == 1 << 30


def test_version_1_with_the_path_of_the_host(tmp_path: Path) -> None:
    """The container has its group mounted at the top, but its path is that of the host."""
    text = "5:devices:/\n4:cpu,memory:/kubepods/x\n0::/"
    root = lay_out(tmp_path, {"proc/self/cgroup": text, **group("", str(4 << 30), 1 << 30, 0, version=1)})
    assert free_bytes(root) == 3 << 30


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", **group("", "100", 200, 0)})
    assert free_bytes(root) == 0


def test_a_limit_above_the_machine_counts_for_nothing(tmp_path: Path) -> None:
    """Version 1 writes "no limit" as a number near 2^63."""
    root = lay_out(tmp_path, {"proc/self/cgroup": "4:memory:/", **group("", "9223372036854771712", 0, 0, version=1)})
    assert free_bytes(root) == MACHINE
