"""A run as a folder that transformers loads, and such a folder as a run, tokenizer included.

    python -m experiments.convert source=runs/NAME to=folder                      # which=best|last|step-N
    python -m experiments.convert source=folder to=runs/NEW
    python -m experiments.convert source=runs/NAME to=folder dtype=bfloat16 shard_gb=2

What comes of it is decided by what `source` is. One tensor is in memory at a time, so a model larger than memory is
converted too. The target appears whole or not at all.

AutoModelForCausalLM.from_pretrained("folder") computes the same logits, and AutoTokenizer.from_pretrained("folder")
gives the same ids for every text. A model or a tokenizer that transformers cannot have is refused. Of a run with
data.documents=separate the logits are the same for one document at a time.

A folder is on this machine; nothing is downloaded, no code of its own is run and no pickle opened. A model of another
family, a setting that this one does not have and a tokenizer that is not byte-level BPE are refused by name. What a
tokenizer does to text besides (NFC, a token before every text, tokens sought in it) a run's does not: that is refused
too, unless `inexact=true`, with which it is said. The run that is made can be generated from, upcycled, and be the
`source=` of another.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import cli
from moe.config.data import TokenizerConfig
from moe.config.parse import OneOf, to_dict
from moe.config.router import OWN, facts
from moe.config.run import Config, validate
from moe.convert.hf_config import family_of, read_config
from moe.convert.hf_stream import Parts
from moe.convert.hf_tokenizer import read_tokenizer
from moe.convert.hf_weights import SHARD_BYTES, refuse_existing, save_tensors
from moe.data.owner import remove_leftovers
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.run import checkpoint, machine, terminal
from moe.run.command_line import command_line, override
from moe.run.folder import create_folder, read_settings
from moe.run.load import open_run
from moe.run.streamed import Tensors


@dataclass
class ConvertConfig:
    """What to read, and what to write."""

    source: str = ""  # a run's folder, or one that transformers wrote
    to: str = ""  # the folder to write
    which: str = ""  # of a run: best (lowest validation loss; the default) | last | step-N
    dtype: str = ""  # of the weights written: float32 | bfloat16; empty: the source's
    shard_gb: float = SHARD_BYTES / 1e9  # of transformers' folder: what a file holds at most, in 10^9 bytes
    with_tokenizer: bool = True  # False: weights and settings alone, where transformers cannot have the tokenizer
    inexact: bool = False  # take a tokenizer that reads some texts otherwise than transformers

    def __post_init__(self) -> None:
        if not self.source:
            raise BadInput("source=... is needed: a run's folder, or one that transformers wrote.")
        if not self.to:
            raise BadInput("to=... is needed: the folder to write, which must not exist.")
        if self.dtype:
            OneOf("float32", "bfloat16").check("dtype", self.dtype)
        if not 0 < self.shard_gb < math.inf:
            raise BadInput(f"shard_gb={self.shard_gb} is out of range: accepted is a number above 0.")


@cli.command("convert", ConvertConfig, verbatim=("source", "to"))
def main(cfg: ConvertConfig) -> None:
    """Write what `source` is not, and say what can be done with it."""
    source = Path(cfg.source)
    if (source / "config.yaml").exists():
        to_transformers(cfg, source, Path(cfg.to))
    elif (source / "config.json").exists():
        to_run(cfg, source, Path(cfg.to))
    else:
        raise BadInput(
            f"source={source} is neither a run's folder nor one that transformers wrote: it has no config.yaml and no "
            "config.json."
        )


def to_transformers(cfg: ConvertConfig, source: Path, folder: Path) -> None:
    """A run as a folder that transformers loads. Raises `BadInput`."""
    refuse_existing(folder)
    # A router of one's own is refused before anything of it is imported.
    router = read_settings(source, "source").router
    if facts(router) is OWN:
        raise BadInput(
            f"source={source} has router.name={router.name}, a class of one's own, which transformers has not: a run "
            "can be converted whose router is one of conf/router that transformers has, such as router=softmax."
        )
    tensors, tokenizer, settings = open_run(source, cfg.which or "best", "source")
    its_tokenizer = tokenizer if cfg.with_tokenizer else None
    shard_bytes = int(cfg.shard_gb * 1e9)
    save_tensors(in_dtype(cfg, tensors), settings.model, router, its_tokenizer, folder, shard_bytes)
    # What is there now.
    kind = f"tokenizer {tokenizer.name}" if its_tokenizer else "no tokenizer (AutoTokenizer makes an empty one)"
    terminal.say(f"converted: {folder}  {family_of(settings.model, router)}, {n_weights(tensors):,} parameters, {kind}")
    if settings.data.document_end(tokenizer.eot) is not None:
        terminal.say("data.documents=separate: transformers attends across documents, so give it one at a time")


def to_run(cfg: ConvertConfig, source: Path, folder: Path) -> None:
    """A folder that transformers wrote as a run. Raises `BadInput`."""
    for key, default in (("which", ""), ("with_tokenizer", True)):
        if getattr(cfg, key) != default:
            words = override(key, getattr(cfg, key))
            raise BadInput(f"{words} is for a run, and source={source} is a folder of transformers.")
    if os.path.lexists(folder):
        raise BadInput(f"to={folder} exists: choose another folder.")
    # The settings and the tokenizer, and only then the weights, which take long.
    model, router = read_config(source)
    tokenizer, differences = read_tokenizer(source)
    if differences and not cfg.inexact:
        raise BadInput(f"{source}: {differences[0]}: with inexact=true it is taken all the same.")
    for difference in differences:
        terminal.say(f"warning: {difference}")
    if tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"{source}: the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {model.vocab_size}."
        )
    target = Config(run=str(folder), model=model, router=router)
    target.tokenizer = TokenizerConfig("saved", path=str(folder))
    validate(target)
    tensors = in_dtype(cfg, Parts(source).tensors())
    try:
        create(folder, target, tensors, tokenizer)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
    terminal.say(
        f"converted: {folder}  {n_weights(tensors):,} parameters, tokenizer {tokenizer.name} with "
        f"{tokenizer.vocab_size:,} tokens. Try it with: {command_line('generate', override('run', str(folder)))}"
    )


def create(folder: Path, cfg: Config, tensors: Tensors, tokenizer: Tokenizer) -> None:
    """Make the run's folder: config.yaml, tokenizer and a checkpoint of step 0 with weights alone, all of it or
    nothing. Raises `BadInput` for weights that are not finite, and where it cannot be written."""
    meta = {"config": to_dict(cfg), "tokenizer": tokenizer.fingerprint, "loader": None, "versions": machine.versions()}
    snapshot = checkpoint.Snapshot(0, tensors, {}, meta, {})
    remove_leftovers(folder.parent)
    create_folder(folder, cfg, tokenizer, lambda beside: checkpoint.save(beside / "checkpoints", snapshot, keep=1))


def in_dtype(cfg: ConvertConfig, tensors: Tensors) -> Tensors:
    """The tensors as they will be written, each looked at whether it is finite."""
    return tensors.to(getattr(torch, cfg.dtype) if cfg.dtype else tensors.dtype)


def n_weights(tensors: Tensors) -> int:
    """How many parameters there are, a tied one once."""
    return sum(tensor.numel() for tensor in tensors.meta.values())


if __name__ == "__main__":
    main()
