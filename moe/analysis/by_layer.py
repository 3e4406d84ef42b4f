"""A trace that is made layer by layer: all tokens pass one layer before the next one is loaded.

So memory holds one layer, whatever the size of the model. What lies between layers (every token's state, and what each
layer decided) is in files beside the trace, which are read and written batch by batch and removed at the end. The same
operations on the same shapes compute a batch as when the model is whole: the trace is the same, bit by bit.

Letters beyond the glossary: L the MoE layers.
"""

import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.analysis.trace import Batch, Recorder, Writer
from moe.analysis.windows import Columns
from moe.config.model import window_of
from moe.errors import BadInput
from moe.model.attention import within_window
from moe.model.layer import LayerInput
from moe.model.transformer import Transformer, divided, next_token_loss

Hold = Callable[..., AbstractContextManager[None]]  # (parts of the model) -> they have their weights inside
DECIDED = ("expert", "weight", "margin", "entropy")


class Arrays:
    """Arrays in a file, by number. Read and written, not mapped: what lies there takes no memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self.file = open(path, "w+b")  # noqa: SIM115 — closed by `close`
        self.places: list[tuple[int, np.dtype, tuple[int, ...]]] = []

    def append(self, array: np.ndarray) -> None:
        """Behind all others."""
        self.places.append((self.end, array.dtype, array.shape))
        self.end += array.nbytes
        self[len(self.places) - 1] = array

    def __setitem__(self, i: int, array: np.ndarray) -> None:
        start, dtype, shape = self.places[i]
        assert (array.dtype, array.shape) == (dtype, shape), f"array {i} is {dtype} {shape}"
        self.file.seek(start)
        self.file.write(np.ascontiguousarray(array).data.cast("B"))

    def __getitem__(self, i: int) -> np.ndarray:
        start, dtype, shape = self.places[i]
        array = np.empty(shape, dtype)
        self.file.seek(start)
        n_read = self.file.readinto(array.data.cast("B"))
        assert n_read == array.nbytes, f"{self.path} ends in array {i}"
        return array

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Between:
    """What lies between layers, in files of a folder that goes with it: `states` (B, S, D) of every batch, and by the
    names in `DECIDED` what each MoE layer decided, batch after batch, layer after layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Between":
        self.folder.mkdir()
        self.states = Arrays(self.folder / "states")
        self.decided = {name: Arrays(self.folder / name) for name in DECIDED}
        return self

    def __exit__(self, *_: object) -> None:
        for arrays in (self.states, *self.decided.values()):
            arrays.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def trace_by_layer(
    model: Transformer, held: Hold, windows: Iterable[Columns], writer: Writer, say: Callable[[str], None]
) -> None:
    """Write what every layer decides of the windows, which are gone through once for every layer. `model`: of a family
    of transformers with experts, in evaluation; `held` gives parts of it their weights. Raises `BadInput` where there
    is no room for what lies between layers."""
    with Between(writer.beside / "layers") as between, Recorder(model, writer.about.k) as recorder:
        try:
            with held(model.embed):
                for read_BS1, *_ in windows:
                    between.states.append(model.embedded(_tokens(read_BS1)).numpy())
            for layer, block in enumerate(model.blocks):
                say(f"trace: layer {layer + 1} of {len(model.blocks)}")
                with held(block):
                    pass_block(model, layer, windows, between, recorder)
        except OSError as error:
            raise BadInput(f"{between.folder} cannot be written ({error.strerror or error}).") from error
        with held(model.norm, model.embed if model.cfg.tie_embeddings else model.head):
            write(model, windows, between, writer)


def pass_block(
    model: Transformer, layer: int, windows: Iterable[Columns], between: Between, recorder: Recorder
) -> None:
    """All tokens through one block: their states are replaced, and what its router decided is kept."""
    for i, (read_BS1, *_) in enumerate(windows):
        tokens_BS = _tokens(read_BS1)
        length = tokens_BS.shape[1]
        rope = tuple(angles[:length].unsqueeze(-3) for angles in (model.cos_Sd, model.sin_Sd))
        mask = within_window(0, length, window_of(model.cfg, layer), tokens_BS.device, None)
        x_BSD = torch.from_numpy(between.states[i])
        x_BSD, routing = model.blocks[layer](x_BSD, rope, "torch", None, LayerInput(tokens_T=tokens_BS.flatten()), mask)
        between.states[i] = x_BSD.numpy()
        if routing is not None:
            columns = recorder.columns(routing, recorder.decided.pop(), tokens_BS.numel())
            for name, column in zip(DECIDED, columns, strict=True):
                kept = column.to(torch.int32 if name == "expert" else torch.float16)  # as narrow as a trace has it
                between.decided[name].append(kept.numpy())


def write(model: Transformer, windows: Iterable[Columns], between: Between, writer: Writer) -> None:
    """The trace, token by token, from what the layers left; with the loss of every token."""
    head_VD = model.embed.weight if model.cfg.tie_embeddings else model.head.weight
    n_batches = len(between.states.places)
    for i, (read_BS1, domain_BS, doc_BS, pos_BS, *_) in enumerate(windows):
        logits_BSV = divided(model.cfg, F.linear(model.norm(torch.from_numpy(between.states[i])), head_VD))
        loss_BS = next_token_loss(logits_BSV, torch.from_numpy(read_BS1[:, 1:]), reduction="none")
        columns = (
            np.stack([arrays[layer * n_batches + i] for layer in range(len(writer.about.layers))], 1)
            for arrays in between.decided.values()
        )
        texts = read_BS1[:, :-1], read_BS1[:, 1:], domain_BS, doc_BS, pos_BS
        writer.add(Batch(*texts, loss_BS.float().numpy(), *columns))


def _tokens(read_BS1: np.ndarray) -> Tensor:
    return torch.from_numpy(read_BS1[:, :-1])
