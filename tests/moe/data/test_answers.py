"""Lines of prompts with answers: what they are as text, and what is wrong with one."""

import json

import pytest

from moe.config.data import CleanConfig, DataConfig, TokenizerConfig
from moe.data.answers import Row, read_rows
from moe.data.prepare import prepare
from moe.data.unreadable import BadDocument
from moe.errors import BadInput
from tests.moe.data.small_corpora import silent

AS_THEY_ARE = CleanConfig(html=False, unicode="none", min_chars=0, max_repetition=1.0, exact=False, near=0.0)
PAIRS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "?"} for i in range(30)]


def written(tmp_path, lines, name="preferences", **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    settings = {"clean": AS_THEY_ARE, "cache": str(tmp_path / "cache"), "val_fraction": 0.2} | settings
    return DataConfig(name=name, path=str(path), **settings)


def test_a_row_is_its_prompt_and_its_answers(tmp_path):
    row, *_ = read_rows(written(tmp_path, PAIRS))
    assert (row.prompt, row.answers, row.domain, row.text()) == ("0+1=", ("1", "?"), "rows", "0+1=1")
    assert row.where == f"{tmp_path / 'rows.jsonl'}, line 1"
    row, *_ = read_rows(written(tmp_path, [{"prompt": "2+2=", "answer": "4"}], "prompts"))
    assert row.answers == ("4",)


def test_as_a_corpus_it_is_the_chosen_answers_behind_their_prompts(tmp_path):
    dataset = prepare(written(tmp_path, PAIRS), TokenizerConfig("byte"), silent)
    texts = []
    for split in ("train", "val"):
        tokens, _ = dataset.split(split).read([0], dataset.split(split).n_tokens - 1)
        texts += dataset.tokenizer.decode(tokens[0]).split("<|endoftext|>")[:-1]
    assert sorted(texts) == sorted(pair["prompt"] + pair["chosen"] for pair in PAIRS)


BAD = {
    "an empty answer": ({"prompt": "a", "chosen": "", "rejected": "b"}, "and chosen is ''"),
    "no prompt": ({"chosen": "c", "rejected": "b"}, "needs prompt, chosen, rejected as text that is not empty"),
    "a number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "and chosen is '3'"),
    "no preference": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "prefers an answer to itself"),
    "no object": ([1], "and prompt is 'None'"),
    "half a character": ({"prompt": "\ud800", "chosen": "c", "rejected": "b"}, "prompt holds half a surrogate pair"),
    "no JSON": ("{oh\n", "is not JSON"),
    "bytes": ("\0\n", "is binary, not JSON: byte 0 of the line is NUL"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_is_no_row_is_named_with_what_is_wrong(tmp_path, case):
    line, words = BAD[case]
    cfg = written(tmp_path, [PAIRS[0], line, PAIRS[1]])
    first, fault, last = read_rows(cfg)
    assert isinstance(fault, BadDocument)
    assert str(fault).startswith(f"{tmp_path / 'rows.jsonl'}, line 2")
    assert words in str(fault)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    with pytest.raises(BadInput, match="line 2"):
        prepare(cfg, TokenizerConfig("byte"), silent)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (fault,) = read_rows(DataConfig(name="prompts", path=str(tmp_path)))
    assert "notes.txt is no .jsonl, which data=prompts reads" in str(fault)
