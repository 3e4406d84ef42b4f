"""Which experts every token took, on disk: a trace.

A trace is a folder of three Parquet files, which pandas, Polars, DuckDB and pyarrow read:

tokens.parquet  a row per token: doc, pos (in the document), token, next, domain, window, place (in the window), loss
routes.parquet  a row per token and MoE layer, in that order: token_row, layer, expert, weight, margin, entropy
counts.parquet  a row per layer, domain and expert: rows

Because of the order of routes.parquet, its column `expert` is the [token, layer, K] array that serving engines return
as routed experts. Experts are logical numbers; a negative one is none (`moe.routing.contract`), and pads where tokens
take fewer than K. weight, margin and entropy are float16. What was traced stands in every file's metadata, under
`switchyard`, as JSON. Rows are written batch by batch: a long trace takes no more memory than a short one.

Letters beyond the glossary: L the MoE layers.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.data.owner import temporary
from moe.errors import BadInput
from moe.model.layer import LayerRouting
from moe.model.transformer import Transformer, next_token_loss
from moe.routing.contract import UNUSED, Routing
from moe.run.jsonl import record

SCHEMA = 1  # raised when a column goes or means another thing
KEY = b"switchyard"
ROW_GROUP = 1 << 16  # rows that are written together: what Parquet says of each group is kept in memory to the end
FILES = ("tokens", "routes", "counts")
INSTALL = "pip install 'moe-switchyard[inspect]'"


@dataclass(frozen=True)
class About:
    """What was traced."""

    run: str  # the folder of the run, or of another library's model
    checkpoint: str  # its file, "" for another library's model
    tokenizer: str  # its fingerprint
    vocab_size: int
    context: int  # tokens of a window
    layers: list[int]  # the MoE layers, from 0, among all layers
    n_experts: list[int]  # of each; null, copy and constant experts too
    k: int  # the most experts that a token takes: the width of `expert`
    domains: list[str]
    sampling: str  # which tokens of which text, in words
    what: str = ""  # the same as it was asked for: another trace with this, of the same weights, is the same
    weights: str = ""  # a fingerprint of the model's
    model: dict[str, Any] = field(default_factory=dict)  # settings
    router: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    schema: int = SCHEMA


class Batch(NamedTuple):
    """Windows of text, B of S tokens, and what the model did with them; of L layers and K choices."""

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    domain_BS: np.ndarray
    doc_BS: np.ndarray
    pos_BS: np.ndarray
    loss_BS: np.ndarray
    expert_TLK: np.ndarray
    weight_TLK: np.ndarray
    margin_TL: np.ndarray  # NaN where a router has no scores, and so is entropy
    entropy_TL: np.ndarray


class Recorder:
    """What the routers of a model decide, pass by pass. Use as a context manager."""

    def __init__(self, model: Transformer, k: int) -> None:
        self.model, self.k = model, k
        self.decided: list[Routing] = []

    def __enter__(self) -> "Recorder":
        keep = lambda module, arguments, routing: self.decided.append(routing)
        routers = dict.fromkeys(self.model.routers())  # one that layers share is called by each
        self.hooks = [router.register_forward_hook(keep) for router in routers]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def run(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[np.ndarray, ...]:
        """loss (B, S), expert (T, L, K), weight (T, L, K), margin (T, L), entropy (T, L) of one forward pass."""
        self.decided.clear()
        output = self.model(tokens_BS)
        layers = [self.columns(*pair, tokens_BS.numel()) for pair in zip(output.routing, self.decided, strict=True)]
        columns = (torch.stack(column, 1).cpu().numpy() for column in zip(*layers, strict=True))
        loss_BS = next_token_loss(output.logits_BSV, targets_BS, reduction="none")
        return loss_BS.float().cpu().numpy(), *columns

    def columns(self, routing: LayerRouting, decided: Routing, n_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """expert and weight (T, K), margin and entropy (T,) of one layer."""
        expert_TK, weight_TK = padded(routing, n_tokens, self.k)
        margin_T, entropy_T = (torch.full((n_tokens,), torch.nan) for _ in range(2))
        if decided.logits_TE is not None:
            prob_TE = decided.prob_TE().double()
            top_TK = prob_TE.topk(min(self.k + 1, prob_TE.shape[1])).values
            token_T = torch.arange(n_tokens)
            if len(prob_TE) < n_tokens:  # those that entered the block at all
                token_T = (expert_TK != UNUSED).any(-1).nonzero().flatten()
            margin_T[token_T] = (top_TK[:, -2] - top_TK[:, -1]).float() if top_TK.shape[1] > self.k else 0.0
            entropy_T[token_T] = torch.special.entr(prob_TE).sum(-1).float()
        return expert_TK, weight_TK, margin_T, entropy_T


def padded(routing: LayerRouting, n_tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """A layer's experts and weights as (T, K), whatever the family of its router: rows in a token's order, the rest
    `UNUSED` with weight 0."""
    expert, weight = routing.expert, routing.weight.float()
    if routing.token_N is None:
        short = k - expert.shape[1]
        return nn.functional.pad(expert, (0, short), value=UNUSED), nn.functional.pad(weight, (0, short))
    token_N = routing.token_N
    first_T = torch.searchsorted(token_N, torch.arange(n_tokens))
    slot_N = torch.arange(len(token_N)) - first_T[token_N]
    expert_TK = torch.full((n_tokens, k), UNUSED, dtype=expert.dtype)
    expert_TK[token_N, slot_N] = expert
    return expert_TK, torch.zeros(n_tokens, k).index_put((token_N, slot_N), weight)


class Writer:
    """Writes a trace beside `folder` and renames it when all is there. Use as a context manager. Raises `BadInput`
    where it cannot be written, and without pyarrow."""

    def __init__(self, folder: Path, about: About) -> None:
        self.pa, self.parquet = _pyarrow()
        if folder.exists():
            raise BadInput(f"out={folder} exists: choose another, or move it away.")
        self.folder, self.about, self.beside = folder, about, temporary(folder)
        self.n_tokens = self.n_windows = 0
        self.waiting: dict[str, list[Any]] = {name: [] for name in FILES}
        self.rows = {
            layer: np.zeros((len(about.domains), n), np.int64)
            for layer, n in zip(about.layers, about.n_experts, strict=True)
        }

    def __enter__(self) -> "Writer":
        try:
            self.beside.mkdir(parents=True)
            self.writers = {
                name: self.parquet.ParquetWriter(self.beside / f"{name}.parquet", schema)
                for name, schema in self._schemas().items()
            }
        except OSError as error:
            raise BadInput(f"out={self.folder} cannot be written ({error.strerror or error}).") from error
        return self

    def _schemas(self) -> dict[str, Any]:
        """The columns of every file, with what was traced."""
        pa, k = self.pa, self.about.k
        expert = pa.int16() if max(self.about.n_experts) <= 2**15 else pa.int32()
        columns = {
            "tokens": [
                ("doc", pa.int32()), ("pos", pa.int32()), ("token", pa.int32()), ("next", pa.int32()),
                ("domain", pa.dictionary(pa.int32(), pa.string())), ("window", pa.int32()), ("place", pa.int32()),
                ("loss", pa.float32()),
            ],
            "routes": [
                ("token_row", pa.int64()), ("layer", pa.int16()), ("expert", pa.list_(expert, k)),
                ("weight", pa.list_(pa.float16(), k)), ("margin", pa.float16()), ("entropy", pa.float16()),
            ],
            "counts": [("layer", pa.int16()), ("domain", pa.string()), ("expert", expert), ("rows", pa.int64())],
        }  # fmt: skip
        metadata = {KEY: json.dumps(asdict(self.about)).encode()}
        return {name: pa.schema(fields, metadata=metadata) for name, fields in columns.items()}

    def add(self, batch: Batch) -> None:
        """Write a batch of windows."""
        pa, about, (b, s) = self.pa, self.about, batch.tokens_BS.shape
        n_layers, k, t = len(about.layers), about.k, batch.tokens_BS.size
        schemas = {name: writer.schema for name, writer in self.writers.items()}

        # Tokens, in the order of the text.
        window_BS = np.repeat(np.arange(b)[:, None] + self.n_windows, s, 1)
        dictionary = pa.DictionaryArray.from_arrays(pa.array(batch.domain_BS.ravel(), pa.int32()), about.domains)
        columns = [batch.doc_BS, batch.pos_BS, batch.tokens_BS, batch.targets_BS]
        arrays = [pa.array(column.ravel(), pa.int32()) for column in columns]
        place_BS = np.tile(np.arange(s), (b, 1))
        arrays += [dictionary, *(pa.array(column.ravel(), pa.int32()) for column in (window_BS, place_BS))]
        arrays += [pa.array(batch.loss_BS.ravel(), pa.float32())]
        self._write("tokens", pa.table(arrays, schema=schemas["tokens"]))

        # Routes: token by token, layer by layer.
        lists = lambda values, kind: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), k)
        expert = schemas["routes"].field("expert").type.value_type
        half = lambda values: pa.array(values.ravel().astype(np.float16), pa.float16())
        arrays = [
            pa.array(np.repeat(np.arange(t) + self.n_tokens, n_layers), pa.int64()),
            pa.array(np.tile(about.layers, t), pa.int16()),
            lists(batch.expert_TLK, expert),
            pa.FixedSizeListArray.from_arrays(half(batch.weight_TLK), k),
            half(batch.margin_TL),
            half(batch.entropy_TL),
        ]
        self._write("routes", pa.table(arrays, schema=schemas["routes"]))

        # Rows by domain and expert.
        for i, layer in enumerate(about.layers):
            expert_TK = batch.expert_TLK[:, i]
            taken = expert_TK >= 0
            domain_TK = np.repeat(batch.domain_BS.ravel()[:, None], k, 1)
            np.add.at(self.rows[layer], (domain_TK[taken], expert_TK[taken]), 1)
        self.n_tokens += t
        self.n_windows += b

    def _write(self, name: str, table: Any, last: bool = False) -> None:
        """Keep a table until there are rows for a group, or it is the last one, and write them."""
        waiting = self.waiting[name]
        waiting.append(table)
        if not last and sum(len(table) for table in waiting) < ROW_GROUP:
            return
        try:
            self.writers[name].write_table(self.pa.concat_tables(waiting))
            waiting.clear()
        except OSError as error:
            raise BadInput(f"out={self.folder} cannot be written ({error.strerror or error}).") from error

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                for name, writer in self.writers.items():
                    rest = self._counts() if name == "counts" else writer.schema.empty_table()
                    self._write(name, rest, last=True)
            for writer in self.writers.values():
                writer.close()
            if kind is None:
                self.beside.rename(self.folder)
        except OSError as failure:
            raise BadInput(f"out={self.folder} cannot be written ({failure.strerror or failure}).") from failure
        finally:
            shutil.rmtree(self.beside, ignore_errors=True)

    def _counts(self) -> Any:
        """The table of rows by layer, domain and expert."""
        rows = [
            (layer, domain, e, int(n))
            for layer, count_YE in self.rows.items()
            for domain, count_E in zip(self.about.domains, count_YE, strict=True)
            for e, n in enumerate(count_E)
        ]
        columns = zip(*rows, strict=True)
        schema = self.writers["counts"].schema
        return self.pa.table([self.pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


class Trace:
    """A trace that was written. Raises `BadInput` for a folder that is none, is damaged, or is of a newer version."""

    def __init__(self, folder: Path) -> None:
        self.pa, self.parquet = _pyarrow()
        self.folder = folder
        self.files = {name: self._open(name) for name in FILES}
        self.about = self._about("tokens")
        for name in FILES[1:]:
            if self._about(name) != self.about:
                raise BadInput(f"{folder / name}.parquet is of another trace than tokens.parquet beside it.")
        self.n_tokens = self.files["tokens"].metadata.num_rows
        n_routes, n_layers = self.files["routes"].metadata.num_rows, len(self.about.layers)
        if n_routes != self.n_tokens * n_layers:
            raise BadInput(
                f"{folder / 'routes.parquet'} is damaged: it has {n_routes} rows, and {self.n_tokens} tokens in "
                f"{n_layers} layers make {self.n_tokens * n_layers}."
            )

    def _open(self, name: str) -> Any:
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            raise BadInput(f"{self.folder} is no trace: it has no {path.name}; python -m experiments.trace makes one.")
        try:
            return self.parquet.ParquetFile(path, memory_map=True)
        except (OSError, self.pa.ArrowException) as error:
            raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}.") from error

    def _about(self, name: str) -> About:
        path, metadata = self.folder / f"{name}.parquet", self.files[name].schema_arrow.metadata or {}
        if KEY not in metadata:
            raise BadInput(f"{path} is no part of a trace: it says nothing of what was traced.")
        tree = json.loads(metadata[KEY])
        if tree.get("schema", 0) > SCHEMA:
            raise BadInput(f"{path} was written by a newer version (schema {tree['schema']}; this one reads {SCHEMA}).")
        return record(About, tree, str(path))

    def table(self, name: str, columns: list[str] | None = None) -> Any:
        """A file as a pyarrow table."""
        return self.files[name].read(columns)

    def experts(self) -> np.ndarray:
        """(T, L, K): every token's experts in every layer."""
        flat = self.table("routes", ["expert"])["expert"].combine_chunks().flatten().to_numpy()
        expert_TLK = flat.reshape(self.n_tokens, len(self.about.layers), self.about.k)
        for i, n_experts in enumerate(self.about.n_experts):
            if len(flat) and expert_TLK[:, i].max() >= n_experts:
                raise BadInput(
                    f"{self.folder / 'routes.parquet'} names expert {expert_TLK[:, i].max()} in layer "
                    f"{self.about.layers[i]}, which has {n_experts}."
                )
        return expert_TLK

    def batches(self, rows: int = 65536) -> Iterator[Any]:
        """routes.parquet in parts of at most so many rows."""
        return self.files["routes"].iter_batches(rows)  # type: ignore[no-any-return]

    @cached_property
    def counts(self) -> list[np.ndarray]:
        """Of every MoE layer, rows by domain and expert (Y, E)."""
        rows = self.table("counts")["rows"].to_numpy()
        sizes = [len(self.about.domains) * n for n in self.about.n_experts]
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        return [part.reshape(len(self.about.domains), -1) for part in parts]


def _pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet part. Raises `BadInput` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"a trace needs pyarrow, which is not installed: {INSTALL}.") from None
    return pyarrow, pyarrow.parquet
