"""Claims about moe/data/tokenizer.py."""

import pydoc_data.topics
import random
import threading

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.data.tokenizer
from moe.config.data import TokenizerConfig
from moe.data.tokenizer import Tokenizer, train
from moe.errors import BadInput

TEXTS = [*list(pydoc_data.topics.topics.values())[:40], "naïve café — 漢字 😀 \u0301 12345 \r\n\t"]
TRAINED = {
    "byte": train(TokenizerConfig("byte"), TEXTS),
    "char": train(TokenizerConfig("char"), TEXTS),
    "bpe": train(TokenizerConfig("bpe", 700), TEXTS),
}
TRICKY = [
    "",
    " ",
    "\n\n  \t x",
    "<|endoftext|>",
    "👩‍👩‍👧 family, flag 🇫🇮, e\u0301",
    "\x00\x7f\u0085\u2028\ufeff\U0010ffff",
    "unseen: Ωж한",
]


@pytest.fixture(params=sorted(TRAINED))
def tokenizer(request):
    return TRAINED[request.param]


@pytest.mark.parametrize("name", sorted(TRAINED))
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_makes_the_round_trip_and_its_token_bytes_sum_to_its_utf8_length(name, text):
    tokenizer = TRAINED[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids


@pytest.mark.parametrize("text", [*TRICKY, *TEXTS[:3]])
def test_tricky_text_makes_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


def test_end_of_text_spelt_in_a_text_is_plain_text(tokenizer):
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_byte_ids_are_the_bytes():
    tokenizer = TRAINED["byte"]
    assert tokenizer.encode("aé😀") == list("aé😀".encode())
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


def test_char_gives_one_token_per_character_of_its_corpus_and_bytes_for_unseen_ones():
    tokenizer = TRAINED["char"]
    assert tokenizer.vocab_size == 257 + len({c for text in TEXTS for c in text if ord(c) > 127})
    assert len(tokenizer.encode("naïve 漢字😀")) == 9
    assert tokenizer.encode("한") == list("한".encode())


def test_bpe_has_exactly_the_vocabulary_asked_for_with_end_of_text_counted():
    for vocab_size in (257, 300, 701):
        tokenizer = train(TokenizerConfig("bpe", vocab_size), TEXTS)
        assert tokenizer.vocab_size == vocab_size
        assert sorted({i for text in TEXTS for i in tokenizer.encode(text)})[-1] < tokenizer.eot == vocab_size - 1
        assert tokenizer.token_bytes.shape == (vocab_size,)


def test_bpe_depends_on_the_text_alone():
    again = train(TokenizerConfig("bpe", 700), TEXTS[::-1])
    assert again.fingerprint == TRAINED["bpe"].fingerprint
    assert train(TokenizerConfig("bpe", 700), TEXTS[:20]).fingerprint != again.fingerprint


def test_a_corpus_too_small_for_the_vocabulary_is_refused_with_the_size_it_can_give():
    with pytest.raises(BadInput, match=r"tokenizer\.vocab_size=4096 .* at most 262; lower it"):
        train(TokenizerConfig("bpe", 4096), ["hello hello"])
    assert train(TokenizerConfig("bpe", 262), ["hello hello"]).vocab_size == 262


def test_a_token_that_ends_inside_a_character_decodes_to_the_replacement_character():
    tokenizer = TRAINED["byte"]
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    assert tokenizer.decode_bytes([0xC3, 0xA9]) == "é".encode()


def test_ids_the_vocabulary_leaves_unused_decode_to_nothing():
    ranks = {bytes([value]): value for value in range(256)}
    tokenizer = Tokenizer("gap", "(?s).", ranks, {"<|endoftext|>": 260, "<|other|>": 257})
    assert tokenizer.vocab_size == 261
    assert tokenizer.decode([104, 258, 259, 105]) == "hi"
    assert np.flatnonzero(tokenizer.token_bytes == 0).tolist() == [256, 257, 258, 259, 260]


def test_a_whitespace_run_that_would_crash_the_regex_engine_is_encoded():
    bpe = TRAINED["bpe"]
    spaces, mixed = " " * 1_200_000 + "x", " \t" * 600_000 + "x"
    assert bpe.decode(bpe.encode(mixed)) == mixed
    assert bpe.decode(bpe.encode_batch([spaces])[0]) == spaces
    assert train(TokenizerConfig("bpe", 270), [spaces]).vocab_size == 270


def test_a_long_text_without_such_a_run_is_not_cut():
    text = "\n".join(TEXTS)
    text = text * (2**20 // len(text) + 1)
    bpe = TRAINED["bpe"]
    assert bpe.encode(text) == bpe._encoding.encode_ordinary(text)


def test_a_saved_tokenizer_loads_as_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.eot) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
    assert loaded.fingerprint == tokenizer.fingerprint
    for text in TRICKY + TEXTS[:3]:
        assert loaded.encode(text) == tokenizer.encode(text)
    np.testing.assert_array_equal(loaded.token_bytes, tokenizer.token_bytes)


def test_the_rank_file_is_tiktokens(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    TRAINED["bpe"].save(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    assert ranks == TRAINED["bpe"]._encoding._mergeable_ranks


def test_any_flipped_bit_in_a_saved_tokenizer_is_refused_and_its_file_named(tmp_path):
    TRAINED["bpe"].save(tmp_path)
    rng = random.Random(0)
    for trial in range(60):
        path = tmp_path / ("tokenizer.json", "ranks.tiktoken")[trial % 2]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=path.name):
            Tokenizer.load(tmp_path)
        path.write_bytes(good)
    Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "ranks.tiktoken"])
def test_a_missing_or_empty_tokenizer_file_is_refused_and_named(name, tmp_path):
    TRAINED["byte"].save(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=name):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (requests.ConnectionError("HTTPSConnectionPool(...)"), "ConnectionError"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (ValueError("Hash mismatch"), "Hash mismatch"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_pretrained_encoding_that_cannot_be_had_is_refused_with_the_way_out(
    name, error, reason, tmp_path, monkeypatch
):
    def unreachable(path: str) -> bytes:
        raise error

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(
        BadInput, match=rf"tokenizer\.name={name} .*TIKTOKEN_CACHE_DIR is {tmp_path}.*\({reason}\).*bpe"
    ):
        train(TokenizerConfig(name), [])


def test_a_download_that_never_answers_is_given_up(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answer.wait())
    monkeypatch.setattr(moe.data.tokenizer, "DOWNLOAD_SECONDS", 0.01)
    with pytest.raises(BadInput, match="no answer within"):
        train(TokenizerConfig("gpt2"), [])
    answer.set()


def test_a_pretrained_encoding_keeps_its_ids_and_saves_self_contained(tmp_path, monkeypatch):
    ranks = {bytes([255 - value]): value for value in range(256)} | {b"hi": 256}
    specials = {"<|endoftext|>": 257, "<|fim_prefix|>": 259}
    pretrained = tiktoken.Encoding("cl100k_base", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens=specials)
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", {"cl100k_base": pretrained}.__getitem__)
        tokenizer = train(TokenizerConfig("cl100k_base"), [])
    assert (tokenizer.vocab_size, tokenizer.eot) == (260, 257)
    assert tokenizer.encode("hi é<|fim_prefix|>") == pretrained.encode_ordinary("hi é<|fim_prefix|>")
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("oh hi\n") == pretrained.encode_ordinary("oh hi\n")
    assert loaded.fingerprint == tokenizer.fingerprint
