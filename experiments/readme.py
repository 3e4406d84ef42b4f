"""Fill the tables of README.md and docs/ from experiments/results, and write that of conf/router.

python -m experiments.readme

A table stands between `<!-- name: begin -->` and `<!-- name: end -->`; nothing in one is typed by hand.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

from experiments.pages import (
    branch_tables,
    coverage_table,
    diversity_table,
    router_table,
    simulate_table,
    sweep_table,
    trust_table,
)
from experiments.pages.tables import markdown
from experiments.stats import branching, planner, published, recovery, scale_out, streaming, verdict
from experiments.stats.simulation import Line
from experiments.suites import (
    alarm_table,
    alignment,
    cases,
    equalities,
    evidence,
    families,
    faults,
    generation,
    memory,
    page,
    ranks,
    survival,
    tracing,
    train_step,
    watching,
)
from experiments.suites import routing as routing_suite
from moe.config.model import ModelConfig
from moe.config.parse import parse
from moe.config.router import RouterConfig
from moe.run.command_line import Options
from moe.run.jsonl import record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
ROUTERS = ROOT / "conf" / "router" / "README.md"
MAIN = (  # rows of a comparison
    "Validation loss (nats per token)", "Training throughput (tokens/s)", "Active parameters", "Total parameters",
)  # fmt: skip
PRINTED = ("uneven", "even", "watch", "scores", "tasks", "next")  # what commands said, as it is
SECTION = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the pages and conf/router/README.md."""
    Options(__doc__).parse_args()
    for path in pages():
        path.write_text(filled(path.read_text()))
    ROUTERS.write_text(all_routers())


def pages() -> list[Path]:
    """The pages that have sections."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """`text` with every `<!-- name: begin -->` section made anew from the results."""
    made = sections()
    return SECTION.sub(lambda match: f"{match[1]}{made[match[2]]}{match[3]}", text)


def sections() -> dict[str, str]:
    """The text of every section by name."""
    # What commands printed, as it is; and tables, each of rows that a command left.
    printed = {name: f"```\n{(RESULTS / f'{name}.txt').read_text()}```\n" for name in PRINTED}
    return printed | {
        "verdict": said(read_comparison("demo.json")),
        "demo": comparison(read_comparison("demo.json")),
        "demo_short": in_short(read_comparison("demo.json")),
        "bench": benchmark([json.loads(line) for line in (RESULTS / "train_step.jsonl").read_text().splitlines()]),
        "routing": routing(cases.read(RESULTS / "routing.jsonl")),
        "routers": sweep_of_routers(json.loads((RESULTS / "routers.json").read_text())),
        "gpu": gpu(evidence.read(RESULTS)),
        **aligned(RESULTS / "align.jsonl"),
        "diversity": diversity(RESULTS / "diversity.jsonl"),
        "alarms": alarms([json.loads(line) for line in (RESULTS / "alarms.jsonl").read_text().splitlines()]),
        "page": by_suite(page, "page"),
        "generation": by_suite(generation, "generation"),
        "watching": by_suite(watching, "watching"),
        "families": of_transformers(cases.read(RESULTS / "families.jsonl")),
        "coverage": coverage([json.loads(line) for line in (RESULTS / "coverage.jsonl").read_text().splitlines()]),
        "trust": trust([json.loads(line) for line in (RESULTS / "trust.jsonl").read_text().splitlines()]),
        "caveats": markdown(trust_table.CANNOT, trust_table.caveat_rows(), 2),
        "memory": planned_memory(cases.read(RESULTS / "memory.jsonl")),
        "streamed": streamed_presets(),
        "tracing": by_suite(tracing, "tracing"),
        **branches("branch_train_mix.jsonl"),
        **simulated(),
        "equalities": equal_to_one_process(cases.read(RESULTS / "equalities.jsonl")),
        "survival": by_suite(survival, "survival"),
        "ranks": by_suite(ranks, "ranks"),
    }


def read(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads((RESULTS / name).read_text())


def read_comparison(name: str) -> verdict.Comparison:
    """A results file of a comparison."""
    return record(verdict.Comparison, read(name), name)


def said(result: verdict.Comparison) -> str:
    """A comparison's verdict in words."""
    return f"> {' '.join(result.sentences)}\n"


def comparison(result: verdict.Comparison) -> str:
    """A comparison's verdict and its table, with the command that made it."""
    return f"{said(result)}\n{markdown(verdict.HEADINGS, result.table)}\n{source(result)}\n"


def in_short(result: verdict.Comparison) -> str:
    """A comparison's main rows, with the command that made it."""
    rows = [cells for cells in result.table if cells[0] in MAIN]
    return f"{markdown(verdict.HEADINGS, rows)}\n{source(result)}\n"


def source(result: verdict.Comparison) -> str:
    """The command that made a comparison, and of which code."""
    return f"`{result.command}`, {commit(dataclasses.asdict(result))}"


def benchmark(rows: list[dict[str, Any]]) -> str:
    """The benchmark's table, with where it was run."""
    first = rows[0]
    shape = ", ".join(f"{key}={value}" for key, value in first["shape"].items())
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    return f"{markdown(*train_step.table(rows))}\n`{first['command']}`, {shape}; {where}\n"


def routing(rows: list[dict[str, Any]]) -> str:
    """Gate, plan and combine against the eager sequence, at the most tokens that were measured."""
    if not rows:
        return "Not yet measured: `python -m experiments.bench suite=routing out=experiments/results/routing.jsonl`.\n"
    most = max(row["T"] for row in rows)
    table = markdown(routing_suite.HEADINGS, (routing_suite.cells(row) for row in rows if row["T"] == most))
    first = rows[0]
    where = f"{first['device']}, {first['threads']} threads, torch {first['versions']['torch']}, {commit(first)}"
    return f"{table}\n`{first['command']}`, D={first['D']}, F={first['F']}; {where}\n"


def coverage(rows: list[dict[str, Any]]) -> str:
    """How often intervals held the truth in simulated studies, and how often words were wrong."""
    lines = [record(Line, row, "coverage.jsonl") for row in rows]
    one, many = (markdown(headings, table) for headings, table in (
        (coverage_table.HEADINGS, coverage_table.rows(lines)), (coverage_table.RANKS, coverage_table.rank_rows(lines))
    ))  # fmt: skip
    return f"{one}\n{many}\n`{rows[0]['command']}`, {lines[0].studies:,} studies of each kind; {commit(rows[0])}\n"


def trust(rows: list[dict[str, Any]]) -> str:
    """What metrics made of planted routers, and how many of the names that they gave were right."""
    lines = [record(recovery.Line, row, "trust.jsonl") for row in rows]
    metrics = markdown(trust_table.HEADINGS, trust_table.rows(lines), trust_table.LEFT)
    names = markdown(trust_table.NAMES_HEADINGS, trust_table.name_rows(lines), 2)
    return f"{metrics}\n{names}\n`{rows[0]['command']}`, {lines[0].draws} draws of every setting; {commit(rows[0])}\n"


def diversity(path: Path) -> str:
    """What runs that learnt more and more kinds of task came to."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        record(diversity_table.Row, {name: line[name] for name in diversity_table.Row._fields}, path.name)
        for line in lines
    ]
    said = f"\n`{lines[0]['command']}`; {lines[0]['device']}, {commit(lines[0])}\n"
    return markdown(diversity_table.HEADINGS, diversity_table.cells(rows)) + said


def aligned(path: Path) -> dict[str, str]:
    """What objectives made of one start, of pairs in particular, and what drawing and training route otherwise."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [record(alignment.Row, {name: line[name] for name in alignment.Row._fields}, path.name) for line in lines]
    said = f"\n`{lines[0]['command']}`; {lines[0]['device']}, {commit(lines[0])}\n"
    return {
        "align": markdown(alignment.HEADINGS, alignment.cells(rows)) + said,
        "pairs": markdown(alignment.PAIRS, alignment.pair_cells(rows)) + said,
        "replay": markdown(alignment.ROUTES, alignment.route_cells(rows)) + said,
    }


def branches(name: str) -> dict[str, str]:
    """What branch-train-mix came to, a section for each of its tables."""
    lines = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    rows, first = [record(branching.Row, line, name) for line in lines], lines[0]
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    made = {key: markdown(*table) for key, table in branch_tables.all_tables(rows).items()}
    made["arms"] += f"\n`{first['command']}`, seeds {seeds}; {first['device']}, {commit(first)}\n"
    return {f"branch_{key}": table for key, table in made.items()}


def simulated() -> dict[str, str]:
    """What steps on many GPUs would take, by routes that are drawn and by a recording, and what others published."""
    made: dict[str, str] = {}
    for name in ("simulate", "simulate_recorded"):
        lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
        kinds: dict[str, Any] = {"routing": scale_out.Line, "effect": scale_out.Effect, "check": published.Row}
        routing, effects, checks = (
            [kind(**{key: line[key] for key in kind._fields}) for line in lines if line["kind"] == key_of]
            for key_of, kind in kinds.items()
        )
        said = f"\n`{lines[0]['command']}`, {lines[0]['model']} on {lines[0]['machine']}; {commit(lines[0])}\n"
        table = markdown(simulate_table.HEADINGS, simulate_table.cells(routing), simulate_table.LEFT)
        made[name] = table + said
        made[f"{name}_effects"] = markdown(simulate_table.EFFECTS, simulate_table.effect_cells(effects)) + said
        if checks:
            table = markdown(simulate_table.CHECKS, simulate_table.check_cells(checks), simulate_table.CHECKS_LEFT)
            made[f"{name}_checks"] = f"{table}\n{simulate_table.summary(checks)}\n{said}"
    return made


def alarms(rows: list[dict[str, Any]]) -> str:
    """Which faults alarms told of, and which alarms did."""
    runs = [record(faults.Row, {name: row[name] for name in faults.Row._fields}, "alarms.jsonl") for row in rows]
    by_fault = markdown(alarm_table.BY_FAULT, alarm_table.fault_rows(runs))
    by_alarm = markdown(alarm_table.BY_ALARM, alarm_table.alarm_rows(runs))
    return f"{by_fault}\n{by_alarm}\n`{rows[0]['command']}`, {commit(rows[0])}\n"


def by_suite(suite: Any, name: str) -> str:
    """The rows of a suite, as its own table has them."""
    rows = cases.read(RESULTS / f"{name}.jsonl")
    where = f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}, {commit(rows[0])}"
    return f"{markdown(suite.HEADINGS, map(suite.cells, rows))}\n`{rows[0]['command']}`; {where}\n"


def equal_to_one_process(rows: list[dict[str, Any]]) -> str:
    """How far training on several ranks is from one process, router by router."""
    first, steps = rows[0], next(row["steps"] for row in rows if "steps" in row)
    where = f"{steps} steps; {first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    return f"{markdown(equalities.SUMMARY, equalities.summary(rows))}\n`{first['command']}`, {where}\n"


def of_transformers(rows: list[dict[str, Any]]) -> str:
    """How far models read here are from transformers' own, and of which release."""
    where = f"transformers {rows[0]['transformers']}, torch {rows[0]['versions']['torch']}, {rows[0]['device']}"
    table = markdown(families.HEADINGS, map(families.cells, rows))
    return f"{table}\n`{rows[0]['command']}`; {where}, {commit(rows[0])}\n"


def planned_memory(rows: list[dict[str, Any]]) -> str:
    """What steps were planned to take and took; and what the others' rates say of each one's time."""
    predicted = planner.left_out(*planner.work_of(rows))
    lines = [(*memory.cells(row), f"{seconds * 1e3:,.0f} ms") for row, seconds in zip(rows, predicted, strict=True)]
    errors = sorted(abs(seconds / row["seconds_per_step"] - 1) for row, seconds in zip(rows, predicted, strict=True))
    worst, first = max(abs(row["error"]) for row in rows), rows[0]
    off = f"Memory is at most {worst:.2%} off; a step's time, told by the other shapes' steps, "
    off += f"{errors[len(errors) // 2]:.0%} in the middle and {errors[-1]:.0%} at worst."
    table = markdown((*memory.HEADINGS, "by the others"), lines)
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    return f"{table}\n{off}\n\n`{first['command']}`; {where}\n"


def streamed_presets() -> str:
    """What 100,000 tokens take of the published models, one layer at a time."""
    lines = []
    for name in ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"):
        model = parse(ModelConfig, yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()), "model.")
        cost = streaming.streamed(model, RouterConfig(), 100_000)
        sizes = map(planner.gigabytes, (cost.folder, cost.block, cost.memory, cost.states + cost.routes))
        lines.append((name, *sizes, f"{cost.flops:.2e}", planner.duration(cost.flops / 2e10)))
    headings = (
        "100,000 tokens",
        "folder",
        "largest block",
        "peak, libraries apart",
        "files",
        "FLOPs",
        "at 2e10 FLOP/s",
    )
    return markdown(headings, lines)


def all_routers() -> str:
    """What every file of conf/router is."""
    table = markdown(router_table.HEADINGS, router_table.rows(), router_table.LEFT)
    text = (
        "Each file here is a word for `router=...`: a router with the balance and the experts it comes with. How they\n"
        "compare is in [docs/experiments.md](../../docs/experiments.md), what each setting means in\n"
        "`moe/config/router.py`."
    )
    return f"# Routers\n\n{text}\n\n{table}\n`python -m experiments.routers`\n"


def sweep_of_routers(rows: list[dict[str, Any]]) -> str:
    """A line per router of `conf/router`, and the dense twins'."""
    first = rows[0]
    lines = [record(sweep_table.Line, row, "routers.json") for row in rows]
    baseline = first.get("baseline", sweep_table.BASELINE)
    lines = sweep_table.judged(lines, baseline)
    table = markdown(*sweep_table.table(lines, baseline))
    notes = "".join(f"\n{sentence}\n" for sentence in sweep_table.notes(lines))
    where = f"{first['device']}, torch {first['versions']['torch']}, {commit(first)}"
    return f"{table}{notes}\n`{first['command']}`; {where}\n"


def gpu(rows: list[dict[str, Any]]) -> str:
    """What `experiments.gpu_evidence` measured: rows by stage, the layer against its peers, training steps, targets."""
    if not rows:
        return "Not yet measured: `python -m experiments.gpu_evidence --out experiments/results` on a GPU.\n"
    first = rows[0]
    names = {"driver": first["driver"]} | first["versions"]
    versions = ", ".join(f"{name} {names[name]}" for name in ("driver", "torch", "triton", "cuda") if names.get(name))
    commits = ", ".join(dict.fromkeys(commit(row) for row in rows))
    parts = [f"{first['device']}, {versions}; {commits}\n"]
    parts.append(markdown(evidence.STAGE_HEADINGS, evidence.stages(rows)))
    if lines := evidence.layer(rows):
        parts.append(markdown(evidence.LAYER_HEADINGS, lines))
    if steps := [row for row in rows if row["stage"] == "train_step"]:
        parts.append(markdown(*train_step.table(steps)))
    if lines := evidence.targets(rows):
        parts.append(markdown(evidence.TARGET_HEADINGS, lines))
    if (RESULTS / "roofline.png").exists():
        parts.append("![FLOP per byte against TF/s](../experiments/results/roofline.png)\n")
    return "\n".join(parts) + f"\n`{first['command'].partition(' --stage')[0]}`\n"


def commit(result: dict[str, Any]) -> str:
    """Which code a result came from."""
    name = f"commit {result['commit'][:10]}" if result["commit"] else f"code {result['code']}"
    return f"{name}{' with uncommitted changes' if result['dirty'] else ''}"


if __name__ == "__main__":
    main()
