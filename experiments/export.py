"""Write a run as a folder that transformers loads, or as two files: its weights and a C program.

    python -m experiments.export run=runs/NAME to=exported
    python -m experiments.export run=runs/NAME to=exported which=last
    python -m experiments.export run=runs/NAME to=two format=c               # model.bin and run.c

AutoModelForCausalLM.from_pretrained("exported") computes the same logits, and AutoTokenizer.from_pretrained("exported")
gives the same ids for every text. A model or a tokenizer that transformers cannot have is refused. Of a run with
data.documents=separate the logits are the same for one document at a time.
`python -m experiments.import_hf` is the way back.

With format=c the folder has `model.bin` and `run.c`, which a C compiler makes a program of that continues text; see
docs/two-files.md. Whatever run.c does not compute is refused by name.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from moe.config.parse import OneOf
from moe.config.router import OWN, facts
from moe.convert import export_c
from moe.convert.hf_config import family_of
from moe.convert.hf_weights import refuse_existing, save
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
    format: str = "transformers"  # transformers | c: a program in C and what it reads
    dtype: str = "fp32"  # of the weights with format=c: fp32 | int8
    with_tokenizer: bool = True  # False: weights and settings alone, where transformers cannot have the tokenizer

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run=... is needed: a run's folder, such as runs/NAME.")
        if not self.to:
            raise BadInput("to=... is needed: the folder to write, which must not exist.")
        OneOf("transformers", "c").check("format", self.format)
        OneOf("fp32", "int8").check("dtype", self.dtype)
        if self.format == "c" and not self.with_tokenizer:
            raise BadInput("with_tokenizer=false has no meaning for format=c, whose program needs the tokenizer.")
        if self.format != "c" and self.dtype != "fp32":
            raise BadInput(f"dtype={self.dtype} is for format=c; format=transformers writes the weights as they are.")


@cli.command("export", ExportConfig, verbatim=("run", "to"))
def main(cfg: ExportConfig) -> None:
    """Write the folder and say what is in it."""
    folder = Path(cfg.to)
    refuse_existing(folder)
    if cfg.format == "c":
        export_to_c(cfg, folder)
        return
    refuse_own_router(Path(cfg.run))
    model, tokenizer, run_config = load_run(Path(cfg.run), cfg.which)
    save(model, run_config.router, tokenizer if cfg.with_tokenizer else None, folder)
    kind = f"tokenizer {tokenizer.name}" if cfg.with_tokenizer else "no tokenizer (AutoTokenizer makes an empty one)"
    n_parameters = sum(weight.numel() for weight in model.parameters())
    terminal.say(f"exported: {folder}  {family_of(model.cfg, run_config.router)}, {n_parameters:,} parameters, {kind}")
    if model.document_end is not None:
        terminal.say("data.documents=separate: transformers attends across documents, so give it one at a time")


def export_to_c(cfg: ExportConfig, folder: Path) -> None:
    """Write `model.bin` and `run.c`, and say how they become a program. Raises `BadInput` for what run.c has not."""
    export_c.check(read_settings(Path(cfg.run)))
    model, tokenizer, _ = load_run(Path(cfg.run), cfg.which)
    export_c.save(model, tokenizer, folder, cfg.dtype)
    size = (folder / "model.bin").stat().st_size
    terminal.say(f"exported: {folder}  model.bin ({size:,} bytes, {cfg.dtype}) and run.c")
    terminal.say(f"compile: cc -O3 -std=c99 {folder}/run.c -o {folder}/run -lm")
    terminal.say(f'run:     {folder}/run {folder}/model.bin -p "To be" -n 100')
    if not export_c.encodes_text(tokenizer):
        terminal.say(f"tokenizer {tokenizer.name}: run.c does not split text as it does, so prompts are token ids (-i)")


def refuse_own_router(run: Path) -> None:
    """Refuse a run whose router transformers cannot have; nothing of it is imported. Raises `BadInput`."""
    router = read_settings(run).router
    if facts(router) is OWN:
        raise BadInput(
            f"run={run} has router.name={router.name}, a class of one's own, which transformers has not: a run can be "
            "exported whose router is one of conf/router that transformers has, such as router=softmax."
        )


if __name__ == "__main__":
    main()
