"""A transformers folder's model in less memory than it takes: tensor by tensor, or part by part.

    tensors = Parts(Path("OLMoE-1B-7B")).tensors()
    tensors["blocks.3.mlp.experts.w_up_EFD"]  # read now, and kept by nobody here

    folder = Parts(Path("OLMoE-1B-7B"))
    with folder.held(folder.model.blocks[3]):
        ...  # this block computes; all others have shapes alone

What is read is what `hf_weights.load` would have given, bit by bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.convert.hf_config import read_folder
from moe.convert.hf_stored import read
from moe.convert.hf_weights import check_equal, check_tied, copy_into, places, views_of, weight_files, widest
from moe.errors import BadInput
from moe.model.rope import rotary
from moe.model.transformer import Transformer, model_tensors
from moe.run.streamed import Tensors


class Piece(NamedTuple):
    """What a folder's tensor gives to one of this model's: some of its last dimension, and the view that it fills."""

    name: str
    columns: slice
    view: Tensor  # without memory


class Parts:
    """The model in a folder, in float32, on the CPU. `model` has its shapes and no weights until they are held.

    Raises `BadInput` as `hf_weights.load` does: everything is checked against the files' headers at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family, cfg, router = read_folder(folder)
        self.places = places(weight_files(folder))
        self.shapes = {name: place.shape for name, place in self.places.items()}
        with torch.device("meta"):
            self.model = Transformer(cfg, router).eval()
        try:
            views_of(self.shapes, self.model, self.family)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from error
        if cfg.position == "rope":
            self.model.cos_Sd, self.model.sin_Sd = rotary(cfg)

    @contextmanager
    @torch.no_grad()
    def held(self, *parts: nn.Module) -> Iterator[None]:
        """Inside, these parts of `model` have their weights. Raises `BadInput` for a file that was cut short since."""
        for part in parts:
            part.to_empty(device="cpu")
        try:
            views = views_of(self.shapes, self.model, self.family)
            for name in views:
                if views[name][0].device.type == "cpu":
                    copy_into(self.read(name), views[name])
            if self.model.embed.weight.device.type == "cpu":
                check_tied(views, self.model)
            del views
            yield
        finally:
            for part in parts:
                part.to("meta")

    def read(self, name: str) -> Tensor:
        """A tensor of the folder, in its own dtype. Raises `BadInput` where the file ends before it does."""
        return read(name, self.places[name])

    def tensors(self) -> Tensors:
        """This model's tensors, a tied one once, in the widest dtype of the folder's. Reading one reads those of the
        folder that fill it; raises `BadInput` as `read`, and for a head that is not the embedding it is tied to."""
        dtype = widest(self.places)
        meta = {name: tensor.to(dtype) for name, tensor in model_tensors(self.model).items()}
        # A folder's tensor is a view of one of this model's, or several side by side: which, their memory says.
        name_of = {tensor.untyped_storage()._cdata: name for name, tensor in model_tensors(self.model).items()}
        head = "lm_head.weight" if self.model.cfg.tie_embeddings else None  # only compared
        pieces: dict[str, list[Piece]] = {name: [] for name in meta}
        for name, views in views_of(self.shapes, self.model, self.family).items():
            end = 0
            for view in views if name != head else ():
                start, end = end, end + view.shape[-1]
                pieces[name_of[view.untyped_storage()._cdata]].append(Piece(name, slice(start, end), view))

        def read(name: str) -> Tensor:
            ours = torch.empty(meta[name].shape, dtype=dtype)
            for piece in pieces[name]:
                view = ours.as_strided(piece.view.size(), piece.view.stride(), piece.view.storage_offset())
                view.copy_(self.read(piece.name)[..., piece.columns].reshape(view.shape))
            if name == "embed.weight" and head in self.shapes:
                check_equal(self.read(head).to(dtype), ours)
            return ours

        return Tensors(meta, read)
