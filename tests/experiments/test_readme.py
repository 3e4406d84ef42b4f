"""Every section of the README and of docs/ is made of the results."""

import sys

import pytest

from experiments import readme
from experiments.suites import cases, evidence
from tests.experiments.gpu_rows import written


def test_the_readme_says_not_yet_measured_with_the_command_that_would(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    asked = "Not yet measured: `python -m experiments.bench suite=routing out=experiments/results/routing.jsonl`"
    assert asked in readme.routing(cases.read(tmp_path / "x"))
    assert "Not yet measured: `python -m experiments.gpu_evidence" in readme.gpu(evidence.read(tmp_path))


def test_the_readmes_section_has_tables_where_it_was_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.gpu(written(tmp_path))
    assert text.startswith("NVIDIA H100, driver 580, torch 2.11, triton 3.6.0, cuda 13.0; commit cccccccccc\n")
    assert "| olmoe" in text
    assert "| gpu-1b: switchyard MoE (triton) |" in text
    assert "41.0%" in text
    assert "1 of 2" in text
    assert "roofline" not in text
    (tmp_path / "roofline.png").write_text("")
    assert "![FLOP per byte against TF/s](../experiments/results/roofline.png)" in readme.gpu(evidence.read(tmp_path))
    assert text.endswith("`python -m experiments.gpu_evidence --out DIR`\n")


def test_the_readmes_routing_section_shows_the_most_tokens(tmp_path):
    total = {"by hand": 2e-3, "reference": 4e-3, "torch": 1e-3}
    row = {
        "E": 8, "K": 2, "D": 256, "F": 128, "status": "measured", "total_s": total, "routing_of_layer": 0.25,
        "by_hand_over_this": {"by hand": 1.0, "reference": 0.5, "torch": 2.0}, "device": "a CPU", "commit": None,
        "versions": {"torch": "2.13"}, "dirty": None, "code": "k", "threads": 2,
        "command": "python -m experiments.bench suite=routing",
    }  # fmt: skip
    text = readme.routing([row | {"T": 1024}, row | {"T": 16384}])
    assert "| 16,384 |  8 |  2 |" in text
    assert "1,024" not in text
    assert "2.00×" in text
    assert "25%" in text
    assert text.endswith(
        "`python -m experiments.bench suite=routing`, D=256, F=128; a CPU, 2 threads, torch 2.13, code k\n"
    )


@pytest.mark.parametrize("word", ["--write", "README.md", "check=true"])
def test_a_word_that_the_command_does_not_take_is_refused_before_a_page_is_written(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["readme.py", word])
    monkeypatch.setattr(readme, "pages", lambda: pytest.fail("a page was read"))
    with pytest.raises(SystemExit, match="2"):
        readme.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {word.partition('=')[0]} is no ")
    assert "--help" in error
    assert error.count("\n") == 1
