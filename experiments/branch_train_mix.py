"""A model per domain, trained apart from one dense model, as the experts of a mixture: branch-train-mix.

Against upcycling, training from scratch and training the dense model on, at equal FLOPs; then the router is trained.

python -m experiments.branch_train_mix                                     # three seeds, half an hour on a CPU core
python -m experiments.branch_train_mix seeds=[0] train.steps=50 copy_steps=20 mix_steps=20 run=runs/NAME
python -m experiments.branch_train_mix data=text data.path=FOLDER data.domains=[law,medicine] run=runs/NAME

Branch-train-mix (2403.07816). Every stage is an ordinary run in a folder below `run`: `seed0/dense`,
`seed0/copy-code`, `seed0/merged`, `seed0/mixed` and so on. The same command goes on where it was cut off, and repeats
no run that is finished. The mix takes `model.moe.k`; it has an expert for each domain, as wide as the dense MLP.

After every seed all models are scored on the same validation text, and the lines written: losses in all and by domain,
and how many rows each expert took of each domain.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from experiments import cli
from experiments.pages import branch_tables, tables
from experiments.stats.branching import Row
from experiments.study.branches import Plan, plan, run_seed
from moe.config.parse import MANY, Between
from moe.config.run import Config
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.eval.evaluate import evaluate
from moe.model import dispatch
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines
from moe.run.load import load_run

FOLLOWS = ("model.moe.n_experts", "model.moe.d_expert")  # from the domains, and from the dense model


@dataclass
class BranchTrainMixConfig(Config):
    """The settings that all runs have in common; `train.steps` are the seed model's."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    copy_steps: Annotated[int, Between(1, MANY)] = 100  # of each domain's copy
    mix_steps: Annotated[int, Between(1, MANY)] = 200  # of the merged model, on all domains
    out: str = ""  # where the lines go; "": results.jsonl in `run`

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadInput(f"seeds={self.seeds} must be different numbers of at least 0, such as [0,1,2].")
        if not self.run:
            raise BadInput("run=... is needed: a folder for the runs of all stages, such as runs/NAME.")
        if self.source or self.tune.parts or self.tune.rank:
            raise BadInput("source and tune cannot be given: which weights a stage starts from and trains is its own.")


@cli.command("branch_train_mix", BranchTrainMixConfig, verbatim=("run", "out"))
def main(cfg: BranchTrainMixConfig) -> None:
    """Train what is missing, score, write, print."""
    given = cli.keys_given()
    for key in (key for key in given if key in (*FOLLOWS, "seed", "seed_init", "seed_data")):
        follows = "it follows from the domains and model.d_ff" if key in FOLLOWS else "give seeds=[...]"
        raise BadInput(f"{key} cannot be given: {follows}.")
    # What is to be trained: one corpus, and the part of it that is each domain's.
    settings = Config(**{name: getattr(cfg, name) for name in Config.__dataclass_fields__})
    dataset = prepare(cfg.data, cfg.tokenizer, terminal.say)
    size = dataset.tokenizer.vocab_size
    planned = plan(settings, list(dataset.domains), size, cfg.copy_steps, cfg.mix_steps)
    terminal.say(f"domains: {', '.join(planned.domains)}; steps: {planned.steps}, copies {cfg.copy_steps} each")

    # Seed by seed, so that a study that is cut short has whole seeds to compare.
    out, rows = Path(cfg.out or Path(cfg.run) / "results.jsonl"), []
    facts = {
        "command": command_line("branch_train_mix", *sys.argv[1:]),
        **machine.git_state()._asdict(),
    }
    for seed in cfg.seeds:
        folders = run_seed(planned, seed, Path(cfg.run) / f"seed{seed}", dataset, terminal.say)
        rows += [score(planned, seed, name, folder, dataset) for name, folder in folders.items()]
        write_lines(out, (row.tree() | facts for row in rows))
    for headings, cells, left in branch_tables.all_tables(rows).values():
        tables.print_table(headings, cells, left)
    terminal.say(f"lines: {out}")


def score(planned: Plan, seed: int, name: str, folder: Path, dataset: Dataset) -> Row:
    """The end of a run on the validation text of all domains."""
    model, _, cfg = load_run(folder, "last", planned.moe.router.name)
    device = machine.choose_device("auto")
    evaluation = evaluate(
        model.to(device), dataset, n_tokens=cfg.train.eval_tokens, batch_size=cfg.train.batch_size,
        backend=dispatch.choose("auto", device)[0], autocast=partial(machine.autocast, cfg),
    )  # fmt: skip
    assert evaluation is not None, "nothing stops it"
    steps = planned.steps.get(name, planned.copy_steps)
    by_domain = {domain: of.loss for domain, of in evaluation.val.domains.items()}
    if missing := [domain for domain in dataset.domains if domain not in by_domain]:
        raise BadInput(f"train.eval_tokens={cfg.train.eval_tokens} have no text of {', '.join(missing)}: give more.")
    load = evaluation.load
    return Row(
        seed, name, steps, planned.flops.get(name), evaluation.val.loss, by_domain,
        load.counts if load else None, cfg.model.moe.k if cfg.model.moe else None, machine.device_name(device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
