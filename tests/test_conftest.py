"""The autouse fixture of conftest.py gives each test the same start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TWO_TESTS = """
import logging, os, pytest, torch
from distributed_adaround.runtime import logs

@pytest.fixture(scope="session", autouse=True)
def _ran_a_job():
    logs.configure(0, 1, debug=True)

def test_disturbs_everything(tmp_path):
    assert logging.getLogger("distributed_adaround").handlers == []
    logs.configure(0, 1)
    os.environ["LEFT_OVER"] = "1"
    os.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.rand(3)

def test_finds_it_clean(caplog):
    logger = logging.getLogger("distributed_adaround")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
    logs.configure(0, 1)
    logger.info("not for the root logger, nor for a handler that pytest puts on loggers that do not propagate")
    assert caplog.records == []
    assert "LEFT_OVER" not in os.environ
    assert os.path.exists("test_two.py")
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1
    assert not torch.distributed.is_initialized()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
"""


def test_a_test_that_leaves_a_mess_does_not_reach_the_next(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_two.py").write_text(TWO_TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "test_two.py"]
    support = str(Path(__file__).with_name("support"))
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in result.stdout, result.stdout + result.stderr
