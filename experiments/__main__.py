"""Say which commands there are: `python -m experiments`. Needs neither torch nor Hydra."""

import ast
from pathlib import Path

from moe.run import terminal

SHARED = ("__init__", "__main__", "cli", "refusals", "sweeps")  # files beside the commands that are none


def main() -> None:
    """Print a line per command, and how to get help."""
    terminal.begin()
    said = {path.stem: sentence(path) for path in commands()}
    width = max(map(len, said))
    print("Commands, run as python -m experiments.NAME; what one can be told: python -m experiments.NAME --help\n")
    for name, what in said.items():
        print(f"  {name:{width}}  {what}")


def commands() -> list[Path]:
    """The file of every command, by name."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    main()
