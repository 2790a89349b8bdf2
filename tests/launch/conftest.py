"""What several launchers' tests compare with."""

from pathlib import Path

import pytest
from launched import SHORT, finish, killed_at_the_end, prepare, results, start


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the digits job on two ranks of this machine, which nothing disturbed."""
    job = prepare(tmp_path_factory.mktemp("whole"))
    with killed_at_the_end(start(job, *SHORT)) as process:
        ended = finish(process)
    assert ended.returncode == 0, ended.stderr
    return job.parent / "adaround"


@pytest.fixture(scope="session")
def reference(whole: Path) -> dict[str, str]:
    """Digests of its results."""
    return results(whole)
