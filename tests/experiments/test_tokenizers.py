"""The tokenizer report, on a text made here."""

import sys

import pytest

from experiments import tokenizers


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two domains: plain letters, and letters of two bytes."""
    for domain, letters in {"ascii": "abcdefghij", "greek": "αβγδεζηθικ"}.items():
        (tmp_path / domain).mkdir()
        for i in range(4):
            lines = [f"{letters[(i + j) % 10] * (1 + j % 7)} {letters[j % 10]}{i * 31 + j}" for j in range(40)]
            (tmp_path / domain / f"{i}.txt").write_text("\n".join(lines))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return [f"data.path={tmp_path}", "data=text", f"data.cache={tmp_path / 'cache'}", "data.clean.near=0"]


def rows(monkeypatch, capsys, *overrides):
    monkeypatch.setattr(sys, "argv", ["tokenizers", *overrides])
    tokenizers.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def test_bytes_per_token_and_round_trip_by_domain(texts, monkeypatch, capsys):
    byte, char, bpe = rows(monkeypatch, capsys, *texts, "vocab_size=280")
    assert byte | {"vocabulary": "257", "bytes per token": "1.00", "ascii": "1.00", "greek": "1.00"} == byte
    assert char["vocabulary"] == str(257 + 10)  # ten letters of two bytes
    assert char["ascii"] == "1.00"
    assert 1 < float(char["greek"]) < 2
    assert bpe["vocabulary"] == "280"
    assert float(bpe["bytes per token"]) > float(char["bytes per token"])
    assert {each["round trip"] for each in (byte, char, bpe)} == {"exact"}


def test_a_tokenizer_it_does_not_know_is_refused(texts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenizers", *texts, "tokenizers=[bite]"])
    with pytest.raises(SystemExit, match="2"):
        tokenizers.main()
    assert "did you mean byte" in capsys.readouterr().err
