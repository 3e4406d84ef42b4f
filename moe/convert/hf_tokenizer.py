"""A tokenizer into transformers' tokenizer.json and back, ids equal for every text; transformers itself is not needed.

Both sides split a text by a pattern and merge the bytes of each piece pair by pair. Here the pair that makes the token
of the lowest id goes first, whatever its two parts; there the pairs are listed. Only one pair ever makes a token: what
stands before the last merge of the token's own bytes (`last_merges`), as inside a token's bounds merging goes on as if
nothing stood outside. So the list of these pairs, in order of the ids, merges every text alike.

The two sides' regular expressions differ: `{1,2}+` is possessive here and a repetition of `{1,2}` there, where `(?s)`
is unknown too. So patterns are taken from a table whose rows are tested to split alike; others are refused.

Text that spells a special token is plain text here. The folder says so (`split_special_tokens`), and transformers heeds
it. Left out is what nobody writes: runs of whitespace of half a million characters, which are cut up here.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe.data.tokenizer import GPT4_LIKE, ONE_CHARACTER, TEMPLATE, Tokenizer
from moe.errors import BadInput
from moe.run.jsonl import to_text

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
Pair = tuple[bytes, bytes]


class Split(NamedTuple):
    """One way of splitting text into pieces."""

    kind: str  # of a tokenizer that splits so
    ours: str
    theirs: str | None  # None: not at all, as there is nothing to merge


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
SPLITS = (
    Split("byte", ONE_CHARACTER, None),
    Split("char", ONE_CHARACTER, r"[\s\S]"),
    *(
        Split(kind, pattern, pattern.replace("}+", "}"))
        for kind, pattern in (
            ("bpe", GPT4_LIKE),
            ("gpt2", GPT2),
            ("cl100k_base", CL100K),
            ("o200k_base", O200K),
            ("bpe", LLAMA3),
            ("bpe", QWEN),
        )
    ),
)
KINDS = tuple(dict.fromkeys(split.kind for split in SPLITS))
_BYTE_LEVEL_SPLIT = next(split for split in SPLITS if split.ours == GPT2)  # what ByteLevel does by itself


def last_merges(ranks: Mapping[bytes, int]) -> dict[bytes, Pair | None]:
    """For every token of several bytes, by id, the two tokens that are merged into it; None where merging its bytes
    never gives it, and only a piece that equals it does."""
    several = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return {token: _last_merge(token, ranks) for token in several}


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> Pair | None:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merges = ((ranks.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        rank, i = min(((rank, i) for rank, i in merges if rank is not None), default=(None, 0))
        if rank is None:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _alphabet() -> list[str]:
    """The character that stands for each byte in the file: itself where it is printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


ALPHABET = _alphabet()


def spelling(token: bytes) -> str:
    """A token's bytes as the file has them, a character for each."""
    return "".join(ALPHABET[byte] for byte in token)


def check(tokenizer: Tokenizer) -> Split:
    """How transformers splits text as `tokenizer` does. Raises `BadInput` where no such way is known."""
    for split in SPLITS:
        if split.ours == tokenizer.pattern and (split.kind == "byte") == (tokenizer.name == "byte"):
            return split
    raise BadInput(
        f"the tokenizer {tokenizer.name} splits text by {tokenizer.pattern!r}, which is not one of the patterns that "
        f"are known to split alike in transformers (those of {', '.join(KINDS)})."
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, and a chat template if there is one, into an existing `folder`.
    Raises what `check` raises."""
    split, end = check(tokenizer), tokenizer.decode([tokenizer.eot])
    # Special tokens have their ids from the vocabulary: ids that are left unused lie between them.
    vocab = {spelling(token): rank for token, rank in tokenizer.ranks.items()}
    if taken := vocab.keys() & tokenizer.specials:
        raise BadInput(f"the tokenizer has an ordinary token that is spelt like the special token {min(taken)}.")
    vocab |= tokenizer.specials
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    by_pattern = {"type": "Split", "pattern": {"Regex": split.theirs}, "behavior": "Isolated", "invert": False}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": rank, "content": text, **marks}
            for text, rank in sorted(tokenizer.specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [by_pattern, pieces]} if split.theirs else pieces,
        "post_processor": None,
        "decoder": pieces,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(split.theirs),  # a piece that is a token is that token
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[spelling(a), spelling(b)] for a, b in filter(None, last_merges(tokenizer.ranks).values())],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,  # an empty prompt is the beginning of a document
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells a special token is text
    }
    for name, content in ((FILE, tree), (CONFIG, config)):
        (folder / name).write_text(to_text(content, indent=1) + "\n", encoding="utf-8")
    if tokenizer.template is not None:
        (folder / TEMPLATE).write_text(tokenizer.template, encoding="utf-8")


def read_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a transformers folder, and a sentence for each way in which it reads some texts otherwise than
    transformers: it puts nothing before a text, does not normalise, and looks for no added token in it. (A special
    token is never looked for, which is no difference to speak of.)

    Raises `BadInput` for a tokenizer that is not byte-level BPE with a pattern of `SPLITS`, or is damaged."""
    path, config = folder / FILE, _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
        tail = f" (it has {others[0]}, which is not read)" if others else ""
        raise BadInput(
            f"{folder} has no {FILE}{tail}: have AutoTokenizer.from_pretrained(...).save_pretrained write it."
        )
    tree = _read_json(path)
    try:
        if config.get("auto_map"):
            raise BadInput(f"{CONFIG} names code of the folder's own (auto_map), which is never run.")
        tokenizer, differences = _parse(tree, _end_of_text(folder, tree, config.get("eos_token")))
        tokenizer.template = _chat_template(folder, config.get("chat_template"))
        return tokenizer, differences
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadInput(f"{path} is damaged: it is not what transformers writes ({error!r}).") from error


def _chat_template(folder: Path, told: Any) -> str | None:
    """The folder's chat template: a file, or `told` in tokenizer_config.json, of several the default one."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(told, list):
        told = {entry["name"]: entry["template"] for entry in told}.get("default")
    return told if isinstance(told, str) else None


def text_start(folder: Path, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """How a text begins in the transformers folder that `tokenizer` was read from: the ids that stand before every one,
    and the one that an empty text consists of, which begins a text, or else ends it. Raises `BadInput` for damage."""
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    token, before = config.get("bos_token"), []
    first = token["content"] if isinstance(token, dict) else token
    try:
        for step in _steps(_read_json(folder / FILE).get("post_processor"), "processors"):
            parts = itertools.takewhile(lambda part: "SpecialToken" in part, step.get("single", ()))
            before += [i for part in parts for i in step["special_tokens"][part["SpecialToken"]["id"]]["ids"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / FILE} is damaged: it is not what transformers writes ({error!r}).") from error
    return before, tokenizer.specials.get(first or "", tokenizer.eot)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}).") from error


def _end_of_text(folder: Path, tree: Any, token: Any) -> str:
    """The text of the end-of-text token: the tokenizer's eos_token, else the one of the model's eos_token_id."""
    token = token["content"] if isinstance(token, dict) else token
    if isinstance(token, str):
        return token
    spelt = {rank: text for text, rank in tree["model"]["vocab"].items()}
    spelt |= {token["id"]: token["content"] for token in tree.get("added_tokens") or ()}
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and first in spelt:
            return spelt[first]
    raise BadInput(f"no token ends a text: accepted is an eos_token in {CONFIG}, or an eos_token_id in config.json.")


def _parse(tree: Any, end: str) -> tuple[Tokenizer, list[str]]:
    """`read_tokenizer` of a parsed file whose end-of-text token is spelt `end`."""
    model, added = tree["model"], {token["content"]: token["id"] for token in tree.get("added_tokens") or ()}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise BadInput(f"model.type={model.get('type')!r} is not supported: accepted is BPE on bytes.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise BadInput(f"model.{key}={model[key]!r} is not supported: accepted is BPE on bytes without it.")
    split = _read_split(tree.get("pre_tokenizer"))
    if [step["type"] for step in _steps(tree.get("decoder"), "decoders")] != ["ByteLevel"]:
        raise BadInput("its decoder is not supported: accepted is ByteLevel.")
    # Special tokens stand among the ordinary ones, or are added to them.
    vocab = dict(model["vocab"])
    specials = {text: vocab.pop(text, rank) for text, rank in added.items()}
    if end not in specials:
        if end not in vocab:
            raise BadInput(f"the end-of-text token {end!r} is not in the vocabulary.")
        specials[end] = vocab.pop(end)
    # Ordinary tokens are spelt in characters that stand for bytes.
    byte_of = {character: byte for byte, character in enumerate(ALPHABET)}
    read = lambda text: bytes(byte_of[character] for character in text)
    for text in vocab:
        if any(character not in byte_of for character in text):
            raise BadInput(f"the token {text!r} is not spelt in bytes: accepted is BPE on bytes.")
    ranks = {read(text): rank for text, rank in vocab.items()}
    _check_ids([*ranks.values(), *specials.values()], ranks)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    _check_merges([(read(a), read(b)) for a, b in merges], ranks, bool(model.get("ignore_merges")))
    if split.kind == "byte" and len(ranks) > 256:
        raise BadInput("its pre_tokenizer does not split text, and there are merges: accepted is one with a pattern.")
    tokenizer = Tokenizer(split.kind, split.ours, ranks, specials, specials[end])
    return tokenizer, _differences(tree)


def _steps(step: Any, key: str) -> list[Any]:
    """A pipeline's steps, of which a sequence has several and null none."""
    if step is None:
        return []
    return [inner for outer in step[key] for inner in _steps(outer, key)] if step["type"] == "Sequence" else [step]


def _read_split(pre_tokenizer: Any) -> Split:
    steps = _steps(pre_tokenizer, "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        by_itself = steps[-1].get("use_regex", True)
        if len(steps) == 1:
            return _BYTE_LEVEL_SPLIT if by_itself else SPLITS[0]
        match steps[:-1]:
            case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}] if (
                not by_itself
            ):
                for split in SPLITS:
                    if split.theirs == pattern:
                        return split
                raise BadInput(
                    f"it splits text by {pattern!r}, which is not one of the patterns that are known to split alike "
                    f"here (those of {', '.join(KINDS)}, llama3 and qwen)."
                )
    names = ", ".join(step["type"] for step in steps) or "none"
    raise BadInput(
        f"its pre_tokenizer ({names}) is not supported: accepted is ByteLevel without add_prefix_space, alone or after "
        "a Split by a pattern, isolated."
    )


def _check_ids(ids: list[Any], ranks: Mapping[bytes, int]) -> None:
    if not all(type(rank) is int and 0 <= rank < 2**31 for rank in ids) or len(set(ids)) < len(ids):
        raise BadInput("its ids are not distinct whole numbers.")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise BadInput(f"it has no token for the byte {byte}: accepted is a vocabulary with all 256.")


def _check_merges(pairs: Iterable[Pair], ranks: Mapping[bytes, int], whole: bool) -> None:
    """Refuse a list of merges that does not merge as the ids do. `whole`: a piece that is a token is that token."""
    pairs = list(pairs)
    for pair in pairs:
        if not {*pair, pair[0] + pair[1]} <= ranks.keys():
            raise BadInput(f"the merge of {pair[0]!r} and {pair[1]!r} is of tokens that are not in the vocabulary.")
    made = [ranks[a + b] for a, b in pairs]
    if made != sorted(made):
        raise BadInput("its merges are not in the order of the ids of what they make, as they are here.")
    listed = set(pairs)
    for token, last in last_merges(ranks).items():
        if last not in listed and (last or not whole):
            raise BadInput(f"the token {token!r} is not merged as the ids say: accepted is a merge for every token.")


def _differences(tree: Any) -> list[str]:
    """What `read_tokenizer` has to say. Raises `BadInput` for a step that changes every text."""
    said = []
    for step in _steps(tree.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise BadInput(f"its normalizer {step['type']} is not supported: accepted are none and NFC.")
        said.append("transformers puts text into NFC first, and a run does not (data.clean.unicode=NFC does)")
    for step in _steps(tree.get("post_processor"), "processors"):
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise BadInput(f"its post_processor {step['type']} is not supported: accepted is one that adds tokens.")
        tokens = [part["SpecialToken"]["id"] for part in step.get("single", ()) if "SpecialToken" in part]
        if tokens:
            said.append(f"transformers puts {' and '.join(tokens)} around every text, and a run does not")
    sought = [token["content"] for token in tree.get("added_tokens") or () if not token.get("special")]
    if sought:
        said.append(f"transformers looks for {len(sought)} added tokens such as {sought[0]!r} in a text, and a run not")
    return said
