"""The C program of an export, for all tests of it."""

import shutil
import subprocess

import pytest

from moe.config.router import RouterConfig
from moe.convert import export_c
from tests.c_program import STRICT, random_model, sizes
from tests.small_models import BYTES


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """run.c, compiled as its docs say but for the optimisation."""
    path = tmp_path_factory.mktemp("program") / "run"
    model = random_model(sizes(), RouterConfig())
    export_c.save(model, BYTES, path.parent / "two")
    subprocess.run(["cc", "-O2", *STRICT, path.parent / "two" / "run.c", "-o", path, "-lm"], check=True)
    return path


@pytest.fixture
def say(program, tmp_path):
    """(model, arguments, tokenizer, dtype, lines) -> what the program prints and leaves, having written the model and
    given it the lines."""

    def call(model, *arguments, tokenizer=BYTES, dtype="fp32", lines=b""):
        folder = tmp_path / "two"
        shutil.rmtree(folder, ignore_errors=True)
        export_c.save(model, tokenizer, folder, dtype)
        done = subprocess.run(
            [program, folder / "model.bin", *arguments], input=lines, capture_output=True, check=False
        )
        assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr[:300]
        return done

    return call
