"""Where text comes from, how it is cleaned and tokenised."""

from dataclasses import dataclass, field
from typing import Annotated

from moe.config.parse import ANY, MANY, Between, OneOf
from moe.errors import BadInput

BLEND_DOMAINS = ("drama", "verse", "code", "docs", "math")


@dataclass
class TokenizerConfig:
    # char and bpe learn from the text; gpt2 and those with _base are fetched; saved is the one of the run at `path`
    name: Annotated[str, OneOf("byte", "char", "bpe", "gpt2", "cl100k_base", "o200k_base", "saved")] = "bpe"
    vocab_size: Annotated[int, Between(257, MANY)] = 4096  # of a bpe trained here; the others bring their own
    path: str = ""  # saved: a run's folder, whose tokenizer is taken as it is


@dataclass
class CleanConfig:
    """The cleaning pipeline's settings; every step counts documents and bytes in and out."""

    html: bool = True  # turn HTML documents into text
    unicode: Annotated[str, OneOf("NFC", "NFKC", "none")] = "NFC"  # normal form of the text
    min_chars: Annotated[int, Between(0, MANY)] = 100  # shorter documents are dropped
    max_chars: Annotated[int, Between(0, MANY)] = 0  # 0: no upper limit
    # share of a document's characters in repeated lines above which it goes; 1: keep all
    max_repetition: Annotated[float, Between(0, 1)] = 0.5
    exact: bool = True  # drop exact duplicates
    # drop documents whose estimated Jaccard similarity with an earlier one is at least this; 0: off
    near: Annotated[float, Between(0, 1)] = 0.8


@dataclass
class DataConfig:
    # the project's own blend, files of yours, a dataset, conversations, or prompts with answers (moe/data/answers.py)
    name: Annotated[str, OneOf("blend", "text", "huggingface", "chat", "preferences", "prompts")] = "blend"
    path: str = ""  # huggingface: a dataset name or folder; all others: a file, folder or glob
    template: str = ""  # chat: a file with a Jinja template; "": the tokenizer's own, or the default
    domains: list[str] = field(default_factory=list)  # which of the source's domains; empty means all
    # at most this much raw text per domain (decimal megabytes); 0: all of it
    max_mb: Annotated[float, Between(0, ANY)] = 4.0
    # a document that cannot be read: all are counted and the first named, then refuse the corpus, or go on without them
    on_error: Annotated[str, OneOf("refuse", "skip")] = "refuse"
    # a larger JSONL line, HTML page or row cannot be read (decimal megabytes); 0: any size
    max_document_mb: Annotated[float, Between(0, ANY)] = 64.0
    text_field: str = "text"  # JSONL and huggingface: the field that holds the document
    domain_field: str = ""  # JSONL and huggingface: the field that holds the domain; "": file or dataset name
    subset: str = ""  # huggingface: the configuration name
    split: str = "train"  # huggingface: the split
    streaming: bool = True  # huggingface: do not download the whole set first
    val_fraction: Annotated[float, Between(0.0001, 0.5)] = 0.05  # share of documents, by hash, held out
    cache: str = ""  # prepared corpora; "": $SWITCHYARD_CACHE, else ~/.cache/switchyard
    workers: Annotated[int, Between(0, 256)] = 0  # loader processes; the batches do not depend on it
    # packed: a token attends to all of its window before it | separate: to its own document alone, in which its
    # position is counted from 0 (from the window's start for one that began before it) | whole: that, and a window
    # begins with a document; of those in it, the one that it cuts is learnt in another
    documents: Annotated[str, OneOf("packed", "separate", "whole")] = "packed"
    clean: CleanConfig = field(default_factory=CleanConfig)

    def whole(self) -> bool:
        """Whether windows hold whole documents."""
        return self.documents == "whole"

    def document_end(self, eot: int) -> int | None:
        """The token that a model has to know the end of a document by: `eot`, or None where they are packed."""
        return None if self.documents == "packed" else eot


def validate_tokenizer(cfg: TokenizerConfig) -> None:
    """Refuse a path without its use, and the other way round. Raises `BadInput`."""
    if bool(cfg.path) != (cfg.name == "saved"):
        raise BadInput(
            f"tokenizer.path={cfg.path} with tokenizer.name={cfg.name}: tokenizer.name=saved and tokenizer.path=RUN, a "
            "run's folder, go together."
        )


def validate(cfg: DataConfig) -> None:
    """Refuse sources and limits that do not fit together. Raises `BadInput`."""
    for name in cfg.domains:
        if cfg.name == "blend" and name not in BLEND_DOMAINS:
            raise BadInput(f"data.domains has {name!r}; the blend's domains are {', '.join(BLEND_DOMAINS)}.")
    if cfg.name == "blend" and cfg.path:
        raise BadInput(f"data.path={cfg.path} means nothing to data=blend: choose data=text or data=huggingface.")
    if cfg.template and cfg.name != "chat":
        raise BadInput(f"data.template={cfg.template} means nothing to data={cfg.name}: choose data=chat.")
    if cfg.name != "blend" and not cfg.path:
        raise BadInput(f"data.name={cfg.name} needs data.path: a file, a folder or a glob (or a dataset's name).")
    clean = cfg.clean
    if clean.max_chars and clean.max_chars < clean.min_chars:
        raise BadInput(
            f"data.clean.max_chars={clean.max_chars} is below data.clean.min_chars={clean.min_chars}: "
            "no document would be left (0 sets no upper limit)."
        )
