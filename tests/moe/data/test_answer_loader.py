"""Batches of pairs and of prompts: which rows, which targets, which step."""

from collections import Counter
from types import SimpleNamespace

import pytest

from moe.config.data import TokenizerConfig
from moe.data.answer_loader import PairLoader, PromptLoader, pad_rows, rows_of
from moe.data.answers import Row
from moe.data.loader import NO_TARGET
from moe.data.prepare import prepare
from moe.data.tokenizer import train
from moe.errors import BadInput
from tests.moe.data.small_corpora import silent
from tests.moe.data.test_answers import PAIRS, written

BYTES = train(TokenizerConfig("byte"), [])
EOT = BYTES.eot
ROWS = [Row(f"rows, line {i}", "rows", f"{i}+1=", (str(i + 1), "??")) for i in range(11)]
SPLIT = SimpleNamespace(dataset="hash", name="train")


def pairs(**changes):
    settings = {"batch_size": 8, "context": 16, "seed": 3} | changes
    return PairLoader(SPLIT, ROWS, BYTES, *settings.values())


def prompts(**changes):
    settings = {"batch_size": 4, "context": 16, "seed": 3, "max_new": 5} | changes
    return PromptLoader(SPLIT, ROWS, BYTES, *settings.values())


def test_a_row_reads_all_its_tokens_and_learns_its_answer_and_its_end():
    batch = pad_rows([([1, 2, 3, 4, EOT], 3), ([5, 6, EOT], 1)], pad=EOT)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4, EOT], [5, 6, EOT, EOT, EOT]]
    assert batch.targets_BS.tolist() == [
        [NO_TARGET, NO_TARGET, 4, EOT, NO_TARGET],
        [6, EOT, NO_TARGET, NO_TARGET, NO_TARGET],
    ]


def test_pairs_stand_side_by_side_the_preferred_one_first():
    batch = pairs().batch(0)
    assert len(batch.tokens_BS) == 8
    for chosen_S, rejected_S in zip(batch.targets_BS[0::2], batch.targets_BS[1::2], strict=True):
        said = [
            BYTES.decode(t for t in row_S.tolist() if t not in (NO_TARGET, EOT)) for row_S in (chosen_S, rejected_S)
        ]
        assert said[1] == "??"
        assert said[0].isdecimal()


def test_every_row_comes_once_an_epoch_whatever_the_step_it_began_at():
    loader = prompts(batch_size=1)
    seen = [loader.batch(step).answers[0] for step in range(22)]
    assert Counter(seen[:11]) == Counter(seen[11:]) == Counter(row.answers[0] for row in ROWS)
    assert seen[:11] != seen[11:]
    later = prompts(batch_size=1).iterate(5)
    assert [next(later).answers[0] for _ in range(6)] == seen[5:11]
    assert [prompts(batch_size=1, seed=4).batch(step).answers[0] for step in range(11)] != seen[:11]


def test_a_place_in_other_rows_is_refused():
    state = prompts().state(3)
    prompts().check_state(state)
    with pytest.raises(BadInput, match=r"seed changed since the checkpoint: it was 3 and is now 4"):
        prompts(seed=4).check_state(state)


def test_a_row_that_the_model_cannot_read_whole_is_refused():
    with pytest.raises(BadInput, match=r"rows, line 0: prompt and answer have 6 tokens, more than model\.context=5"):
        pairs(context=5)
    with pytest.raises(
        BadInput, match=r"rows, line 0: the prompt has 4 tokens, and with an answer of objective\.max_new=13"
    ):
        prompts(max_new=13)


def test_rows_are_in_the_split_that_their_text_is_in(tmp_path):
    cfg = written(tmp_path, PAIRS)
    dataset = prepare(cfg, TokenizerConfig("byte"), silent)
    for split in ("train", "val"):
        rows = rows_of(cfg, split)
        tokens, _ = dataset.split(split).read([0], dataset.split(split).n_tokens - 1)
        texts = dataset.tokenizer.decode(tokens[0]).split("<|endoftext|>")[:-1]
        assert sorted(row.text() for row in rows) == sorted(texts)
    with pytest.raises(BadInput, match="has no row for the val split"):
        rows_of(written(tmp_path, PAIRS[:1], val_fraction=0.0001), "val")
