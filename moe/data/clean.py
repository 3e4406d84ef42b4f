"""Raw documents -> clean documents: a pipeline of named steps, each of which counts what goes in and what comes out.

In order: HTML to text, Unicode repair and normalisation, length, repetition, exact duplicates, near duplicates. A step
that is switched off is not in the list. Cleaning clean text changes nothing.
"""

import functools
import hashlib
import importlib.metadata
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ftfy
import numpy as np

from moe.config.data import CleanConfig
from moe.data.sources import Document
from moe.data.unreadable import BadDocument, Unreadable

VERSION = 2  # of the pipeline, in the key of every prepared corpus: raise it when the same documents come out otherwise
LIBRARIES = ("ftfy", "beautifulsoup4", "datasketch")  # whose versions are in that key too
SHORT_LINE = 10  # characters; shorter lines ("else:", a speaker's name) repeat without being boilerplate
SHINGLE = 5  # words
PERMUTATIONS = 128
SEED = 1
BATCH = 4096  # shingles hashed at a time, so that shingles x permutations stay in the processor's cache

# Every control character except tab and newline.
CONTROL = {code: None for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\t\n"}
HELD = "\0"  # stands for a space that must stay, in preformatted text
MOST_TAGS = 2**19  # of a page: they take a minute, and a gigabyte, as a tree
MOST_READING = 10**7  # characters that the parser may read again for what is not closed
UNSEEN = ["script", "style", "template", "noscript", "head"]
# What HTML's own style sheet gives lines of their own
BLOCKS = re.compile(
    r"address|article|aside|blockquote|caption|center|dd|details|dialog|dir|div|dl|dt|fieldset|figcaption|figure|footer"
    r"|form|h[1-6]|header|hgroup|hr|legend|li|main|menu|nav|ol|optgroup|option|p|pre|search|section|summary|table|tr|ul"
)


@dataclass
class Step:
    """What one cleaning step did. Bytes are of UTF-8."""

    name: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int


def fingerprint() -> dict[str, Any]:
    """What decides how documents are cleaned beside the settings: the versions of this file, Unicode and libraries."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"version": VERSION, "unicode": unicodedata.unidata_version, **libraries}


def clean(
    documents: Iterable[Document], cfg: CleanConfig, unreadable: Unreadable | None = None
) -> tuple[list[Document], list[Step]]:
    """The documents that pass every step that `cfg` switches on, in their order, and a `Step` for each of these.

    `unreadable` counts what cannot be read. Raises `BadInput` unless that is to be skipped."""
    unreadable = Unreadable("refuse") if unreadable is None else unreadable
    stages: list[tuple[str, bool, Callable[[Iterable[Document]], Iterator[Document]]]] = [
        ("html", cfg.html, functools.partial(html_to_text, unreadable=unreadable)),
        ("unicode", cfg.unicode != "none", functools.partial(normalize, form=cfg.unicode)),
        ("length", cfg.min_chars > 0 or cfg.max_chars > 0, functools.partial(within_length, cfg=cfg)),
        ("repetition", cfg.max_repetition < 1, functools.partial(not_repetitive, most=cfg.max_repetition)),
        ("exact", cfg.exact, without_duplicates),
        ("near", cfg.near > 0, functools.partial(without_near_duplicates, threshold=cfg.near)),
    ]
    kept = list(documents)
    size = _bytes(kept)
    steps = []
    for name, on, stage in stages:
        if not on:
            continue
        count, before = len(kept), size
        kept = list(stage(kept))
        size = _bytes(kept)
        steps.append(Step(name, count, len(kept), before, size))
    return kept, steps


def _bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode(errors="surrogatepass")) for document in documents)


def html_to_text(documents: Iterable[Document], unreadable: Unreadable) -> Iterator[Document]:
    """Documents whose name ends in .html or .htm (before .gz or .zst) become their visible text, a blank line between
    blocks; their names then end in .txt. Others pass unchanged. What is not to be parsed goes to `unreadable`; raises
    `BadInput` at the end if that is not to be skipped."""
    for document in documents:
        name = document.name.removesuffix(".gz").removesuffix(".zst")
        if not name.lower().endswith((".html", ".htm")):
            yield document
            continue
        try:
            yield replace(document, text=_visible_text(document.text, document.name), name=f"{name}.txt")
        except BadDocument as fault:
            unreadable.add(fault)
    unreadable.check()


def _visible_text(html: str, where: str) -> str:
    import bs4  # here, because it takes long to import, and few corpora are HTML

    _check_html(html, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # for pages that look like XML or like a file's name
        try:
            soup = bs4.BeautifulSoup(html, "html.parser")
        except bs4.ParserRejectedMarkup as error:
            raise BadDocument(where, f"is not HTML: {' '.join(str(error).split())}", "not HTML") from error
    text = "\n".join(line.strip(" ") for line in "".join(_strings(soup)).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace(HELD, " ")


def _strings(soup: Any) -> Iterator[str]:
    """The visible strings of a page (`BeautifulSoup`) in order, a line break before and after each block. In one pass,
    with a stack: a page may be as deep, and its tags have as many neighbours, as it likes."""
    from bs4 import CData, NavigableString, Tag  # here, as above

    # What is to come, and whether it is preformatted
    pending: list[tuple[Any, bool]] = [(soup, False)]
    while pending:
        node, kept = pending.pop()
        if type(node) is NavigableString:
            yield node.replace(" ", HELD) if kept else re.sub(r"\s+", " ", node)
        elif type(node) in (str, CData):  # comments and the like are other subclasses
            yield str(node)
        elif isinstance(node, Tag) and node.name == "br":
            yield "\n"
        elif isinstance(node, Tag) and node.name not in UNSEEN:
            edge = "\n" if BLOCKS.fullmatch(node.name) else ""
            yield edge
            kept = kept or node.name == "pre"
            pending.append((edge, kept))
            pending.extend((child, kept) for child in reversed(node.contents))


def _check_html(html: str, where: str) -> None:
    """Raises `BadDocument` for a page that would take the parser too long: it has very many tags, or what is opened and
    never closed, from each of which the parser reads to the end of the page."""
    if (tags := html.count("<")) > MOST_TAGS:
        raise BadDocument(where, f"has {tags:,} tags, more than {MOST_TAGS:,}", "too large")
    for opening, closing in (("<", ">"), ("<!--", "-->"), ("<![", "]>"), ("<![CDATA[", "]]>")):
        rest = html[html.rfind(closing) + 1 :]
        count = rest.count(opening)
        if count > 10 and count * len(rest) > MOST_READING:
            what = f"opens {opening} {count:,} times without closing it"
            raise BadDocument(where, what, "not HTML")


def normalize(documents: Iterable[Document], form: str) -> Iterator[Document]:
    """Repair what went wrong in decoding (ftfy), unify line ends, drop control characters but tab and newline, and
    bring the text into the Unicode normal form `form` (NFC or NFKC)."""
    for document in documents:
        text = document.text
        # One repair can uncover another, so repeat until nothing changes: then cleaning twice is cleaning once.
        while (repaired := _repair(text, form)) != text:
            text = repaired
        yield replace(document, text=text)


def _repair(text: str, form: str) -> str:
    # HTML's entities, curly quotes, ligatures and full-width letters are not damage: source code and prose mean them.
    text = ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization=None,
    )
    return unicodedata.normalize(form, text.translate(CONTROL))  # type: ignore[arg-type]


def within_length(documents: Iterable[Document], cfg: CleanConfig) -> Iterator[Document]:
    """Documents of at least `cfg.min_chars` and at most `cfg.max_chars` characters (0: no limit), not counting
    white space at the ends."""
    for document in documents:
        length = len(document.text.strip())
        if length >= cfg.min_chars and (not cfg.max_chars or length <= cfg.max_chars):
            yield document


def not_repetitive(documents: Iterable[Document], most: float) -> Iterator[Document]:
    """Documents whose `repetition` is at most `most`."""
    return (document for document in documents if repetition(document.text) <= most)


def repetition(text: str) -> float:
    """The share, in [0, 1], of a text's characters in lines that occur more than once: each occurrence counts, lines
    shorter than `SHORT_LINE` do not. After the repetition rules of Gopher (Rae et al., arXiv:2112.11446)."""
    lines = Counter(line for raw in text.split("\n") if (line := raw.strip()))
    total = sum(len(line) * count for line, count in lines.items())
    repeated = sum(len(line) * count for line, count in lines.items() if count > 1 and len(line) >= SHORT_LINE)
    return repeated / max(total, 1)


def without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """The first of all documents whose words are the same, by sha256 of the text with white space made uniform."""
    seen: set[bytes] = set()
    for document in documents:
        key = hashlib.sha256(" ".join(document.text.split()).encode(errors="surrogatepass")).digest()
        if key not in seen:
            seen.add(key)
            yield document


def without_near_duplicates(documents: Iterable[Document], threshold: float) -> Iterator[Document]:
    """Documents that resemble no earlier kept one: the Jaccard similarity of their sets of word 5-shingles, estimated
    by MinHash with 128 permutations, is below `threshold`. Candidates come from locality-sensitive hashing
    (Broder 1997; Lee et al., arXiv:2107.06499), its bands chosen for recall because each candidate is then checked."""
    from datasketch import MinHash, MinHashLSH  # here, because it imports scipy, and a prepared corpus needs neither

    # Above 0.95 the library finds no bands; a lower threshold here only brings more candidates.
    index = MinHashLSH(threshold=min(threshold, 0.95), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=lambda value: value)
    kept: list[MinHash] = []
    word_hash: dict[str, int] = {}
    for document in documents:
        values = shingle_hashes(document.text, word_hash)
        sketch = empty.copy()
        for start in range(0, len(values), BATCH):
            sketch.update_batch(values[start : start + BATCH])
        if all(sketch.jaccard(kept[key]) < threshold for key in index.query(sketch)):
            index.insert(len(kept), sketch)
            kept.append(sketch)
            yield document


def shingle_hashes(text: str, word_hash: dict[str, int]) -> list[int]:
    """The distinct 32-bit hashes of a text's word 5-shingles (one shingle for a shorter text), ascending.

    `word_hash` remembers the hash of every word seen, across texts. Python's own `hash` changes from run to run."""
    words = text.split()
    for word in set(words).difference(word_hash):
        word_hash[word] = int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest())
    hashes = np.array([word_hash[word] for word in words], dtype=np.uint64)
    n = max(len(hashes) - SHINGLE + 1, 1)
    mixed = np.zeros(n, dtype=np.uint64)
    for offset in range(min(SHINGLE, len(hashes))):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + n]  # wraps around, as intended
    return np.unique(mixed >> np.uint64(32)).tolist()
