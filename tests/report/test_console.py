import io
import logging
import math
from dataclasses import replace

import pytest

from distributed_adaround.report.console import Progress
from distributed_adaround.report.job_log import JobLog
from distributed_adaround.report.time_left import LayerCost, Rates, fit
from distributed_adaround.solve.record import LayerFigures

REPORT = LayerFigures(
    name="conv1",
    kind="Conv2d",
    shape=(1, 1),
    format="int4",
    solver="minibatch",
    nearest_error=4e-2,
    soft_error=1e-2,
    hard_error=2e-2,
    flipped=0.25,
    unsettled=0.5,
    kept_nearest=False,
    seconds=12.25,
)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("distributed_adaround"), "propagate", True)


def test_time_left_is_weighed_by_cost(clock: Clock) -> None:
    progress = Progress(3, io.StringIO(), costs=[LayerCost(1), LayerCost(3), LayerCost(6)], clock=clock)
    with progress:
        progress.layer(0, "a", 100)
        assert math.isnan(progress.seconds_left)
        clock.now += 4
        progress.step(50, 0.1)
        assert progress.seconds_left == pytest.approx(9.5 * 4 / 0.5)
        clock.now += 6
        progress.done(REPORT)
        assert progress.seconds_left == pytest.approx(90)
        progress.layer(1, "b", 100)
        assert progress.seconds_left == pytest.approx(90)
        clock.now += 10
        progress.step(50, 0.1)
        assert progress.seconds_left == pytest.approx(7.5 * 20 / 2.5)
        progress.done(REPORT)
        progress.layer(2, "c", 0)
        progress.step(0, 0.1)
        progress.done(REPORT)
        assert progress.seconds_left == 0


def test_passes_over_data_and_sweeps_have_rates_of_their_own() -> None:
    """A convolution with many rows and a wide layer with few: weights alone would say the wide one takes longest."""
    costs = [LayerCost(rows * i * o, i * i * o) for rows, i, o in ((60_000, 27, 16), (900, 144, 64), (64, 1024, 512))]
    real = Rates(2e-9, 3e-10)
    found = fit([(cost, real.seconds(cost)) for cost in costs[:2]])
    assert found is not None
    assert found.seconds(costs[2]) == pytest.approx(real.seconds(costs[2]))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], None),
        ([(LayerCost(0.0), 1.0)], None),
        ([(LayerCost(2.0, 2.0), 8.0)], Rates(2.0, 2.0)),
        ([(LayerCost(1.0, 0.0), 1.0), (LayerCost(1.0, 1.0), 0.5)], Rates(0.75, 0.0)),
        ([(LayerCost(0.0, 1.0), 1.0), (LayerCost(1.0, 1.0), 0.5)], Rates(0.0, 0.75)),
    ],
)
def test_rates_are_never_negative(measured: list[tuple[LayerCost, float]], expected: Rates | None) -> None:
    assert fit(measured) == expected


def test_what_other_data_say_and_warnings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distributed_adaround"), Progress(1, io.StringIO()) as progress:
        progress.layer(0, "conv1", 0)
        progress.done(replace(REPORT, held_out_error=0.5, warning="8 rows for 16 inputs"))
    assert caplog.messages == [
        "layer conv1: 8 rows for 16 inputs",
        "layer 1 of 1 conv1: in 12.2 s, error 2.00e-02, nearest 4.00e-02, on other data 5.00e-01, 0:00:00 left",
    ]


def test_layers_from_commits_do_not_count_as_fast(clock: Clock) -> None:
    progress = Progress(4, io.StringIO(), clock=clock)
    progress.layer(0, "a", 0)
    progress.done(replace(REPORT, resumed=True))
    assert math.isnan(progress.seconds_left)
    progress.layer(1, "b", 0)
    clock.now += 5
    progress.done(REPORT)
    assert progress.seconds_left == pytest.approx(10)


def test_one_line_per_layer_where_there_is_no_terminal(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, "distributed_adaround"), Progress(2, stream, clock=clock) as progress:
        progress.layer(0, "conv1", 200)
        progress.step(100, 1.0)
        progress.done(replace(REPORT, resumed=True))
        progress.layer(1, "fc", 200)
        clock.now += 3
        progress.done(replace(REPORT, name="fc"))
    assert stream.getvalue() == ""
    assert caplog.messages == [
        "layer 1 of 2 conv1: from a commit, error 2.00e-02, nearest 4.00e-02, ? left",
        "layer 2 of 2 fc: in 12.2 s, error 2.00e-02, nearest 4.00e-02, 0:00:00 left",
    ]


def test_a_bar_on_a_terminal(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    stream = Terminal()
    with caplog.at_level(logging.INFO, "distributed_adaround"), Progress(2, stream, clock=clock) as progress:
        progress.layer(0, "[bold]conv1", 200)
        clock.now += 30
        progress.step(100, 0.125)
    text = stream.getvalue()
    assert "layer 1/2 [bold]conv1 step 100/200 loss 1.250e-01, 0:01:30 left" in text
    assert "25%" in text
    assert caplog.messages == []


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with caplog.at_level(logging.INFO, "distributed_adaround"), Progress(1, Terminal()) as progress:
        progress.layer(0, "conv1", 1)
        progress.done(REPORT)
    assert len(caplog.messages) == 1


def test_the_bar_is_put_away_after_an_error() -> None:
    stream = Terminal()

    def fail() -> None:
        with Progress(1, stream) as progress:
            progress.layer(0, "conv1", 1)
            raise RuntimeError("x")

    with pytest.raises(RuntimeError):
        fail()
    # The cursor, hidden while the bar runs, is shown again.
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_log_of_nothing_takes_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with JobLog() as log:
        log.job_started(1, 0)
        log.layer_started("a", 1)
        log.step(1, 0.0)
        log.layer_done(REPORT)
        log.job_done(1.0, 0.0)
    assert capsys.readouterr() == ("", "")
