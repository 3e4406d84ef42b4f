"""Claims about the suite that holds models read here to transformers' own."""

import importlib.util
import json

import pytest
import torch

from experiments.suites import families
from experiments.suites.cases import Absent
from moe.convert.hf_families import FAMILIES
from moe.model.attention import Attention
from tests.experiments.bench_command import command

CPU = torch.device("cpu")


def test_a_row_for_every_family_says_how_far_off_the_worst_of_it_is(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=families", "sizes=smoke", f"out={tmp_path / 'rows.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"measured"}
    assert [row["family"] for row in rows] == list(FAMILIES), "a family without a variant is held by nothing"
    assert max(max(row["logits_error"], row["gradient_error"]) for row in rows) < 1e-5
    assert all(row["alike"] == row["generated"] == 27 for row in rows)
    assert "tokens generated alike" in capsys.readouterr().out


def test_a_difference_is_told_in_the_logits_the_gradients_and_the_text(monkeypatch):
    """Scores three times too large, in attention alone."""
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = Attention.forward

    def wrong(self, *arguments, **given):
        scaled = lambda q, *states, **how: attend(3 * q, *states, **how)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled)
            return forward(self, *arguments, **given)

    assert families.compared("llama", CPU)["alike"] == families.NEW
    monkeypatch.setattr(Attention, "forward", wrong)
    told = families.compared("llama", CPU)
    assert told["logits_error"] > 1e-3
    assert max(told["gradients"].values()) > 1e-3
    assert told["alike"] < families.NEW


def test_what_is_generated_is_no_token_again_and_again():
    hf = families.theirs("qwen3_moe").eval()
    hf.generation_config.eos_token_id = None
    tokens = hf.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=families.NEW, do_sample=False, pad_token_id=0)
    assert len(set(tokens[0, 4:].tolist())) > 5


def test_without_transformers_every_family_is_absent_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for case in families.cases(families.settings(CPU, False, 1)):
        with pytest.raises(Absent, match="pip install"):
            case.measure()
