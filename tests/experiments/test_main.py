"""`python -m experiments` says what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as listing

ROOT = Path(__file__).parents[2]
LIGHT = """
import runpy, sys
for name in ("torch", "hydra", "omegaconf", "numpy"):
    sys.modules[name] = None  # importing it raises ImportError
runpy.run_module("experiments", run_name="__main__")
"""


def test_every_command_that_exists_has_a_line_and_nothing_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    runnable = {
        path.stem for path in (ROOT / "experiments").glob("*.py")
        if path.stem != "__main__" and "__main__" in path.read_text()
    }  # fmt: skip
    assert set(re.findall(r"^  (\w+)  +\S", done.stdout, re.MULTILINE)) == runnable
    assert "NAME --help" in done.stdout
    assert all(len(line) <= 140 for line in done.stdout.splitlines())


def test_a_line_is_the_first_sentence_of_the_commands_docstring(capsys):
    listing.main()
    printed = capsys.readouterr().out
    assert re.search(r"^  train  +Train one model\.$", printed, re.MULTILINE)
    assert re.search(
        r"^  upcycle  +Turn finished runs into the start of another model, in a new run's", printed, re.MULTILINE
    )


@pytest.mark.parametrize("name", ["train", "gpu_evidence", "readme"])
def test_help_is_what_the_listing_promises(name):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
