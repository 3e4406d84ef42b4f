"""One table, two readers: drawn by rich on a terminal, Markdown that also reads as plain text in a pipe or a file."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe.run.terminal import printable


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The table as Markdown, its cells printable and its columns aligned: the first `left` to the left, the others to
    the right."""
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    width = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]  # "-:" is the shortest that is Markdown
    cells.insert(1, ["-" * dashes if i < left else "-" * (dashes - 1) + ":" for i, dashes in enumerate(width)])
    lines = []
    for row in cells:
        aligned = [f"{cell:{'<' if i < left else '>'}{width[i]}}" for i, cell in enumerate(row)]
        lines.append(f"| {' | '.join(aligned)} |\n")
    return "".join(lines)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print for whoever reads standard output, aligned as in `markdown`. Cells are plain text: no markup is read in
    them."""
    console = Console()
    if not console.is_terminal:
        print(markdown(headings, rows, left), end="")
        return
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(Text(printable(heading)), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number as `form` writes it, with its unit; nothing for one that was not measured."""
    return "" if value is None else f"{value:{form}}{unit}"
