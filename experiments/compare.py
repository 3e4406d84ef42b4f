"""Train a Mixture-of-Experts model and its dense twin on the same batches; say which is better, and by how much.

    python -m experiments.compare                                   # minutes on two CPU cores
    python -m experiments.compare model=cpu-nano train.steps=50     # seconds, too short to mean anything
    python -m experiments.compare seeds=[0,1,2] match=flops         # an interval over seeds, matched in FLOPs
    python -m experiments.compare resume=true                       # go on: finished runs are reused

Writes into `run` (default runs/compare-<hash of the settings>): moe-seed0, dense-seed0, ... (a run's folder each),
compare.json (every number), table.md, and index.html, a page that needs nothing else.
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import cli, page, tables, verdict
from moe import config, data, presets
from moe.config import BadInput, Config
from moe.run import read_lines, write_atomically
from moe.train import train

HEADINGS = ("", "MoE", "dense twin", "MoE against twin")


@dataclass
class CompareConfig(Config):
    """A training run's settings, for both models."""

    match: str = "active_params"  # active_params | flops | total_params: what the dense twin has in common
    seeds: list[int] = field(default_factory=list)  # a pair of runs for each; empty: only `seed`

    def __post_init__(self) -> None:
        if self.match not in verdict.LABELS:
            valid = sorted(verdict.LABELS)
            raise BadInput(f"match={self.match} is not one of {', '.join(valid)}; {config.nearest(self.match, valid)}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise BadInput(f"seeds={self.seeds} names a seed twice: each must be there once.")
        if any(seed < 0 for seed in self.seeds):
            raise BadInput(f"seeds={self.seeds} has a negative one: accepted is at least 0.")


@cli.command("compare", CompareConfig)
def main(cfg: CompareConfig) -> None:
    """Compare, then print the table and the verdict."""
    result = compare(cfg, overrides=sys.argv[1:])
    print()
    tables.print_table(HEADINGS, result["table"])
    for sentence in result["sentences"]:
        print(sentence)
    print(f"page: {Path(result['folder'], 'index.html')}")


def compare(cfg: CompareConfig, say: Callable[[str], None] = print, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a pair of models per seed and write the comparison: what `compare.json` holds.

    `overrides` is the command line to repeat it with. With `cfg.resume` finished runs are reused and others continued.
    Raises `BadInput` for a model without experts, a twin that cannot match, or a folder that exists."""
    folder = Path(cfg.run or f"runs/compare-{config.fingerprint(cfg)}")
    if folder.exists() and not cfg.resume:
        raise BadInput(f"run={folder} exists: continue it with resume=true, or choose another folder.")
    if cfg.model.moe is None:
        raise BadInput("model.moe=null leaves nothing to compare: choose a Mixture-of-Experts model.")
    vocab_size = cfg.model.vocab_size or data.prepare(cfg.data, cfg.tokenizer, say).tokenizer.vocab_size
    moe = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    models = {"moe": moe, "dense": presets.dense_twin(moe, cfg.match)}

    pairs = []
    for seed in cfg.seeds or [cfg.seed]:
        runs = []
        for kind, model in models.items():
            run = folder / f"{kind}-seed{seed}"
            say(f"compare: {kind}, seed {seed}")
            shared = {each.name: getattr(cfg, each.name) for each in dataclasses.fields(Config)}
            try:
                train(Config(**shared | {"seed": seed, "run": str(run), "model": model}), say)
            except SystemExit:
                say(f"The comparison is not finished. Go on with it: {command_line(overrides)} resume=true")
                raise
            runs.append(read_run(run))
        pairs.append(verdict.Pair(*runs))

    result = describe(cfg, folder, pairs, command_line(overrides))
    write_atomically(folder / "table.md", tables.markdown(HEADINGS, result["table"]))
    write_atomically(folder / "index.html", page.render(pairs, result))
    write_atomically(folder / "compare.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def command_line(overrides: Sequence[str]) -> str:
    """What to type for this comparison, from the start."""
    kept = [each for each in overrides if not each.startswith("resume=")]
    return shlex.join(["python", "-m", "experiments.compare", *kept])


def read_run(folder: Path) -> verdict.Run:
    """A finished run from its folder."""
    summary = json.loads((folder / "summary.json").read_text())
    return verdict.Run(folder.name, summary, read_lines(folder / "metrics.jsonl"))


def describe(cfg: CompareConfig, folder: Path, pairs: list[verdict.Pair], command: str) -> dict[str, Any]:
    """Everything the comparison found, ready for JSON. An interval without a bound has null there."""
    rows = verdict.table(pairs)
    numbers = []
    for row in rows:
        number = dataclasses.asdict(row)
        if row.interval:
            number["interval"] = [value if math.isfinite(value) else None for value in row.interval]
        numbers.append(number)
    summary = pairs[0].moe.summary
    return {
        "sentences": verdict.sentences(pairs, cfg.match),
        "table": [verdict.cells(row) for row in rows],
        "numbers": numbers,
        "folder": str(folder),
        "runs": {"moe": [pair.moe.folder for pair in pairs], "dense": [pair.dense.folder for pair in pairs]},
        "command": command,
        "commit": summary["commit"],
        "dirty": summary["dirty"],
        "config": config.to_dict(cfg),
    }


if __name__ == "__main__":
    main()
