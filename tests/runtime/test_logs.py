import logging

import pytest

from distributed_adaround.runtime import logs


def _speak() -> None:
    logger = logging.getLogger("distributed_adaround.somewhere")
    logger.debug("detail")
    logger.info("information")
    logger.warning("caution")


@pytest.mark.parametrize(
    ("rank", "debug", "expected"),
    [
        (0, False, ["INFO information", "WARNING caution"]),
        (1, False, ["WARNING caution"]),
        (1, True, ["DEBUG detail", "INFO information", "WARNING caution"]),
    ],
)
def test_rank_0_informs_the_others_warn(
    rank: int, debug: bool, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(rank, 4, debug)
    logs.configure(rank, 4, debug)
    _speak()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(f"rank {rank}/4 ")[1] for line in err.splitlines()] == expected


def test_the_root_logger_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure(0, 1, debug=True)
    _speak()
    assert (root.handlers[:], root.level) == before
    assert caplog.records == []
