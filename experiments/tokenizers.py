"""How several tokenizers read the same text, domain by domain.

    python -m experiments.tokenizers                                         # byte, char and bpe on the blend
    python -m experiments.tokenizers tokenizers=[bpe,gpt2,o200k_base]        # against pretrained ones
    python -m experiments.tokenizers data=text data.path=my/texts vocab_size=8192

`bpe` and `char` learn from the very text they are measured on; in a training run they learn from the training split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments import cli
from experiments.pages import tables
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.run import Config, validate
from moe.data import clean, sources, tokenizer
from moe.data.prepare import cache_root
from moe.data.unreadable import Unreadable
from moe.run import terminal


@dataclass
class TokenizersConfig:
    """Which text, and which tokenizers."""

    data: DataConfig = field(default_factory=lambda: DataConfig(max_mb=1.0))
    tokenizers: list[str] = field(default_factory=lambda: ["byte", "char", "bpe"])
    vocab_size: int = 4096  # of the bpe


@cli.command("tokenizers", TokenizersConfig)
def main(cfg: TokenizersConfig) -> None:
    """Print a row per tokenizer."""
    settings = [TokenizerConfig(name, cfg.vocab_size) for name in cfg.tokenizers]
    for setting in settings:
        validate(Config(data=cfg.data, tokenizer=setting))
    unreadable = Unreadable(cfg.data.on_error)
    raw = sources.documents(cfg.data, cache_root(cfg.data), unreadable)
    documents, _ = clean.clean(raw, cfg.data.clean, unreadable)
    unreadable.say(terminal.say)
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    rows = [list(measure(setting, texts)) for setting in settings]
    size = sum(len(text.encode()) for domain_texts in texts.values() for text in domain_texts)
    print(f"{size / 1e6:.2f} MB of text, {len(documents):,} documents; bytes per token in all and by domain")
    tables.print_table(("tokenizer", "vocabulary", "bytes per token", *texts, "round trip"), rows)


def measure(cfg: TokenizerConfig, texts: dict[str, list[str]]) -> Iterator[str]:
    """A tokenizer's row: name, vocabulary size, bytes per token in all and by domain, and whether decoding gives every
    text back."""
    learned = tokenizer.train(cfg, (text for domain_texts in texts.values() for text in domain_texts), terminal.say)
    size, n_tokens, same, total = {}, {}, 0, 0
    for domain, domain_texts in texts.items():
        ids = learned.encode_batch(domain_texts)
        size[domain] = sum(len(text.encode()) for text in domain_texts)
        n_tokens[domain] = sum(map(len, ids))
        same += sum(learned.decode(tokens) == text for tokens, text in zip(ids, domain_texts, strict=True))
        total += len(domain_texts)
    yield cfg.name
    yield f"{learned.vocab_size:,}"
    yield f"{sum(size.values()) / sum(n_tokens.values()):.2f}"
    yield from (f"{size[domain] / n_tokens[domain]:.2f}" for domain in texts)
    yield "exact" if same == total else f"{total - same} of {total} texts differ"


if __name__ == "__main__":
    main()
