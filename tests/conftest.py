"""Every test starts from the same state and leaves none behind. Options for distributed tests: tests/distributed/."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Ranks, workers and tests share few cores; more threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Fixed seeds; environment, working folder, torch's global settings and process group as they were."""
    environment, folder = dict(os.environ), os.getcwd()
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)
    os.chdir(folder)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip without a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
