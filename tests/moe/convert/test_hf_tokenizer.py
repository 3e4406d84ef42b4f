"""Tokenizers against transformers' own: AutoTokenizer of the folder must give the same ids and the same text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import rustbpe
import tiktoken_ext.openai_public
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moe.config.data import TokenizerConfig
from moe.convert.hf_tokenizer import KINDS, SPLITS, check, last_merges, read_tokenizer, save_tokenizer, text_start
from moe.data.chat import DEFAULT, Template, tokenize
from moe.data.tokenizer import END_OF_TEXT, Tokenizer, train
from moe.errors import BadInput

README = (Path(__file__).parents[3] / "README.md").read_text()
TEXTS = [
    README,
    (Path(__file__)).read_text(),
    "naïve café — 漢字かな交じり文 😀👩‍👩‍👧 🇫🇮 e\u0301 Ωж한 ǅ ʰ ١٢٣ 12345678 3.14 x²½Ⅷ",
    "I'll WE'VE it'S 'tis don't 'ſ O'Ré 're'Ll",
]
TRICKY = [
    "",
    " ",
    "a" * 50,
    " \t \n\r\n  \x0b\x0c x\n\n  y   \n",
    "ends in spaces   ",
    "\n ends in a line \n  ",
    "\x00\x7f\x85\xa0\u1680\u2003\u2028\u3000\ufeff\ufffd\U0010ffff\x1c",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT} <|fim_prefix|><|endofprompt|>",
]


def random_texts(n: int) -> list[str]:
    """Of characters among which every class and every boundary of the patterns is."""
    rng = random.Random(0)
    alphabet = [
        *"aZéßſΩжかな漢ǅʰ١5²½\u0301'’.,/-_<|>()",
        *" \t\n\r\u00a0\u2028",
        "'s",
        "'LL",
        "\r\n",
        "  ",
        "😀",
        END_OF_TEXT,
    ]
    anything = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    draw = lambda: anything() if rng.random() < 0.1 else rng.choice(alphabet)
    return ["".join(draw() for _ in range(rng.randrange(1, 60))) for _ in range(n)]


def pretrained(monkeypatch: pytest.MonkeyPatch, name: str) -> Tokenizer:
    """tiktoken's encoding of this name, but for the published ranks: those are of a corpus of ours."""
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    settings = getattr(tiktoken_ext.openai_public, name)()
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(TEXTS), vocab_size=600, pattern=settings["pat_str"])
    # As the published ones are: bytes in another order, and unused ids between the special tokens.
    ranks = {bytes(token): 255 - rank if rank < 256 else rank for token, rank in trainer.get_mergeable_ranks()}
    first = min(settings["special_tokens"].values())
    specials = {text: rank - first + 600 for text, rank in settings["special_tokens"].items()}
    return Tokenizer(name, settings["pat_str"], ranks, specials)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    if request.param in ("byte", "char", "bpe"):
        return train(TokenizerConfig(request.param, 700), TEXTS)
    return pretrained(monkeypatch, request.param)


def same_ids(tokenizer: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids) == text


def test_transformers_reads_every_text_as_we_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, 77)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_ids(tokenizer, theirs, [*TEXTS, *TRICKY, *random_texts(400)])
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    assert theirs.convert_ids_to_tokens(tokenizer.eot) == END_OF_TEXT
    assert theirs.model_max_length == 77
    # What a model says need not be text: parts of characters, ends of texts, ids that stand for nothing.
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.choice([rng.randrange(256), rng.randrange(tokenizer.vocab_size)]) for _ in range(12)]
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.decode([65, tokenizer.eot], skip_special_tokens=True) == tokenizer.decode([65])


def test_a_character_of_every_kind_is_split_alike_beside_a_letter_a_digit_and_a_space(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The two regular expression engines have the same Unicode."""
    save_tokenizer(tokenizer, tmp_path, 77)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    points = [point for point in range(0x30000) if not 0xD800 <= point <= 0xDFFF]
    for start in range(0, len(points), 4096):
        text = "".join(f"a{chr(point)}1 {chr(point)}B" for point in points[start : start + 4096 : 9])
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_the_table_has_the_patterns_of_the_encodings_that_are_read(tokenizer: Tokenizer) -> None:
    assert check(tokenizer).kind == tokenizer.name


def test_a_saved_tokenizer_comes_back_as_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, 77)
    again, differences = read_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.name, again.eot, again.vocab_size) == (tokenizer.name, tokenizer.eot, tokenizer.vocab_size)
    assert differences == []


def test_what_transformers_saves_again_comes_back_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, 77)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again")[0].fingerprint == tokenizer.fingerprint


def test_merges_are_exact_for_ranks_that_no_training_gives(tmp_path: Path) -> None:
    """Tokens out of order, reached by several pairs, or by none."""
    ranks = {bytes([value]): value for value in range(256)}
    for seed in range(20):
        rng = random.Random(seed)
        words = {"".join(rng.choices("ab", k=rng.randrange(2, 6))).encode() for _ in range(12)}
        tokenizer = Tokenizer(
            "bpe", SPLITS[2].ours, ranks | {word: 256 + i for i, word in enumerate(words)}, {END_OF_TEXT: 300}
        )
        save_tokenizer(tokenizer, tmp_path, 77)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        same_ids(tokenizer, theirs, ["".join(rng.choices("ab", k=rng.randrange(1, 20))) for _ in range(50)])
        assert read_tokenizer(tmp_path)[0].fingerprint == tokenizer.fingerprint


def test_the_last_merge_of_a_token_is_of_the_parts_its_bytes_come_to() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    assert last_merges(ranks) == {b"ab": (b"a", b"b"), b"bc": (b"b", b"c"), b"abc": (b"ab", b"c"), b"xyz": None}


def test_a_pattern_that_is_not_known_to_split_alike_is_refused() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    with pytest.raises(BadInput, match=r"splits text by '\\\\w\+', which is not one of"):
        check(Tokenizer("bpe", r"\w+", ranks, {END_OF_TEXT: 256}))


# --- folders that others wrote ---


def others(folder: Path, pre_tokenizer: Any, **how: Any) -> Any:
    """A tokenizer that the tokenizers library trains and transformers saves."""
    built = tokenizers.Tokenizer(models.BPE())
    built.normalizer, built.pre_tokenizer, built.decoder = how.get("normalizer"), pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet)
    )
    if "post_processor" in how:
        built.post_processor = how["post_processor"]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="</s>", clean_up_tokenization_spaces=False
    )
    theirs.add_tokens(how.get("added", []))
    theirs.save_pretrained(folder)
    return theirs


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {"gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)}
PRE_TOKENIZERS |= {
    f"{split.kind}{i}": lambda split=split: split_by(split.theirs) for i, split in enumerate(SPLITS) if split.theirs
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_byte_level_bpe_of_others_gives_its_ids(name: str, tmp_path: Path) -> None:
    theirs = others(tmp_path, PRE_TOKENIZERS[name]())
    tokenizer, differences = read_tokenizer(tmp_path)
    assert differences == []
    assert (tokenizer.eot, tokenizer.decode([0, 1])) == (0, "</s><pad>")
    same_ids(tokenizer, theirs, [text for text in [*TEXTS, *TRICKY, *random_texts(200)] if "</s>" not in text])
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).eot == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"normalizer": normalizers.NFC()}, "NFC first"),
        (
            {"post_processor": processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])},
            "puts </s> around every text",
        ),
        ({"added": ["added token"]}, "looks for 1 added tokens such as 'added token'"),
    ],
)
def test_what_is_read_otherwise_is_said(how: dict[str, Any], said: str, tmp_path: Path) -> None:
    others(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), **how)
    (sentence,) = read_tokenizer(tmp_path)[1]
    assert said in sentence


@pytest.mark.parametrize("template", ["$A", "</s> $A", "</s> <pad> $A </s>"])
def test_a_text_starts_as_in_transformers(template: str, tmp_path: Path) -> None:
    tokens = [("</s>", 0), ("<pad>", 1)]
    step = processors.TemplateProcessing(single=template, special_tokens=tokens)
    theirs = others(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), post_processor=step)
    tokenizer = read_tokenizer(tmp_path)[0]
    before, empty = text_start(tmp_path, tokenizer)
    assert before == theirs("a")["input_ids"][: len(before)]
    assert [*before, *tokenizer.encode("a")] == [i for i in theirs("a")["input_ids"][: len(before) + 1]]
    assert empty == tokenizer.eot
    edit(tmp_path / "tokenizer_config.json", lambda config: config.update(bos_token={"content": "<pad>"}))
    assert text_start(tmp_path, tokenizer) == (before, 1)
    edit(tmp_path / "tokenizer.json", lambda tree: tree.update(post_processor={"type": "Sequence"}))
    with pytest.raises(BadInput, match=r"tokenizer\.json is damaged"):
        text_start(tmp_path, tokenizer)


def edit(path: Path, change: Any) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["model"].update(type="Unigram"), "model.type='Unigram' is not supported"),
        (lambda tree: tree["model"].update(type="WordPiece"), "model.type='WordPiece' is not supported"),
        (lambda tree: tree["model"].update(byte_fallback=True), "model.byte_fallback=True is not supported"),
        (lambda tree: tree["model"].update(dropout=0.1), "model.dropout=0.1 is not supported"),
        (lambda tree: tree["model"]["merges"].pop(), "is not merged as the ids say"),
        (lambda tree: tree["model"]["merges"].reverse(), "not in the order of the ids"),
        (lambda tree: tree["model"]["merges"].append(["a", "Ġzz"]), "not in the vocabulary"),
        (lambda tree: tree["model"]["vocab"].pop("a"), "no token for the byte 97"),
        (lambda tree: tree["model"]["vocab"].update(b=5), "not distinct"),
        (lambda tree: tree["model"]["vocab"].update(b="5"), "not distinct"),
        (lambda tree: tree["model"]["vocab"].update({"▁the": 9000}), "'▁the' is not spelt in bytes"),
        (lambda tree: tree.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase is not supported"),
        (lambda tree: tree.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer (Metaspace) is not supported"),
        (lambda tree: tree.update(pre_tokenizer=None), "pre_tokenizer (none) is not supported"),
        (
            lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
            "pre_tokenizer (ByteLevel) is not supported",
        ),
        (lambda tree: tree["pre_tokenizer"].update(use_regex=False), "does not split text"),
        (lambda tree: tree.update(decoder={"type": "Metaspace"}), "decoder is not supported"),
        (lambda tree: tree.update(post_processor={"type": "BertProcessing"}), "BertProcessing is not supported"),
        (lambda tree: tree.pop("model"), "is damaged"),
        (lambda tree: tree["model"].update(vocab=3), "is damaged"),
        (lambda tree: tree.update(added_tokens=[3]), "is damaged"),
    ],
)
def test_a_tokenizer_of_another_kind_or_a_damaged_one_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    others(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(BadInput) as refused:
        read_tokenizer(tmp_path)
    assert words in str(refused.value)
    assert str(tmp_path / "tokenizer.json") in str(refused.value)


def test_another_split_pattern_is_refused_with_it(tmp_path: Path) -> None:
    others(tmp_path, split_by(r"\w+"))
    with pytest.raises(BadInput, match=r"splits text by '\\\\w\+'"):
        read_tokenizer(tmp_path)


def test_the_end_of_text_is_the_models_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    others(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    edit(tmp_path / "tokenizer_config.json", lambda tree: tree.pop("eos_token"))
    with pytest.raises(BadInput, match="no token ends a text"):
        read_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 0]}')
    assert read_tokenizer(tmp_path)[0].eot == 1
    edit(tmp_path / "tokenizer_config.json", lambda tree: tree.update(eos_token={"content": "<none>"}))
    with pytest.raises(BadInput, match="'<none>' is not in the vocabulary"):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_with_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match=r"has no tokenizer.json \(it has tokenizer.model, which is not read\)"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as JSON"):
        read_tokenizer(tmp_path)


def test_a_chat_template_goes_along_and_says_the_same_there(tmp_path):
    tokenizer = train(TokenizerConfig("byte"), [])
    tokenizer.template = DEFAULT
    save_tokenizer(tokenizer, tmp_path, 64)
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(messages, tokenize=False)
    rendered = Template(DEFAULT).render(messages)
    assert text == rendered.text
    masked = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = tokenize(rendered, tokenizer)  # of bytes, which no join changes
    assert (masked["input_ids"], masked["assistant_masks"]) == (ours.ids, [int(learnt) for learnt in ours.learnt])
    assert read_tokenizer(tmp_path)[0].template == DEFAULT


@pytest.mark.parametrize(
    ("told", "template"),
    [
        ("hello", "hello"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tools", "template": "t"}], None),
        (None, None),
    ],
)
def test_a_chat_template_may_stand_in_the_tokenizers_settings(told, template, tmp_path):
    save_tokenizer(train(TokenizerConfig("byte"), []), tmp_path, 64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": told}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(tmp_path)[0].template == template
