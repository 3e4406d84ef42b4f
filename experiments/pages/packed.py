"""Arrays inside a page: one compressed block of bytes, and what in it is where.

A page that opens from disk cannot read a file beside it, and numbers as JSON take several times the room. The browser
inflates the block (`DecompressionStream`) and lays typed arrays over it: see `unpack` in inspector.js.
"""

import base64
import gzip
from typing import Any

import numpy as np

KINDS = {"uint8": "Uint8Array", "uint16": "Uint16Array", "int16": "Int16Array", "int32": "Int32Array",
         "uint32": "Uint32Array", "float32": "Float32Array"}  # fmt: skip
ALIGNED = 8  # bytes: where an array may begin


class Pack:
    """Arrays by name."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.directory: dict[str, dict[str, Any]] = {}
        self.size = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """One more. Raises `ValueError` for numbers that a browser has no array of, and for a name that is taken."""
        if array.dtype.name not in KINDS or name in self.directory:
            raise ValueError(f"{name} is {array.dtype}: accepted are new names, and {', '.join(KINDS)}")
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        where = {"kind": KINDS[array.dtype.name], "shape": list(array.shape), "at": self.size}
        self.directory[name] = where
        self.parts += [data, bytes(-len(data) % ALIGNED)]
        self.size += len(data) + len(self.parts[-1])

    def text(self) -> str:
        """The block, compressed, as base64."""
        return base64.b64encode(gzip.compress(b"".join(self.parts), 6, mtime=0)).decode()


def index_kind(largest: int) -> np.dtype[Any]:
    """The smallest kind of number that counts to `largest`."""
    return np.dtype(np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.uint32)
