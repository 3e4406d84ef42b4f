"""Fill the README's tables from experiments/results: no number in it is typed by hand.

python -m experiments.readme
"""

import json
import re
from pathlib import Path
from typing import Any

from experiments import bench, compare
from experiments.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
SECTION = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


def filled(text: str) -> str:
    """`text` with every `<!-- name: begin -->` section made anew from the results."""
    return SECTION.sub(lambda match: f"{match[1]}{sections()[match[2]]}{match[3]}", text)


def sections() -> dict[str, str]:
    """The text of every section by name."""
    return {
        "demo": comparison(read("demo.json")),
        "seeds": comparison(read("three-seeds.json")),
        "bench": benchmark([json.loads(line) for line in (RESULTS / "train_step.jsonl").read_text().splitlines()]),
        "next": f"```\n{(RESULTS / 'next.txt').read_text()}```\n",
    }


def read(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads((RESULTS / name).read_text())


def comparison(result: dict[str, Any]) -> str:
    """A comparison's verdict and its table, with the command that made it."""
    table = markdown(compare.HEADINGS, result["table"])
    source = f"`{result['command']}`, {commit(result)}"
    return f"> {' '.join(result['sentences'])}\n\n{table}\n{source}\n"


def benchmark(rows: list[dict[str, Any]]) -> str:
    """The benchmark's table, with where it was run."""
    first = rows[0]
    shape = ", ".join(f"{key}={value}" for key, value in first["shape"].items())
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    source = f"`{first['command']}`, {shape}; {where}"
    return f"{markdown(bench.HEADINGS, map(bench.cells, rows))}\n{source}\n"


def commit(result: dict[str, Any]) -> str:
    """Which code a result came from."""
    return f"commit {result['commit'][:10]}{' with uncommitted changes' if result['dirty'] else ''}"


if __name__ == "__main__":
    main()
