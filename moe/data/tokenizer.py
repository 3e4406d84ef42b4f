"""Text to token ids and back: one class over one `tiktoken.Encoding`, whatever the kind.

    byte         256 bytes
    char         256 bytes, and every character of the corpus that takes more than one of them
    bpe          byte-pair encoding, trained on the corpus by rustbpe to exactly `vocab_size` tokens
    gpt2, cl100k_base, o200k_base    tiktoken's pretrained ones
    saved        a run's own, whatever its kind

The kinds differ only in their ranks (token bytes -> id) and their split pattern. All of them cover the 256 bytes, so
any text makes the round trip. The vocabulary V counts one end-of-text token, which stands between documents; text that
happens to spell it is ordinary text. A tokenizer is saved as a tiktoken rank file and a JSON header with its checksum.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from moe.config.data import TokenizerConfig
from moe.data.learning import Say, learning
from moe.errors import BadInput

END_OF_TEXT = "<|endoftext|>"
ONE_CHARACTER = r"(?s)."
# GPT-4's split pattern, with numbers in pieces of 2 digits: 3 would let a thousand numbers into a small vocabulary.
GPT4_LIKE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
LONGEST_SPACE = 2**19  # characters
DOWNLOAD_SECONDS = 60.0
HEADER, RANKS, TEMPLATE = "tokenizer.json", "ranks.tiktoken", "chat_template.jinja"


class Tokenizer:
    """A vocabulary of V tokens.

    name         the kind
    vocab_size   V, the end-of-text token included
    eot          id of the end-of-text token
    token_bytes  (V,) int32, UTF-8 bytes of each token; 0 for special and unused ids
    pattern, ranks, specials    how text is split; token bytes -> id; special tokens -> id
    fingerprint  sha256 (hex) of everything that decides an id: ranks, pattern, special tokens, kind
    template     how conversations are spelt (moe/data/chat.py), where that is said; no part of the fingerprint
    """

    template: str | None = None

    def __init__(
        self, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], eot: int | None = None
    ) -> None:
        """`ranks`: token bytes -> id, all 256 single bytes among them. `eot`: one of `specials`, by default the id of
        `<|endoftext|>`."""
        self.name, self.pattern, self.ranks, self.specials = name, pattern, ranks, specials
        self.eot = specials[END_OF_TEXT] if eot is None else eot
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size: int = self._encoding.n_vocab
        self._rank_file = b"".join(
            base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        self._header: dict[str, Any] = {"name": name, "pattern": pattern, "eot": self.eot, "specials": specials}
        self._header["ranks_sha256"] = hashlib.sha256(self._rank_file).hexdigest()
        self.fingerprint = _sha256(self._header)
        self._token = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._token[rank] = token
        self.token_bytes: np.ndarray = np.array([len(token) for token in self._token], dtype=np.int32)
        for text, rank in specials.items():
            self._token[rank] = text.encode()

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Ids of `text`; special tokens spelt in it are plain text, or with `specials` themselves. No end-of-text token
        is added."""
        if specials:
            return self._encoding.encode(text, allowed_special="all")
        return [i for piece in _pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if any(len(text) > LONGEST_SPACE for text in texts):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a token may end inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; an id that the vocabulary leaves unused is nothing. Raises IndexError for an id >= V."""
        return b"".join([self._token[i] for i in ids])

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `ranks.tiktoken` and, where there is one, `chat_template.jinja` into an existing
        `folder`."""
        (folder / RANKS).write_bytes(self._rank_file)
        header = self._header | {"sha256": self.fingerprint}
        (folder / HEADER).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n")
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer saved in `folder`; no network. Raises `BadInput` naming the file that is missing or damaged."""
        try:
            header = json.loads((folder / HEADER).read_bytes())
            recorded = header.pop("sha256")
            intact = recorded == _sha256(header)
        except OSError as error:
            raise BadInput(f"{folder / HEADER} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(f"{folder / HEADER} is damaged: it is not the header of a tokenizer ({error}).") from error
        if not intact:
            raise BadInput(f"{folder / HEADER} is damaged: its sha256 is not the recorded one.")
        try:
            rank_file = (folder / RANKS).read_bytes()
        except OSError as error:
            raise BadInput(f"{folder / RANKS} cannot be read: {error.strerror}.") from error
        if hashlib.sha256(rank_file).hexdigest() != header["ranks_sha256"]:
            raise BadInput(f"{folder / RANKS} is damaged: its sha256 is not the one recorded in {HEADER}.")
        pairs = (line.split() for line in rank_file.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        tokenizer = cls(header["name"], header["pattern"], ranks, header["specials"], header["eot"])
        if (folder / TEMPLATE).is_file():
            tokenizer.template = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
        return tokenizer


def train(cfg: TokenizerConfig, texts: Iterable[str], say: Say | None = None) -> Tokenizer:
    """The tokenizer of kind `cfg.name`. `texts` is the corpus that `bpe` and `char` learn from; the others ignore it.
    `say` gets plain lines of how far `bpe` is; with it a terminal shows a bar.

    The result depends on the text alone: not on its order, nor on the number of cores. Raises `BadInput` for a corpus
    too small for `cfg.vocab_size` merges, and for a pretrained encoding that is neither cached nor downloadable."""
    match cfg.name:
        case "byte":
            return _trained(cfg.name, ONE_CHARACTER, _bytes())
        case "char":
            characters: set[str] = set()
            for text in texts:
                characters.update(text)
            ranks = _bytes()
            for character in sorted(characters):
                ranks.setdefault(character.encode(), len(ranks))
            return _trained(cfg.name, ONE_CHARACTER, ranks)
        case "bpe":
            return _trained(cfg.name, GPT4_LIKE, _merges(texts, cfg.vocab_size - 1, say))
        case "saved":
            return Tokenizer.load(Path(cfg.path) / "tokenizer")
        case _:
            return _pretrained(cfg.name)


def _bytes() -> dict[bytes, int]:
    return {bytes([value]): value for value in range(256)}


def _trained(name: str, pattern: str, ranks: dict[bytes, int]) -> Tokenizer:
    return Tokenizer(name, pattern, ranks, {END_OF_TEXT: len(ranks)})


def _merges(texts: Iterable[str], n_ranks: int, say: Say | None) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909, on bytes): the 256 bytes, then merges in order learnt."""
    trainer = rustbpe.Tokenizer()
    with learning(n_ranks - 256, say) as counted:
        pieces = (piece for text in counted(texts) for piece in _pieces(text))
        trainer.train_from_iterator(pieces, vocab_size=n_ranks, pattern=GPT4_LIKE)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < n_ranks:
        raise BadInput(
            f"tokenizer.vocab_size={n_ranks + 1} is more than the corpus can give: the training text has merges for "
            f"at most {len(ranks) + 1}; lower it, or add text (data.max_mb)."
        )
    return ranks


def _pretrained(name: str) -> Tokenizer:
    """tiktoken's own encoding. Its download waits for an unreachable host without limit, so it runs beside us."""
    result: list[tiktoken.Encoding] = []
    failure: list[str] = []

    def fetch() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except OSError as error:  # no network, or a cache that cannot be written
            failure.append(error.strerror or type(error).__name__)
        except ValueError as error:  # a download that is not the published file
            failure.append(str(error))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not result:
        reason = failure[0] if failure else f"no answer within {DOWNLOAD_SECONDS:g} seconds"
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise BadInput(
            f"tokenizer.name={name} is neither cached (TIKTOKEN_CACHE_DIR is {cache}) nor downloadable ({reason}): "
            f'where there is a network run `TIKTOKEN_CACHE_DIR=FOLDER python -c "import tiktoken; '
            f"tiktoken.get_encoding('{name}')\"`, copy FOLDER here and set TIKTOKEN_CACHE_DIR to it; "
            "or choose tokenizer.name=bpe, char or byte, which need no network."
        )
    encoding = result[0]
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _pieces(text: str) -> list[str]:
    """`text`, cut up if it has a run of whitespace so long that the split pattern exhausts the regex engine's stack.

    tiktoken and rustbpe panic at about a million such characters. Below `LONGEST_SPACE` nothing is cut."""
    if len(text) <= LONGEST_SPACE or not re.search(rf"(?<!\s)\s{{{LONGEST_SPACE}}}", text):
        return [text]
    return [text[i : i + LONGEST_SPACE] for i in range(0, len(text), LONGEST_SPACE)]


def _sha256(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
