"""Fill the README's tables from experiments/results, and write that of conf/router: nothing in them is typed by hand.

python -m experiments.readme
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from experiments.pages import router_table, sweep_table
from experiments.pages.tables import markdown
from experiments.stats import verdict
from experiments.suites import cases, evidence, train_step
from experiments.suites import routing as routing_suite
from moe.run.jsonl import record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
ROUTERS = ROOT / "conf" / "router" / "README.md"
SECTION = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)


def main() -> None:
    """Rewrite README.md and conf/router/README.md."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
    ROUTERS.write_text(all_routers())


def filled(text: str) -> str:
    """`text` with every `<!-- name: begin -->` section made anew from the results."""
    return SECTION.sub(lambda match: f"{match[1]}{sections()[match[2]]}{match[3]}", text)


def sections() -> dict[str, str]:
    """The text of every section by name."""
    return {
        "demo": comparison("demo.json"),
        "seeds": comparison("three-seeds.json"),
        "bench": benchmark([json.loads(line) for line in (RESULTS / "train_step.jsonl").read_text().splitlines()]),
        "routing": routing(cases.read(RESULTS / "routing.jsonl")),
        "routers": sweep_of_routers(json.loads((RESULTS / "routers.json").read_text())),
        "gpu": gpu(evidence.read(RESULTS)),
        "next": f"```\n{(RESULTS / 'next.txt').read_text()}```\n",
    }


def read(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads((RESULTS / name).read_text())


def comparison(name: str) -> str:
    """A comparison's verdict and its table, with the command that made it, from a results file."""
    result = record(verdict.Comparison, read(name), name)
    table = markdown(verdict.HEADINGS, result.table)
    source = f"`{result.command}`, {commit(dataclasses.asdict(result))}"
    return f"> {' '.join(result.sentences)}\n\n{table}\n{source}\n"


def benchmark(found: list[dict[str, Any]]) -> str:
    """The benchmark's table, with where it was run."""
    first = found[0]
    shape = ", ".join(f"{key}={value}" for key, value in first["shape"].items())
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    source = f"`{first['command']}`, {shape}; {where}"
    return f"{markdown(*train_step.table(found))}\n{source}\n"


def routing(found: list[dict[str, Any]]) -> str:
    """Gate, plan and combine against the eager sequence, at the most tokens that were measured."""
    if not found:
        return "Not yet measured: `python -m experiments.bench suite=routing`.\n"
    most = max(row["T"] for row in found)
    table = markdown(routing_suite.HEADINGS, (routing_suite.cells(row) for row in found if row["T"] == most))
    first = found[0]
    where = f"{first['device']}, {first['threads']} threads, torch {first['versions']['torch']}, {commit(first)}"
    return f"{table}\n`{first['command']}`, D={first['D']}, F={first['F']}; {where}\n"


def all_routers() -> str:
    """What every file of conf/router is."""
    table = markdown(router_table.HEADINGS, router_table.rows(), router_table.LEFT)
    text = (
        "Each file here is a word for `router=...`: a router with the balance and the experts it comes with. How they\n"
        "compare is in the [README](../../README.md), what each setting means in `moe/config/router.py`."
    )
    return f"# Routers\n\n{text}\n\n{table}\n`python -m experiments.routers`\n"


def sweep_of_routers(found: list[dict[str, Any]]) -> str:
    """A line per router of `conf/router`, and the dense twins'."""
    first = found[0]
    names = [each.name for each in dataclasses.fields(sweep_table.Line)]
    lines = [sweep_table.Line(**{name: row[name] for name in names}) for row in found]
    table = markdown(*sweep_table.table(lines))
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    return f"{table}\n`{first['command']}`; {where}\n"


def gpu(found: list[dict[str, Any]]) -> str:
    """What `experiments.gpu_evidence` measured: rows by stage, the layer against its peers, training steps, targets."""
    if not found:
        return "Not yet measured: `python -m experiments.gpu_evidence --out experiments/results` on a GPU.\n"
    first = found[0]
    names = {"driver": first["driver"]} | first["versions"]
    versions = ", ".join(f"{name} {names[name]}" for name in ("driver", "torch", "triton", "cuda") if names.get(name))
    commits = ", ".join(dict.fromkeys(commit(row) for row in found))
    parts = [f"{first['device']}, {versions}; {commits}\n"]
    parts.append(markdown(evidence.STAGE_HEADINGS, evidence.stages(found)))
    if lines := evidence.layer(found):
        parts.append(markdown(evidence.LAYER_HEADINGS, lines))
    if steps := [row for row in found if row["stage"] == "train_step"]:
        parts.append(markdown(*train_step.table(steps)))
    if lines := evidence.targets(found):
        parts.append(markdown(evidence.TARGET_HEADINGS, lines))
    if (RESULTS / "roofline.png").exists():
        parts.append("![FLOP per byte against TF/s](experiments/results/roofline.png)\n")
    return "\n".join(parts) + f"\n`{first['command'].partition(' --stage')[0]}`\n"


def commit(result: dict[str, Any]) -> str:
    """Which code a result came from."""
    name = f"commit {result['commit'][:10]}" if result["commit"] else f"code {result['code']}"
    return f"{name}{' with uncommitted changes' if result['dirty'] else ''}"


if __name__ == "__main__":
    main()
