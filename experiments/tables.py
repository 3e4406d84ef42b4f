"""One table, two readers: drawn by rich on a terminal, Markdown that also reads as plain text in a pipe or a file."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as Markdown, its columns aligned: the first to the left, the others to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width[0], *("-" * (each - 1) + ":" for each in width[1:])])
    lines = []
    for label, *values in cells:
        aligned = [f"{value:>{each}}" for value, each in zip(values, width[1:], strict=True)]
        lines.append(f"| {' | '.join([f'{label:<{width[0]}}', *aligned])} |\n")
    return "".join(lines)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print for whoever reads standard output. Cells are plain text: no markup is read in them."""
    console = Console()
    if not console.is_terminal:
        print(markdown(headings, rows), end="")
        return
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number as `form` writes it, with its unit; nothing for one that was not measured."""
    return "" if value is None else f"{value:{form}}{unit}"
