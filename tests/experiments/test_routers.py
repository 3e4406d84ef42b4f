"""Claims about the command that prints the table of routers."""

import sys

import pytest

from experiments import routers


def test_the_command_prints_the_rows_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["routers", "names=[hash,base]"])
    routers.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["router", "-" * 6, "hash", "base"]


def test_a_router_that_does_not_exist_is_refused_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["routers", "names=[hasch]"])
    with pytest.raises(SystemExit, match="2"):
        routers.main()
    assert "did you mean hash" in capsys.readouterr().err
