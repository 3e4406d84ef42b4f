"""Tables say the same on a terminal and in a pipe."""

import pytest

from experiments.pages.tables import markdown, print_table

HEADINGS = ("", "MoE", "dense twin", "MoE against twin")


def test_a_table_reads_as_plain_text_and_as_markdown():
    text = markdown(HEADINGS, [("a | b", "1", "2", "3"), ("Validation loss", "3.240", "3.320", "−0.080")])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "a \\| b" in lines[2]
    assert all(line.replace("\\|", "").count("|") == 5 for line in lines)


def test_columns_of_words_stand_to_the_left():
    lines = markdown(("name", "word", "n"), [("b", "c", "1")], left=2).splitlines()
    assert lines == ["| name | word |  n |", "| ---- | ---- | -: |", "| b    | c    |  1 |"]


def test_every_column_has_a_dash_below_its_heading():
    """GitHub reads no table whose second line has a colon alone."""
    assert markdown(("T", "K"), [("1", "2")]).splitlines()[1] == "| -- | -: |"


def test_a_pipe_gets_markdown(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    print_table(("model", "loss"), [("moe", "3.2")])
    assert capsys.readouterr().out == "| model | loss |\n| ----- | ---: |\n| moe   |  3.2 |\n"


def test_a_terminal_gets_every_cell_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    cells = ("[red]name[/red]", "3.240", "3.320", "−0.080 (−0.085 to −0.074)")
    print_table(HEADINGS, [cells])
    out = capsys.readouterr().out
    assert all(cell in out for cell in cells)


@pytest.mark.parametrize("colours", ["", "1"], ids=["pipe", "terminal"])
def test_a_name_with_control_characters_moves_no_cursor(colours, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if colours:
        monkeypatch.setenv("FORCE_COLOR", colours)
    print_table(("domain\x1b[2J", "loss"), [("a\x1b]0;title\x07\nb", "3.2")])
    out = capsys.readouterr().out
    assert "domain␛[2J" in out
    assert "a␛]0;title␇␊b" in out
