"""Tables as text, by rich. Plain where nobody's terminal is: no colours, and no line is cut or wrapped."""

import sys
from collections.abc import Collection, Iterable, Sequence

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table

_ANY_WIDTH = 100_000
# Lines below the header and above the footer, nothing else.
_RULES = Box("    \n    \n----\n    \n    \n----\n    \n    \n", ascii=True)


def layout(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str]) -> Table:
    """A table of one header and rows. numbers: the columns that stand at the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def with_footer(table: Table, cells: Sequence[str]) -> Table:
    """The table with a last row, between rules."""
    table.box, table.show_edge, table.show_footer, table.padding = _RULES, False, True, (0, 1, 0, 0)
    for column, cell in zip(table.columns, cells, strict=True):
        column.footer = cell
    return table


def console(width: int | None = None) -> Console:
    """For `rendered`. width: of plain text; None: for stdout, as wide as it is."""
    if width is None and sys.stdout.isatty():
        return Console(markup=False, emoji=False, highlight=False)
    width = _ANY_WIDTH if width is None else width
    return Console(width=width, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False)


def rendered(console: Console, *parts: RenderableType) -> str:
    """The parts one below the other, without blanks at the ends of lines."""
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    return "\n".join(line.rstrip(" ") for line in captured.get().splitlines())


def width(table: Table) -> int:
    """Columns that the table takes where there is room for all of it."""
    wide = console(_ANY_WIDTH)
    return wide.measure(table).maximum
