"""What several launchers' tests compare with."""

from contextlib import chdir

import pytest
from launched import SHORT, prepare, results

from distributed_adaround import cli


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the digits job's results, of one rank that nothing disturbed."""
    job = prepare(tmp_path_factory.mktemp("whole"))
    with chdir(job.parent):
        assert cli.main([job.name, *SHORT]) == 0
    return results(job.parent / "adaround")
