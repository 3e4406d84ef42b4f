"""Data: what is read, and what is kept of it."""

import pytest

from tests.moe.config.refusals import refusal

IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "domain": (
        {"data.domains": ["drama", "poetry"]},
        "data.domains has 'poetry'; the blend's domains are drama, verse",
    ),
    "no path": ({"data.name": "text"}, "data.name=text needs data.path"),
    "no dataset": ({"data.name": "huggingface"}, "data.name=huggingface needs data.path"),
    "no run": ({"tokenizer.name": "saved"}, "tokenizer.path= with tokenizer.name=saved: tokenizer.name=saved and"),
    "no use": ({"tokenizer.path": "runs/a"}, "tokenizer.path=runs/a with tokenizer.name=bpe: tokenizer.name=saved and"),
    "lengths": ({"data.clean.max_chars": 50}, "data.clean.max_chars=50 is below data.clean.min_chars=100"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)
