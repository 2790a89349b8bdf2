"""Tables as text: whole in a pipe, folded and readable in a terminal."""

import re
import sys

import pytest

from distributed_adaround.report.text import console, layout, rendered

NAME = "model." + "block." * 60 + "[bold]"
TABLE = (("layer", "rows"), [(NAME, "7"), ("a", "1,000")])


def test_a_pipe_gets_whole_lines() -> None:
    text = rendered(console(), layout(*TABLE, numbers={"rows"}))
    gap = " " * (len(NAME) - 5)
    assert text.splitlines() == [f"layer{gap}   rows", f"{NAME}      7", f"a{gap}      1,000"]
    assert console().measure(layout(*TABLE, numbers={"rows"})).maximum >= len(text.splitlines()[0])


def test_a_terminal_gets_whole_names_on_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    text = rendered(console(), layout(*TABLE, numbers={"rows"}))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line.split()[0] for line in lines[1:-1]) == NAME
