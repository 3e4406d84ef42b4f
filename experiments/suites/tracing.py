"""Suite tracing: the memory that a trace takes, as it grows longer, and of a folder larger than the memory it may have.

Each trace is made by `python -m experiments.trace` in a process of its own, of a folder of transformers with random
weights and of random token ids. Its memory is the peak of the resident set, libraries included (`VmHWM`). Under a limit
the process may not allocate more than that (`RLIMIT_DATA`), whether it is resident or not; Arrow then allocates as it
needs instead of reserving a GB of addresses.

    python -m experiments.bench suite=tracing out=experiments/results/tracing.jsonl
"""

import functools
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.suites.cases import Case
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_config import config_to_hf
from moe.convert.hf_weights import tensor_map
from moe.model.cost import flops
from moe.model.transformer import Transformer
from moe.run.jsonl import to_text

HEADINGS = ("tokens", "folder", "layers", "allowed", "peak memory", "seconds", "GFLOP/s")
LIMIT = 2_000_000_000  # bytes


class Traced(NamedTuple):
    """A model of OLMoE's form and what is traced of it; sizes by the glossary's letters."""

    tokens: int
    layers: int = 2
    d: int = 16
    heads: int = 2
    experts: int = 8
    k: int = 2
    f: int = 16
    vocab: int = 64
    context: int = 128
    stream: bool = False
    limit: int = 0  # bytes that the process may allocate; 0: as many as it likes

    def model(self) -> ModelConfig:
        """The model's settings."""
        moe = MoEConfig(n_experts=self.experts, k=self.k, d_expert=self.f)
        shape = dict(n_layers=self.layers, d_model=self.d, n_heads=self.heads, d_ff=self.f, moe=moe)
        return ModelConfig("traced", self.vocab, self.context, qk_norm="full", tie_embeddings=False, **shape)  # type: ignore[arg-type]


# OLMoE-1B-7B with experts half as wide, and 10 layers of its 16.
LARGE = Traced(8192, 10, 2048, 16, 64, 8, 512, 50304, 512, stream=True, limit=LIMIT)
FULL = (*(Traced(10**n) for n in (4, 5, 6, 7)), LARGE)
SMOKE = (Traced(200), Traced(300, stream=True, limit=LIMIT))


def settings(device: torch.device, full: bool, rounds: int) -> tuple[Traced, ...]:
    """The traces of a run of the suite."""
    return FULL if full else SMOKE


def cases(traces: tuple[Traced, ...]) -> Iterator[Case]:
    """A case per trace."""
    for traced in traces:
        yield Case({"suite": "tracing", **traced._asdict()}, functools.partial(measured, traced))


def measured(traced: Traced) -> dict[str, Any]:
    """A row's numbers: bytes of the folder and of the process at its peak, seconds and FLOPs."""
    with tempfile.TemporaryDirectory() as place:
        folder, ids = Path(place, "folder"), Path(place, "ids.npy")
        write_folder(folder, traced.model())
        np.save(ids, np.random.default_rng(0).integers(0, traced.vocab, traced.tokens + 1, dtype=np.int32))
        words = [f"hf={folder}", f"text={ids}", f"out={Path(place, 'trace')}", "tokens=0", f"context={traced.context}"]
        command = [sys.executable, "-m", "experiments.suites.tracing", str(traced.limit), *words]
        start = time.perf_counter()
        environment = os.environ | ({"ARROW_DEFAULT_MEMORY_POOL": "system"} if traced.limit else {})
        done = subprocess.run([*command, f"stream={traced.stream}"], capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - start
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    result = json.loads(done.stdout.splitlines()[-1])
    total = flops(traced.model()).evaluation * (traced.tokens // traced.context * traced.context)
    return {"folder": n_bytes, "peak": result["peak"], "flops": total, "seconds_traced": seconds}


@torch.no_grad()
def write_folder(folder: Path, cfg: ModelConfig) -> None:
    """A folder of transformers with random weights in bf16, a file per block and one for the rest, each written before
    the next one is drawn."""
    router = RouterConfig(renormalize=False)
    tree = config_to_hf(cfg, router) | {"torch_dtype": "bfloat16"}
    with torch.device("meta"):
        views = dict(tensor_map(Transformer(cfg, router).state_dict(), cfg, tree["model_type"]))
    shards: dict[str, list[str]] = {}
    for name in views:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    # Norms are 1; matrices have the deviation that training begins with.
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for part, names in shards.items():
        tensors = {}
        for name in names:
            (view,) = views[name]
            values = torch.ones(view.shape, dtype=torch.bfloat16)
            tensors[name] = values if view.dim() == 1 else values.normal_(0, cfg.init_std, generator=generator)
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(to_text({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(to_text(tree))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    if row["status"] != "measured":
        return (f"{row['tokens']:,}", row.get("error", row["status"]), *[""] * (len(HEADINGS) - 2))
    return (
        f"{row['tokens']:,}",
        f"{row['folder'] / 1e9:,.2f} GB" if row["folder"] > 1e8 else f"{row['folder'] / 1e6:,.2f} MB",
        f"{row['layers']}, one at a time" if row["stream"] else f"{row['layers']}",
        f"{row['limit'] / 1e6:,.0f} MB" if row["limit"] else "",
        f"{row['peak'] / 1e6:,.0f} MB",
        f"{row['seconds_traced']:,.0f}",
        f"{row['flops'] / row['seconds_traced'] / 1e9:,.1f}" if row["stream"] else "",
    )


def _trace(limit: int, words: list[str]) -> None:
    """Run the command under a limit in this process, and print its peak."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = ["trace", *words]
    runpy.run_module("experiments.trace", run_name="__main__")
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    _trace(int(sys.argv[1]), sys.argv[2:])
