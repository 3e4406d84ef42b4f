"""Suite generation: how many tokens a second run.c says, against this project's generator and llama.cpp, on one model.

Contestants take turns; each says a few tokens and then many, greedily, and the time between is of the tokens between:
starting a program, reading the file and its checksum are in neither. A ratio is the median over rounds of two
neighbours in time. Seconds of the processor are counted beside those of the clock, for other work on the machine
hardly touches them; of several threads they count all, those that wait too. Weights are random, of which speed knows
nothing; in float32 every contestant has to say the same tokens.

    python -m experiments.bench suite=generation out=experiments/results/generation.jsonl
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.suites.cases import Absent, Case, Wrong
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert import export_c, gguf
from moe.data.tokenizer import train
from moe.errors import BadInput
from moe.eval.generate import generate
from moe.eval.program import compile_program
from moe.model.transformer import Transformer, model_tensors
from moe.run.streamed import in_memory

PROMPT = (84, 111, 32, 98, 101)
# Of run.c by its name in the table: what its matrices are, and how it is compiled beside what docs/two-files.md says.
PROGRAMS = {
    "run.c": ("fp32", ""),
    "int8": ("int8", ""),
    "native": ("fp32", "-march=native"),
    "native int8": ("int8", "-march=native"),
    "OpenMP": ("fp32", "-fopenmp"),
    "OpenMP int8": ("int8", "-fopenmp"),
}
LLAMA_CPP = {"llama.cpp": "float32", "llama.cpp q8_0": "q8_0"}  # and what its matrices are
ROUNDED = ("int8", "q8_0")  # in the names of those that may say other tokens
HEADINGS = ("L D E K F", "torch tokens/s", *PROGRAMS, *LLAMA_CPP)

Say = Callable[[int], list[int]]  # so many greedy tokens behind the prompt


class Shape(NamedTuple):
    """A model as Qwen3-MoE's."""

    n_layers: int
    d_model: int
    n_experts: int
    k: int
    d_expert: int
    vocab: int
    context: int


class Asked(NamedTuple):
    """What is measured."""

    shapes: tuple[Shape, ...]
    few: int
    many: int  # tokens
    rounds: int


class Spent(NamedTuple):
    """Seconds of one token."""

    clock: float
    processor: float


def settings(device: torch.device, full: bool, rounds: int) -> Asked:
    """Two models of 4 and 22 million parameters, or a tiny one. Raises `BadInput` for a GPU, which run.c has not."""
    if device.type != "cpu":
        raise BadInput(f"device={device} means nothing to suite=generation: run.c computes on a CPU; use device=cpu.")
    if not full:
        return Asked((Shape(1, 32, 4, 2, 32, 300, 64),), 1, 57, 1)
    return Asked((Shape(4, 128, 16, 2, 128, 2048, 256), Shape(6, 256, 16, 4, 256, 8192, 256)), 8, 72, rounds)


def cases(asked: Asked) -> Iterator[Case]:
    """A case per model."""
    for shape in asked.shapes:
        yield Case({"suite": "generation", **shape._asdict()}, functools.partial(measured, shape, asked))


def measured(shape: Shape, asked: Asked) -> dict[str, Any]:
    """One row: seconds of a token of every contestant, and how many times as fast as torch it is. Raises `Absent`
    without a C compiler, and `Wrong` where one says other tokens."""
    with tempfile.TemporaryDirectory() as place:
        model = model_of(shape)
        try:
            contestants: dict[str, Say] = {"torch": ours(model), **programs(model, Path(place))}
        except BadInput as error:
            raise Absent(str(error)) from error
        llama, absent = llama_cpp(model, Path(place))
        contestants |= llama
        # What says other tokens is not timed.
        expected = contestants["torch"](asked.many)
        for name, say in contestants.items():
            if not name.endswith(ROUNDED) and say(asked.many) != expected:
                raise Wrong(f"{name} says other tokens than torch")
        rounds = [{name: spent(say, asked) for name, say in contestants.items()} for _ in range(asked.rounds)]
    ratio = lambda name, of: statistics.median(getattr(r["torch"], of) / getattr(r[name], of) for r in rounds)
    middle = lambda name, of: statistics.median(getattr(r[name], of) for r in rounds)
    return {
        "tokens_per_s": {name: 1 / middle(name, "clock") for name in contestants},
        "processor_s": {name: middle(name, "processor") for name in contestants},
        "faster": {name: ratio(name, "clock") for name in contestants},
        "cheaper": {name: ratio(name, "processor") for name in contestants},
        "absent": absent,
        "few": asked.few,
        "many": asked.many,
        "threads": {"torch": torch.get_num_threads(), "OpenMP": cores(), "llama.cpp": 1},
        "xllamacpp": "" if absent else importlib.metadata.version("xllamacpp"),
    }


def model_of(shape: Shape) -> Transformer:
    """Random weights, with which no token ends the text."""
    moe = MoEConfig(shape.n_experts, shape.k, shape.d_expert)
    cfg = ModelConfig(
        vocab_size=shape.vocab, context=shape.context, n_layers=shape.n_layers, d_model=shape.d_model,
        n_heads=shape.d_model // 32, n_kv_heads=max(1, shape.d_model // 64), d_ff=shape.d_model, qk_norm="head",
        init_std=0.1, tie_embeddings=False, moe=moe,
    )  # fmt: skip
    model = Transformer(cfg, RouterConfig()).initialize(0).eval()
    with torch.no_grad():
        model.head.weight[train(TokenizerConfig("byte"), []).eot] = 0
    return model


def ours(model: Transformer) -> Say:
    """moe/eval/generate.py with its cache."""
    return lambda n: list(generate(model, list(PROMPT), n, temperature=0, eot=train(TokenizerConfig("byte"), []).eot))


def programs(model: Transformer, place: Path) -> dict[str, Say]:
    """run.c in every way. Raises `BadInput` where it cannot be compiled."""
    for dtype in ("fp32", "int8"):
        export_c.save(model, train(TokenizerConfig("byte"), []), place / dtype, dtype)
    compiled = {
        flag: compile_program(place / "fp32", *flag.split(), name=f"run{flag}") for _, flag in PROGRAMS.values()
    }
    return {
        name: functools.partial(said, compiled[flag], place / dtype / "model.bin")
        for name, (dtype, flag) in PROGRAMS.items()
    }


def said(program: Path, model: Path, n: int) -> list[int]:
    """The ids that the program prints."""
    options = ["-i", " ".join(map(str, PROMPT)), "-n", str(n), "-t", "0", "--ids"]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores())}
    done = subprocess.run(
        [str(program), str(model), *options], capture_output=True, text=True, check=True, env=environment
    )
    return [int(word) for word in done.stdout.split()]


def llama_cpp(model: Transformer, place: Path) -> tuple[dict[str, Say], str]:
    """llama.cpp on one thread, of the same model as GGUF, where the packages xllamacpp and gguf are installed; and why
    it is not here."""
    missing = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        return {}, f"{' and '.join(missing)} not installed"
    say: dict[str, Say] = {}
    for name, dtype in LLAMA_CPP.items():
        path = place / f"{dtype}.gguf"
        gguf.save(
            in_memory(model_tensors(model)), model.cfg, model.router, train(TokenizerConfig("byte"), []), path, dtype
        )
        say[name] = functools.partial(answered, server_of(path, model.cfg.context))
    return say, ""


def server_of(path: Path, context: int) -> Any:
    """llama.cpp's server in this process, with a cache in float32, as everything here."""
    import xllamacpp  # here, because it is not everywhere

    given = xllamacpp.CommonParams()
    given.model.path, given.verbosity, given.warmup, given.fit_params = str(path), -1, False, False
    given.n_ctx, given.n_parallel, given.n_gpu_layers = context, 1, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(given)


def answered(server: Any, n: int) -> list[int]:
    """Greedy ids from llama.cpp's server; the prompt is read anew each time."""
    always = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
    body = json.dumps(always | {"prompt": list(PROMPT), "n_predict": n}).encode()
    request = urllib.request.Request(f"{server.listening_address}/completion", body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def cores() -> int:
    """Of the processor, that this process may use."""
    return len(os.sched_getaffinity(0))


def spent(say: Say, asked: Asked) -> Spent:
    """Seconds of a token between `few` and `many`."""
    marks = []
    for n in (0, asked.few, asked.many):
        if n:
            say(n)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        marks.append((time.perf_counter(), sum(part.ru_utime + part.ru_stime for part in used)))
    start, few, many = marks
    seconds = [(c - 2 * b + a) / (asked.many - asked.few) for a, b, c in zip(start, few, many, strict=True)]
    return Spent(*(max(x, 1e-9) for x in seconds))  # of a tiny model the clock's own grain may be more


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: by how much a token costs less of the processor than torch's, and by the clock likewise."""
    head = " ".join(str(row[name]) for name in ("n_layers", "d_model", "n_experts", "k", "d_expert"))
    if row["status"] != "measured":
        return head, row.get("error", row["status"])[:60], *[""] * len(PROGRAMS | LLAMA_CPP)
    ratios = [
        f"{row['cheaper'][name]:.2f}× ({row['faster'][name]:.1f}×)" if name in row["cheaper"] else "not here"
        for name in (*PROGRAMS, *LLAMA_CPP)
    ]
    return head, f"{row['tokens_per_s']['torch']:,.0f}", *ratios
