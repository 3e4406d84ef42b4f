"""A run as a folder that transformers loads, such a folder as a run, and either as GGUF, tokenizer included.

    python -m experiments.convert source=runs/NAME to=folder                      # which=best|last|step-N
    python -m experiments.convert source=folder to=runs/NEW
    python -m experiments.convert source=runs/NAME to=folder dtype=bfloat16 shard_gb=2
    python -m experiments.convert source=folder to=model.gguf dtype=q8_0        # or source=runs/NAME

What comes of it is decided by what `source` is, and by a `to` that ends in .gguf. A tensor or two are in memory at a
time, so a model larger than memory is converted too. The target appears whole or not at all.

AutoModelForCausalLM.from_pretrained("folder") computes the same logits, and AutoTokenizer.from_pretrained("folder")
gives the same ids for every text. A model or a tokenizer that transformers cannot have is refused. Of a run with
data.documents=separate the logits are the same for one document at a time.

A folder is on this machine; nothing is downloaded, no code of its own is run and no pickle opened. A model of another
family, a setting that this one does not have and a tokenizer that is not byte-level BPE are refused by name. What a
tokenizer does to text besides (NFC, a token before every text, tokens sought in it) a run's does not: that is refused
too, unless `inexact=true`, with which it is said. The run that is made can be generated from, upcycled, and be the
`source=` of another.

llama.cpp computes the same of the GGUF file and gives the same ids; see docs/ecosystem.md. What it would compute
otherwise is refused by name, and so is a tokenizer that it would not follow, unless `inexact=true`. It needs the extra
gguf.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from experiments import cli
from moe.config.data import TokenizerConfig
from moe.config.parse import OneOf, to_dict
from moe.config.router import OWN, facts
from moe.config.run import Config, validate
from moe.convert import gguf
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
    to: str = ""  # the folder to write, or a file whose name ends in .gguf
    which: str = ""  # of a run: best (lowest validation loss; the default) | last | step-N
    dtype: str = ""  # of the weights written: float32 | bfloat16, in GGUF also float16 | q8_0; empty: the source's
    shard_gb: float = SHARD_BYTES / 1e9  # of transformers' folder: what a file holds at most, in 10^9 bytes
    with_tokenizer: bool = True  # False: weights and settings alone, where transformers cannot have the tokenizer
    inexact: bool = False  # take a tokenizer that reads some texts otherwise on the other side

    def __post_init__(self) -> None:
        if not self.source:
            raise BadInput("source=... is needed: a run's folder, or one that transformers wrote.")
        if not self.to:
            raise BadInput("to=... is needed: the folder or .gguf file to write, which must not exist.")
        if self.dtype:
            OneOf(*(gguf.DTYPES if is_gguf(self.to) else ("float32", "bfloat16"))).check("dtype", self.dtype)
        if not 0 < self.shard_gb < math.inf:
            raise BadInput(f"shard_gb={self.shard_gb} is out of range: accepted is a number above 0.")


@cli.command("convert", ConvertConfig, verbatim=("source", "to"))
def main(cfg: ConvertConfig) -> None:
    """Write what `source` is not, and say what can be done with it."""
    source, target = Path(cfg.source), Path(cfg.to)
    is_run = (source / "config.yaml").exists()
    if not is_run and not (source / "config.json").exists():
        raise BadInput(
            f"source={source} is neither a run's folder nor one that transformers wrote: it has no config.yaml and no "
            "config.json."
        )
    refuse_meaningless(cfg, is_run)
    if is_gguf(cfg.to):
        to_gguf(cfg, read_run(cfg, source) if is_run else read_folder(cfg, source), target)
    elif is_run:
        to_transformers(cfg, read_run(cfg, source), target)
    else:
        to_run(cfg, read_folder(cfg, source), target)


def is_gguf(to: str) -> bool:
    """Whether a target is a GGUF file."""
    return to.endswith(".gguf")


def refuse_meaningless(cfg: ConvertConfig, is_run: bool) -> None:
    """Refuse a setting that says nothing about what is read and written. Raises `BadInput`."""
    folder = is_run and not is_gguf(cfg.to)
    meant = {"which": is_run, "with_tokenizer": folder, "shard_gb": folder, "inexact": not folder}
    source, target = "a run" if is_run else "a folder of transformers", "GGUF" if is_gguf(cfg.to) else "a run"
    for field in dataclasses.fields(cfg):
        if not meant.get(field.name, True) and getattr(cfg, field.name) != field.default:
            words = override(field.name, getattr(cfg, field.name))
            raise BadInput(f"{words} has no meaning for {source} that becomes {'a folder' if folder else target}.")


class Source(NamedTuple):
    """What is converted, in this project's words."""

    tensors: Tensors
    tokenizer: Tokenizer
    settings: Config


def read_run(cfg: ConvertConfig, source: Path) -> Source:
    """A run's. A router of one's own is refused, and nothing of it is imported. Raises `BadInput`."""
    router = read_settings(source, "source").router
    if facts(router) is OWN:
        raise BadInput(
            f"source={source} has router.name={router.name}, a class of one's own, which transformers has not: a run "
            "can be converted whose router is one of conf/router that transformers has, such as router=softmax."
        )
    refuse_existing(Path(cfg.to))
    return Source(*open_run(source, cfg.which or "best", "source"))


def read_folder(cfg: ConvertConfig, source: Path) -> Source:
    """That of a folder that transformers wrote. Raises `BadInput`."""
    if os.path.lexists(cfg.to):
        raise BadInput(f"to={cfg.to} exists: choose another.")
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
    settings = Config(run=cfg.to, model=model, router=router)
    settings.tokenizer = TokenizerConfig("saved", path=cfg.to)
    validate(settings)
    return Source(Parts(source).tensors(), tokenizer, settings)


def to_transformers(cfg: ConvertConfig, source: Source, folder: Path) -> None:
    """A folder that transformers loads. Raises `BadInput`."""
    tensors, tokenizer, settings = source
    its_tokenizer = tokenizer if cfg.with_tokenizer else None
    shard_bytes = int(cfg.shard_gb * 1e9)
    save_tensors(in_dtype(cfg, tensors), settings.model, settings.router, its_tokenizer, folder, shard_bytes)
    # What is there now.
    kind = f"tokenizer {tokenizer.name}" if its_tokenizer else "no tokenizer (AutoTokenizer makes an empty one)"
    family = family_of(settings.model, settings.router)
    terminal.say(f"converted: {folder}  {family}, {n_weights(tensors):,} parameters, {kind}")
    say_of_documents(source, "transformers")


def to_run(cfg: ConvertConfig, source: Source, folder: Path) -> None:
    """A run with weights and no past. Raises `BadInput`."""
    try:
        create(folder, source.settings, in_dtype(cfg, source.tensors), source.tokenizer)
    except BadInput as error:
        raise BadInput(f"source={cfg.source}: {error}") from error
    terminal.say(
        f"converted: {folder}  {n_weights(source.tensors):,} parameters, tokenizer {source.tokenizer.name} with "
        f"{source.tokenizer.vocab_size:,} tokens. Try it with: {command_line('generate', override('run', str(folder)))}"
    )


def to_gguf(cfg: ConvertConfig, source: Source, path: Path) -> None:
    """A file that llama.cpp loads. Raises `BadInput`."""
    tensors, tokenizer, settings = source
    family = gguf.check(settings.model, settings.router)
    pre, difference = gguf.split_of(tokenizer)
    if difference and not cfg.inexact:
        raise BadInput(f"source={cfg.source}: {difference}: with inexact=true it is written all the same.")
    if difference:
        terminal.say(f"warning: {difference}")
    gguf.save(tensors.to(tensors.dtype), settings.model, settings.router, tokenizer, path, cfg.dtype)
    terminal.say(
        f"converted: {path}  {gguf.ARCHITECTURES[family]}, {n_weights(tensors):,} parameters, "
        f"{path.stat().st_size:,} bytes, tokenizer {tokenizer.name} as {pre}"
    )
    say_of_documents(source, "llama.cpp")


def say_of_documents(source: Source, reader: str) -> None:
    """Say what the reader does otherwise with documents that the run keeps apart."""
    if source.settings.data.document_end(source.tokenizer.eot) is not None:
        terminal.say(f"data.documents=separate: {reader} attends across documents, so give it one at a time")


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
