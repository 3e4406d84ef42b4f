"""Trace a model: read text, run the model over it, and write down what its routers decide. Of a run, or of a folder of
transformers, whole or one layer at a time."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.analysis.by_layer import trace_by_layer
from moe.analysis.trace import About, Batch, Recorder, Writer
from moe.analysis.windows import LONGEST, Windows, of_corpus, of_ids, of_text
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.model import ModelConfig, layer_moe, moe_layers
from moe.config.parse import to_dict
from moe.config.router import RouterConfig, facts
from moe.config.run import Config
from moe.convert import hf_weights
from moe.convert.hf_config import read_config
from moe.convert.hf_stream import Parts
from moe.convert.hf_tokenizer import read_tokenizer
from moe.data.prepare import prepare
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run import machine, terminal
from moe.run.checkpoint import MANIFEST
from moe.run.load import find_checkpoint, load_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class What:
    """Which text is traced."""

    text: str = ""  # a file of UTF-8 text, one document, or of token ids (.npy); "": the validation text of `data`
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    batch_size: int = 0  # windows at a time; 0: as many as have 1,024 tokens
    context: int = 0  # tokens of a window; 0: the model's own, of one of transformers at most 512
    data: DataConfig | None = None  # a corpus; None: the run's own, or the blend

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "context"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name}={getattr(self, name)} is out of range: accepted is at least 0.")

    def key(self) -> str:
        """Another `What` with this key is the same text: of a file its place, size and age count."""
        of = "validation text"
        if self.data:
            of += f" of {to_dict(self.data)}"
        if self.text:
            try:
                stat = Path(self.text).stat()
            except OSError as error:
                raise BadInput(f"text={self.text} cannot be read ({error.strerror or error}).") from error
            of = f"{Path(self.text).resolve()}, {stat.st_size} bytes of {stat.st_mtime_ns}"
        return f"{of}, {self.tokens} tokens by {self.context or 'the model’s own'}"


def trace_run(run: Path, which: str, what: What, folder: Path, trust: bool = False) -> Writer:
    """Trace the run in `run` at the checkpoint `which` and write the trace to `folder`. Raises `BadInput` for a dense
    model, a soft router, and what `load_run` and `Writer` refuse."""
    model, tokenizer, cfg = load_run(run, which, trust)
    check(f"run={run}", model, cfg.router)
    windows, checkpoint = windows_of_run(what, cfg, tokenizer), find_checkpoint(run / "checkpoints", which)
    about = about_of(str(run), checkpoint.name, model, tokenizer, windows, what, weights_in(checkpoint))
    return trace_whole(folder, model, windows, about)


def trace_hf(source: Path, what: What, folder: Path, stream: bool = False, say: Say = terminal.say) -> Writer:
    """Trace the model in a folder of transformers; with `stream` one layer of it is in memory at a time. Raises
    `BadInput` for a dense model, and what `read_config`, `hf_weights.load` and `Writer` refuse."""
    settings, router = read_config(source)
    with torch.device("meta"):
        model = Transformer(settings, router)
    check(f"hf={source}", model, router)
    # The text comes first: the weights may take long.
    tokenizer = tokenizer_of(what, source, settings.vocab_size, say)
    windows = windows_of_hf(what, tokenizer, settings, say)
    about = about_of(str(source), "", model, tokenizer, windows, what, weights_in(source))
    if not stream:
        return trace_whole(folder, hf_weights.load(source).eval(), windows, about)
    machine.return_freed_memory()
    parts = Parts(source)
    with Writer(folder, about) as writer:
        trace_by_layer(parts.model, parts.held, windows, writer, say)
    return writer


def windows_of_run(what: What, cfg: Config, tokenizer: Tokenizer, say: Say = terminal.say) -> Windows:
    """The text that is asked for, as a run's model reads it."""
    data, settings = cfg.data, cfg.tokenizer
    if what.data:  # the run's tokenizer, whatever it was learnt from
        data, settings = what.data, TokenizerConfig("saved", path=cfg.run)
    return windows_of(what, cfg.model, tokenizer, data, settings, what.context or cfg.model.context, say)


def windows_of_hf(what: What, tokenizer: Tokenizer | None, model: ModelConfig, say: Say = terminal.say) -> Windows:
    """The text that is asked for, as the model of a folder of transformers reads it; its tokenizer as in
    `tokenizer_of`."""
    with tempfile.TemporaryDirectory() as place:
        if tokenizer:
            (Path(place) / "tokenizer").mkdir()
            tokenizer.save(Path(place) / "tokenizer")
        context = what.context or min(model.context, LONGEST)
        saved = TokenizerConfig("saved", path=place)
        return windows_of(what, model, tokenizer, what.data or DataConfig(), saved, context, say)


def check(source: str, model: Transformer, router: RouterConfig) -> None:
    """Raise `BadInput` for a model without routes."""
    if model.cfg.moe is None:
        raise BadInput(f"{source} is a dense model: it has no experts to trace.")
    if facts(router).choices == "mixture":
        raise BadInput(f"{source} has a soft router: every token goes to every expert, and there is nothing to trace.")


def tokenizer_of(what: What, folder: Path, vocab_size: int, say: Say = terminal.say) -> Tokenizer | None:
    """The tokenizer of a folder of transformers; None where it has none that can be read and the text is token ids.
    Raises `BadInput` where it is needed, or has more tokens than the model."""
    try:
        tokenizer, differences = read_tokenizer(folder)
    except BadInput as error:
        if Path(what.text).suffix == ".npy":
            return None
        raise BadInput(f"{str(error).rstrip('.')}; without it the text is token ids: text=IDS.npy.") from error
    for difference in differences:
        say(f"warning: {difference}")
    if tokenizer.vocab_size > vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {vocab_size}."
        )
    return tokenizer


def windows_of(
    what: What,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    settings: TokenizerConfig,
    context: int,
    say: Say,
) -> Windows:
    """The text that is asked for. Raises `BadInput` for windows that are longer than the model reads."""
    check_context(context, model)
    sizes = context, what.batch_size, what.tokens
    path = Path(what.text)
    if path.suffix == ".npy":
        return of_ids(path, model.vocab_size, *sizes)
    if what.text:
        assert tokenizer, "a text needs a tokenizer"
        return of_text(path, tokenizer, *sizes)
    return of_corpus(prepare(data, settings, say), *sizes, data.whole())


def check_context(context: int, model: ModelConfig) -> None:
    """Raise `BadInput` for more tokens than the model reads."""
    if context > model.context:
        raise BadInput(f"context={context} is out of range: the model reads at most {model.context} tokens.")


def trace_whole(folder: Path, model: Transformer, windows: Windows, about: About) -> Writer:
    """Trace a model that is in memory."""
    with Writer(folder, about) as writer, Recorder(model, about.k) as recorder:
        for read_BS1, domain_BS, doc_BS, pos_BS, _ in windows:
            tokens_BS, targets_BS = read_BS1[:, :-1], read_BS1[:, 1:]
            columns = recorder.run(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
            writer.add(Batch(tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, *columns))
    return writer


def weights_in(folder: Path) -> str:
    """A fingerprint of the weights in a checkpoint, or in a folder of transformers: of the manifest, which has their
    checksums, or of the files' names, sizes and ages."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")]
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


def about_of(
    run: str,
    checkpoint: str,
    model: Transformer,
    tokenizer: Tokenizer | None,
    windows: Windows,
    what: What,
    weights: str,
) -> About:
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
        what=what.key(),
        weights=weights,
        model=to_dict(model.cfg),
        router=dataclasses.asdict(model.router),
        commit=machine.git_state().commit,
    )
