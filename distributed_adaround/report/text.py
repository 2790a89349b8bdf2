"""Tables as text, by rich. Plain where nobody's terminal is: no colours, and no line is cut or wrapped."""

import sys
from collections.abc import Collection, Iterable, Sequence

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table

ANY_WIDTH = 100_000
# Lines below the header and above the footer, nothing else.
_RULES = Box("    \n    \n----\n    \n    \n----\n    \n    \n", ascii=True)


def layout(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str], footer: Sequence[str] = ()
) -> Table:
    """A table of one header and rows, and a last row between rules. numbers: the columns that stand at the right."""
    ruled = bool(footer)
    gap = (0, 1 if ruled else 2, 0, 0)
    table = Table(box=_RULES if ruled else None, padding=gap, pad_edge=False, show_edge=False, show_footer=ruled)
    for name, total in zip(header, footer or [""] * len(header), strict=True):
        table.add_column(name, total, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def console(width: int | None = None) -> Console:
    """For `rendered`. width: of plain text; None: for stdout, as wide as it is."""
    if width is None and sys.stdout.isatty():
        return Console(markup=False, emoji=False, highlight=False)
    width = width or ANY_WIDTH
    return Console(width=width, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False)


def rendered(console: Console, *parts: RenderableType) -> str:
    """The parts one below the other, without blanks at the ends of lines."""
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    return "\n".join(line.rstrip(" ") for line in captured.get().splitlines())
