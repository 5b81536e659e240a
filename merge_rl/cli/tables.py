"""Tables on stdout, within the terminal where they fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table

from merge_rl.cli.output import escape, visible


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False
) -> None:
    """A table on stdout; the first column is left-aligned, the others right unless of words.

    Edges are drawn where there is room for them. Names of the first column and numbers of the
    others stay whole, if need be beyond the terminal.
    """
    columns, *rows = [[visible(text) for text in row] for row in (columns, *rows)]
    console = Console(emoji=False, highlight=False)
    cells = list(zip(columns, *rows, strict=True))
    edges = sum(map(_widest, cells)) + _EDGE * len(cells) < console.width
    between = _EDGE if edges else _GAP
    least = _FEW_WORDS if words else _LONGEST_NUMBER
    widths = _widths(cells, least, console.width - between * len(cells) - (1 if edges else -_GAP))
    console.width = max(console.width, sum(widths) + between * len(cells) + 1, _LEAST_WIDTH)
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    if not edges:
        table.box, table.show_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
        table.pad_edge = False
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        side: JustifyMethod = "left" if words or index == 0 else "right"
        table.add_column(
            escape(column), justify=side, no_wrap=index == 0, overflow="fold", width=width
        )
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


# Of a column: its edge with two spaces; the space between columns without edges.
_EDGE, _GAP, _LEAST_WIDTH = 3, 2, 20
# Longest parts of numbers and of words that stay whole.
_LONGEST_NUMBER, _FEW_WORDS = 24, 8


def _widest(column: Sequence[str]) -> int:
    return max(cell_len(line) for cell in column for line in cell.split("\n"))


def _widths(columns: Sequence[Sequence[str]], enough: int, room: int) -> list[int]:
    """Of columns without what is between them: within the room, where this holds.

    The first is as wide as its names; each other at least as wide as its longest word, or as the
    longest of its title where words of the column have more than `enough` characters.
    """
    widths = list(map(_widest, columns))
    words = [[max(map(cell_len, cell.split()), default=0) for cell in col] for col in columns[1:]]
    least = [widths[0], *(max(min(enough, max(cells)), cells[0]) for cells in words)]
    while sum(widths) > room and widths != least:
        spare = [width - needed for width, needed in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths
