"""The roofline is drawn of what was measured."""

import sys

import pytest

from experiments.suites import roofline
from experiments.suites.cases import Absent
from tests.experiments.gpu_rows import rows


def test_the_roofline_is_drawn_of_layers_and_combines(tmp_path, monkeypatch):
    roofline.draw(rows(), tmp_path / "new" / "roofline.png")
    assert (tmp_path / "new" / "roofline.png").stat().st_size > 10_000
    with pytest.raises(Absent, match="no measured rows"):
        roofline.draw([], tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Absent, match="matplotlib not installed"):
        roofline.draw(rows(), tmp_path / "x.png")
