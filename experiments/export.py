"""Write a run as two files: its weights, and a program in C that continues text with them.

    python -m experiments.export run=runs/NAME to=two format=c               # model.bin and run.c
    python -m experiments.export run=runs/NAME to=two format=c which=last dtype=int8

A C compiler makes a program of `run.c`; see docs/two-files.md. Whatever run.c does not compute is refused by name.
`python -m experiments.convert` writes a run as what other libraries load.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from moe.config.parse import OneOf
from moe.convert import export_c
from moe.convert.hf_weights import refuse_existing
from moe.errors import BadInput
from moe.run import terminal
from moe.run.folder import read_settings
from moe.run.load import load_run


@dataclass
class ExportConfig:
    """What to write, and where."""

    run: str = ""  # a run's folder
    to: str = ""  # the folder to write
    which: str = "best"  # best (lowest validation loss) | last | step-N
    format: str = "c"  # a program in C and what it reads
    dtype: str = "fp32"  # of the weights: fp32 | int8

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run=... is needed: a run's folder, such as runs/NAME.")
        if not self.to:
            raise BadInput("to=... is needed: the folder to write, which must not exist.")
        if self.format != "c":
            raise BadInput(
                f"format={self.format} is not c: python -m experiments.convert writes what other libraries load."
            )
        OneOf("fp32", "int8").check("dtype", self.dtype)


@cli.command("export", ExportConfig, verbatim=("run", "to"))
def main(cfg: ExportConfig) -> None:
    """Write `model.bin` and `run.c`, and say how they become a program."""
    folder = Path(cfg.to)
    refuse_existing(folder)
    export_c.check(read_settings(Path(cfg.run)))
    model, tokenizer, _ = load_run(Path(cfg.run), cfg.which)
    export_c.save(model, tokenizer, folder, cfg.dtype)
    size = (folder / "model.bin").stat().st_size
    terminal.say(f"exported: {folder}  model.bin ({size:,} bytes, {cfg.dtype}) and run.c")
    terminal.say(f"compile: cc -O3 -std=c99 {folder}/run.c -o {folder}/run -lm")
    terminal.say(f'run:     {folder}/run {folder}/model.bin -p "To be" -n 100')
    if tokenizer.template is not None:
        why = export_c.why_no_chat(tokenizer)
        terminal.say(f"no chat: {why}" if why else f"chat:    {folder}/run {folder}/model.bin --chat")
    if not export_c.encodes_text(tokenizer):
        terminal.say(f"tokenizer {tokenizer.name}: run.c does not split text as it does, so prompts are token ids (-i)")


if __name__ == "__main__":
    main()
