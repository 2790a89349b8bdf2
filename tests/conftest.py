"""Every test starts from the same state and leaves none behind. What several tests share lies in tests/support/."""

import functools
import gc
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Ranks, workers and tests share few cores; more threads would only get in each other's way. OpenMP reads it when torch
# is imported, and threads of its that wait for a core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from distributed_adaround import errors

# Spawned workers get the parent's sys.path; without this they could not import their own code.
sys.path.append(str(Path(__file__).parent / "support"))
# The benchmarks are a package of the clone, `tests.benchmarks`.
sys.path.append(str(Path(__file__).parents[1]))

from quick_exports import remember

remember()

if TYPE_CHECKING:
    from rank_pool import RankPool


def _silence() -> None:
    """The program's logger as a library finds it. Not as it was before the test: a fixture of wider scope may have run
    the command line, and to a logger that does not propagate pytest adds its own handler."""
    logger = logging.getLogger("distributed_adaround")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Fixed seeds; the program's logger untouched; environment, working folder, the credentials the program has seen,
    torch's global settings and process group as they were."""
    _silence()
    secrets_before = set(errors._secrets)
    environment, folder = dict(os.environ), os.getcwd()
    # No test is a rank of some torchrun above it.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        os.environ.pop(name, None)
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _silence()
    errors._secrets.clear()
    errors._secrets.update(secrets_before)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports for seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)
    os.chdir(folder)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="session")
def pool() -> Iterator["RankPool"]:
    """The one pool of ranks of this process; its workers start at the first call."""
    from rank_pool import RankPool

    pool = RankPool()
    yield pool
    pool.kill()


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _share_the_pool(text: str) -> bool:
    return "RankPool" in text


@functools.cache
def _pool_of(tests: Path) -> dict[Path, int]:
    """Which of two pools a file uses: one alone would be busy for longer than all other tests take."""
    files = [path for path in sorted(tests.rglob("test_*.py")) if _share_the_pool(_text(path))]
    return {path: index % 2 for index, path in enumerate(files)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that use a pool of ranks go to two processes, so that there are two pools; other files to any."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            number = _pool_of(Path(__file__).parent).get(config.rootpath / file)
            return file if number is None else f"pool {number}"

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip without a device. With several processes, the files that take longest come first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not _share_the_pool(_text(item.path)), "subprocess" not in _text(item.path)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
