"""Make a run of a folder that transformers wrote, with weights, settings and tokenizer.

    python -m experiments.import_hf source=FOLDER run=runs/NEW
    python -m experiments.generate run=runs/NEW prompt="To be, or not"
    python -m experiments.upcycle source=runs/NEW run=runs/MOE                  # a dense one into an MoE
    python -m experiments.train source=runs/NEW run=runs/TUNED                  # on other text

The last takes model and tokenizer from the run that was made.
The folder is on this machine; nothing is downloaded, no code of its own is run and no pickle opened. A model of another
family, a setting that this one does not have and a tokenizer that is not byte-level BPE are refused by name. What a
tokenizer does to text besides (NFC, a token before every text, tokens sought in it) a run's does not: that is refused
too, unless `inexact=true`, with which it is said.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from moe.config.data import TokenizerConfig
from moe.config.parse import to_dict
from moe.config.run import Config, validate
from moe.convert.hf_config import read_config
from moe.convert.hf_tokenizer import read_tokenizer
from moe.convert.hf_weights import load
from moe.data.owner import remove_leftovers
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint, machine, terminal
from moe.run.folder import create_folder


@dataclass
class ImportConfig:
    """What to read, and where the run goes."""

    source: str = ""  # a folder that transformers wrote
    run: str = ""  # the new run's folder
    inexact: bool = False  # take a tokenizer that reads some texts otherwise than transformers

    def __post_init__(self) -> None:
        if not self.source:
            raise BadInput("source=... is needed: a folder with config.json, safetensors and tokenizer.json.")
        if not self.run:
            raise BadInput("run=... is needed: the new run's folder, such as runs/NAME.")


@cli.command("import_hf", ImportConfig, verbatim=("source", "run"))
def main(cfg: ImportConfig) -> None:
    """Write the run's folder and say what can be done with it."""
    source, folder = Path(cfg.source), Path(cfg.run)
    if os.path.lexists(folder):
        raise BadInput(f"run={folder} exists: choose another folder.")
    # The settings and the tokenizer, and only then the weights, which take long.
    model_config, router = read_config(source)
    tokenizer, differences = read_tokenizer(source)
    if differences and not cfg.inexact:
        raise BadInput(f"{source}: {differences[0]}: with inexact=true it is taken all the same.")
    for difference in differences:
        terminal.say(f"warning: {difference}")
    sizes = tokenizer.vocab_size, model_config.vocab_size
    if sizes[0] > sizes[1]:
        raise BadInput(f"{source}: the tokenizer's {sizes[0]} tokens are more than the model's {sizes[1]}.")
    target = Config(run=str(folder), model=model_config, router=router)
    target.tokenizer = TokenizerConfig("saved", path=str(folder))
    validate(target)
    model = load(source)
    create(folder, target, model, tokenizer)
    n_parameters = sum(weight.numel() for weight in model.parameters())
    terminal.say(
        f"run: {folder}  {n_parameters:,} parameters, tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} tokens. "
        f"Try it with: python -m experiments.generate {shlex.quote(f'run={folder}')}"
    )


def create(folder: Path, cfg: Config, model: Transformer, tokenizer: Tokenizer) -> None:
    """Make the run's folder: config.yaml, tokenizer and a checkpoint of step 0 with weights alone, all of it or
    nothing. Raises `BadInput` for weights that are not finite, and where it cannot be written."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise BadInput(f"the weight {name} is not finite: choose another folder.")
    meta = {"config": to_dict(cfg), "tokenizer": tokenizer.fingerprint, "loader": None, "versions": machine.versions()}
    snapshot = checkpoint.Snapshot(0, model_tensors(model), {}, meta, {})
    remove_leftovers(folder.parent)
    create_folder(folder, cfg, tokenizer, lambda beside: checkpoint.save(beside / "checkpoints", snapshot, keep=1))


if __name__ == "__main__":
    main()
