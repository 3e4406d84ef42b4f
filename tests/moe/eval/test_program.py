"""Claims about run.c from Python: what it says is the model's, and what goes wrong is said in a sentence."""

import shutil

import numpy as np
import pytest
import torch

from moe.config.router import RouterConfig
from moe.convert import export_c
from moe.errors import BadInput
from moe.eval import program
from moe.model.transformer import Transformer, next_token_loss
from tests.small_models import BYTES, tiny

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = Transformer(tiny(), RouterConfig()).initialize(0).eval()
    folder = tmp_path_factory.mktemp("program") / "two"
    export_c.save(model, BYTES, folder)
    return model, folder


def test_a_score_is_the_models_loss_of_every_token(exported):
    model, folder = exported
    windows_WS1 = np.random.default_rng(0).integers(0, 257, (5, 13))
    nats_WS = program.score(program.compile_program(folder), folder, windows_WS1)
    tokens_WS1 = torch.from_numpy(windows_WS1)
    with torch.no_grad():
        loss_WS = next_token_loss(model(tokens_WS1[:, :-1]).logits_BSV, tokens_WS1[:, 1:], "none")
    assert nats_WS.shape == (5, 12)
    assert np.abs(nats_WS - loss_WS.numpy()).max() < 1e-4


def test_what_cannot_be_compiled_or_read_is_said(exported, monkeypatch, tmp_path):
    _, folder = exported
    (tmp_path / "run.c").write_text("int main(void) { return nothing; }")
    with pytest.raises(BadInput, match=r"cannot compile .*run\.c"):
        program.compile_program(tmp_path)
    compiled = program.compile_program(folder)
    (tmp_path / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"^.*model\.bin is truncated or altered"):
        program.score(compiled, tmp_path, np.zeros((1, 2), int))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="there is no C compiler"):
        program.compile_program(folder)
