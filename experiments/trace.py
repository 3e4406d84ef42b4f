"""Write down which experts every token takes: a trace, in Parquet.

    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/trace                        # its validation text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/mine text=notes.txt          # a text of one's own
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/all tokens=0                 # all of the text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/serve export=true            # and arrays for engines
    python -m experiments.trace hf=FOLDER out=runs/theirs                                     # a model of transformers
    python -m experiments.trace hf=FOLDER out=runs/large stream=true                          # one layer at a time
    python -m experiments.trace records=FILE format=sglang out=runs/served                    # what an engine recorded

What is in the folder: moe/analysis/trace.py. `export` also writes routed_experts.npz, the [token, layer, K] array
(int32) that serving engines return, with the token ids, and expert_counts.npy, (layer, expert), which EPLB takes.

The text of a model of transformers is the validation text of `data=`, by the folder's own tokenizer. A folder without
one that can be read takes token ids: `text=IDS.npy`. With `stream=true` a model may be far larger than memory: what
that takes says `python -m experiments.plan trace=...`. Formats of records: moe/analysis/records.py.
"""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from experiments import cli
from moe.analysis import records
from moe.analysis.by_layer import trace_by_layer
from moe.analysis.trace import About, Batch, Recorder, Trace, Writer
from moe.analysis.windows import LONGEST, Windows, of_corpus, of_ids, of_text
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.model import layer_moe, moe_layers
from moe.config.parse import OneOf, to_dict
from moe.config.router import RouterConfig, facts
from moe.convert import hf_weights
from moe.convert.hf_config import read_config
from moe.convert.hf_stream import Parts
from moe.convert.hf_tokenizer import read_tokenizer
from moe.data.prepare import prepare
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run import machine, terminal
from moe.run.load import find_checkpoint, load_run

SOURCES = ("run", "hf", "records")


@dataclass
class TraceConfig:
    """What to trace, and where to write it."""

    run: str = ""  # a run's folder
    which: str = "best"  # run: best (lowest validation loss) | last | step-N
    hf: str = ""  # instead of a run: a folder of transformers, of any family with experts that import_hf reads
    stream: bool = False  # hf: one layer in memory at a time
    records: str = ""  # instead of a run: a file that a serving engine or Megatron recorded
    format: str = ""  # records: sglang | vllm | megatron
    n_experts: int = 0  # records: of a layer; 0: as many as the largest number in the file tells
    out: str = ""  # the folder to write
    text: str = ""  # a file of UTF-8 text, one document, or of token ids (.npy); "": the validation text of `data`
    data: DataConfig = field(default_factory=DataConfig)  # a corpus; not given: the run's own, or the blend
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    context: int = 0  # tokens of a window; 0: the model's own, of one of transformers at most 512
    batch_size: int = 0  # windows at a time; 0: as many as have 1,024 tokens
    export: bool = False  # also write arrays for serving engines
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            tail = "" if not given else f", and {' and '.join(given)} are given"
            raise BadInput(f"run=... is needed, or hf=... or records=..., one of them: what to trace{tail}.")
        if not self.out:
            raise BadInput("out=... is needed: a folder to write.")
        if bool(self.records) != bool(self.format):
            raise BadInput("records=FILE and format=sglang, vllm or megatron go together.")
        if self.format:
            OneOf(*records.READERS).check("format", self.format)
        if self.stream and not self.hf:
            raise BadInput("stream=true is of hf=...: a run is loaded whole.")
        for name in ("tokens", "context", "batch_size", "n_experts"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name}={getattr(self, name)} is out of range: accepted is at least 0.")


@cli.command("trace", TraceConfig, verbatim=(*SOURCES, "out", "text"))
def main(cfg: TraceConfig) -> None:
    """Trace, and say what was written."""
    folder = Path(cfg.out)
    if cfg.records:
        writer = records.write_trace(Path(cfg.records), cfg.format, folder, cfg.n_experts)
    else:
        writer = trace_run(cfg) if cfg.run else trace_hf(cfg)
    n_layers, sampling = len(writer.about.layers), writer.about.sampling
    terminal.say(f"trace: {folder}, {writer.n_tokens:,} tokens in {n_layers} MoE layers, {sampling}")
    if cfg.export:
        export(folder)


def trace_run(cfg: TraceConfig) -> Writer:
    """Trace a run of this project's."""
    run = Path(cfg.run)
    model, tokenizer, run_cfg = load_run(run, cfg.which, cfg.trust)
    check(f"run={run}", model, run_cfg.router)
    data, settings = run_cfg.data, run_cfg.tokenizer
    if any(key == "data" or key.startswith("data.") for key in cli.keys_given()):
        data, settings = cfg.data, TokenizerConfig("saved", path=str(run))
    windows = windows_of(cfg, model, tokenizer, data, settings, cfg.context or model.cfg.context)
    about = about_of(str(run), find_checkpoint(run / "checkpoints", cfg.which).name, model, tokenizer, windows)
    return trace_whole(Path(cfg.out), model, windows, about)


def trace_hf(cfg: TraceConfig) -> Writer:
    """Trace a model in a folder of transformers, whole or layer by layer."""
    folder = Path(cfg.hf)
    settings, router = read_config(folder)
    with torch.device("meta"):
        model = Transformer(settings, router)
    check(f"hf={folder}", model, router)
    # The text comes first: the weights may take long.
    tokenizer = tokenizer_of(cfg, folder, settings.vocab_size)
    with tempfile.TemporaryDirectory() as place:
        if tokenizer:
            (Path(place) / "tokenizer").mkdir()
            tokenizer.save(Path(place) / "tokenizer")
        context = cfg.context or min(settings.context, LONGEST)
        windows = windows_of(cfg, model, tokenizer, cfg.data, TokenizerConfig("saved", path=place), context)
    about = about_of(str(folder), "", model, tokenizer, windows)
    if not cfg.stream:
        return trace_whole(Path(cfg.out), hf_weights.load(folder).eval(), windows, about)
    machine.return_freed_memory()
    parts = Parts(folder)
    with Writer(Path(cfg.out), about) as writer:
        trace_by_layer(parts.model, parts.held, windows, writer, terminal.say)
    return writer


def check(source: str, model: Transformer, router: RouterConfig) -> None:
    """Raise `BadInput` for a model without routes."""
    if model.cfg.moe is None:
        raise BadInput(f"{source} is a dense model: it has no experts to trace.")
    if facts(router).choices == "mixture":
        raise BadInput(f"{source} has a soft router: every token goes to every expert, and there is nothing to trace.")


def tokenizer_of(cfg: TraceConfig, folder: Path, vocab_size: int) -> Tokenizer | None:
    """The folder's tokenizer; None where it has none that can be read and the text is token ids. Raises `BadInput`
    where it is needed, or has more tokens than the model."""
    try:
        tokenizer, differences = read_tokenizer(folder)
    except BadInput as error:
        if Path(cfg.text).suffix == ".npy":
            return None
        raise BadInput(f"{str(error).rstrip('.')}; without it a trace takes token ids: text=IDS.npy.") from error
    for difference in differences:
        terminal.say(f"warning: {difference}")
    if tokenizer.vocab_size > vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {vocab_size}."
        )
    return tokenizer


def windows_of(
    cfg: TraceConfig,
    model: Transformer,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    settings: TokenizerConfig,
    context: int,
) -> Windows:
    """The text that is asked for. Raises `BadInput` for windows that are longer than the model reads."""
    if context > model.cfg.context:
        raise BadInput(f"context={context} is out of range: the model reads at most {model.cfg.context} tokens.")
    sizes = context, cfg.batch_size, cfg.tokens
    path = Path(cfg.text)
    if path.suffix == ".npy":
        return of_ids(path, model.cfg.vocab_size, *sizes)
    if cfg.text:
        assert tokenizer, "a text needs a tokenizer"
        return of_text(path, tokenizer, *sizes)
    return of_corpus(prepare(data, settings, terminal.say), *sizes)


def trace_whole(folder: Path, model: Transformer, windows: Windows, about: About) -> Writer:
    """Trace a model that is in memory."""
    with Writer(folder, about) as writer, Recorder(model, about.k) as recorder:
        for read_BS1, domain_BS, doc_BS, pos_BS in windows:
            tokens_BS, targets_BS = read_BS1[:, :-1], read_BS1[:, 1:]
            columns = recorder.run(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
            writer.add(Batch(tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, *columns))
    return writer


def about_of(run: str, checkpoint: str, model: Transformer, tokenizer: Tokenizer | None, windows: Windows) -> About:
    """What is traced, for the files' metadata."""
    layers = moe_layers(model.cfg)
    moes = [layer_moe(model.cfg, layer) for layer in layers]
    n_experts = [moe.n_experts + moe.n_cheap for moe in moes]
    fixed_k = all(router.fixed_k for router in model.routers())
    return About(
        run=run,
        checkpoint=checkpoint,
        tokenizer=tokenizer.fingerprint if tokenizer else "",
        vocab_size=model.cfg.vocab_size,
        context=windows.context,
        layers=layers,
        n_experts=n_experts,
        k=max(moe.k for moe in moes) if fixed_k else max(n_experts),
        domains=windows.domains,
        sampling=windows.sampling,
        model=to_dict(model.cfg),
        router=dataclasses.asdict(model.router),
        commit=machine.git_state().commit,
    )


def export(folder: Path) -> None:
    """Write the arrays that serving engines take beside a trace's files."""
    trace = Trace(folder)
    tokens = trace.table("tokens", ["token"])["token"].to_numpy().astype(np.int32)
    np.savez(folder / "routed_experts.npz", routed_experts=trace.experts().astype(np.int32), input_ids=tokens)
    widest = max(trace.about.n_experts)
    counts = np.stack([np.pad(c.sum(0), (0, widest - c.shape[1])) for c in trace.counts])
    np.save(folder / "expert_counts.npy", counts)
    terminal.say(f"arrays: {folder / 'routed_experts.npz'}, {folder / 'expert_counts.npy'}")


if __name__ == "__main__":
    main()
