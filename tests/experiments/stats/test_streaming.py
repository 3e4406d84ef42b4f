"""Claims about what a trace layer by layer is told to take, against one that was made."""

import numpy as np
import pytest

from experiments.stats.streaming import streamed
from experiments.suites.tracing import Traced, write_folder
from moe.analysis import by_layer
from moe.analysis.by_layer import Arrays, trace_by_layer
from moe.analysis.trace import About, Writer
from moe.analysis.windows import of_ids
from moe.config.router import RouterConfig
from moe.convert.hf_stream import Parts
from moe.model.cost import flops
from tests.small_runs import silent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trace of 40 tokens: the model, the bytes of its tensors, of every part that was held, and of the files."""
    traced, place = Traced(40, layers=3, d=8, experts=4, f=12, context=8), tmp_path_factory.mktemp("streamed")
    write_folder(place / "folder", traced.model())
    np.save(place / "ids.npy", np.zeros(41, np.int32))
    parts, windows, held, files = Parts(place / "folder"), of_ids(place / "ids.npy", 64, 8, 0, 0), [], {}

    def hold(*modules):
        held.append(4 * sum(p.numel() for module in modules for p in module.parameters()))
        return parts.held(*modules)

    class Counted(Arrays):
        def close(self):
            files[self.path.name] = self.path.stat().st_size
            super().close()

    about = About("", "", "", 64, 8, [0, 1, 2], [4] * 3, 2, windows.domains, "")
    with pytest.MonkeyPatch.context() as patch, Writer(place / "trace", about) as writer:
        patch.setattr(by_layer, "Arrays", Counted)
        trace_by_layer(parts.model, hold, windows, writer, silent)
    n_bytes = sum(parts.read(name).nbytes for name in parts.shapes)
    return traced.model(), n_bytes, held, files


def test_weights_blocks_and_files_are_as_large_as_it_says(made):
    cfg, n_bytes, held, files = made
    cost = streamed(cfg, RouterConfig(), 40)
    assert cost.folder == n_bytes
    assert cost.block == max(held[1:-1])
    assert cost.states == files["states"]
    assert cost.routes == sum(files[name] for name in by_layer.DECIDED)
    assert cost.flops == 40 * flops(cfg).evaluation


def test_memory_is_a_block_and_a_batch_or_the_vocabulary(made):
    cfg = made[0]
    cost = streamed(cfg, RouterConfig(), 40)
    assert cost.memory > cost.block
    large = streamed(Traced(40, vocab=50_000, d=8).model(), RouterConfig(), 40)
    assert large.memory == 4 * (50_000 * 8 + 2 * 1024 * 50_000), "the logits of 1,024 tokens, twice"
    more = [streamed(cfg, RouterConfig(), tokens) for tokens in (10**5, 10**7)]
    assert more[0].memory == more[1].memory
    assert more[1].states == 100 * more[0].states
