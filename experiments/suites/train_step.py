"""Suite train_step: whole training steps of our models and of a peer's, in tokens per second.

Contestants take turns, so that a slow spell of the machine falls on all of them; a row's number is the median of its
steps. On a GPU rows also have MFU, the model's FLOPs over the matmul rate that this run measured.

    python -m experiments.bench suite=train_step                       # -> runs/bench
    python -m experiments.gpu_evidence --out DIR --stage train_step    # presets, on a GPU -> DIR/gpu-train_step.jsonl
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.pages import tables
from experiments.suites import timing
from experiments.suites.cases import Absent, Case
from experiments.suites.timing import Ceilings
from moe.config.model import ModelConfig, MoEConfig, head_dim
from moe.config.parse import nearest, parse
from moe.config.router import RouterConfig
from moe.config.train import OptimConfig
from moe.errors import BadInput
from moe.model import cost, dispatch
from moe.model.transformer import Transformer, next_token_loss
from moe.train.optimizer import build_optimizer

PEERS = ("transformers",)
MODELS = Path(__file__).resolve().parent.parent.parent / "conf" / "model"
HEADINGS = ("model", "precision", "parameters", "tokens/s", "the Switchyard MoE is")
MFU = "MFU"  # a column where a device's matmul rate was measured


def bench_model() -> ModelConfig:
    """OLMoE's architecture at a size two CPU cores train in a tenth of a second."""
    moe = MoEConfig(n_experts=16, k=4, d_expert=128)
    return ModelConfig(
        name="bench", vocab_size=4096, context=256, n_layers=4, d_model=256, n_heads=4, d_ff=512, qk_norm="full",
        tie_embeddings=False, moe=moe,
    )  # fmt: skip


def preset(name: str, vocab_size: int) -> ModelConfig:
    """conf/model/<name>.yaml, with `vocab_size` where it leaves that to the tokenizer. Raises `BadInput`."""
    presets = sorted(path.stem for path in MODELS.glob("*.yaml"))
    if name not in presets:
        raise BadInput(f"model={name} is not in conf/model; {nearest(name, presets)}.")
    model = parse(ModelConfig, yaml.safe_load((MODELS / f"{name}.yaml").read_text()), "model.")
    model.vocab_size = model.vocab_size or vocab_size
    return model


@dataclass
class Settings:
    """What is trained and how it is timed."""

    device: torch.device
    model: ModelConfig = field(default_factory=bench_model)
    backends: Sequence[str] = ("auto",)  # of our MoE; the first is what others are compared with
    compiled: bool = False  # each of ours once more under torch.compile
    compiler: str = "inductor"
    peers: Sequence[str] = ()
    precisions: Sequence[str] = ("fp32", "bf16")
    batch_size: int = 8
    rounds: int = 5
    steps: int = 3  # timed steps per contestant and round, after one untimed
    ceilings: Ceilings | None = None  # on a GPU, for MFU


def settings(device: torch.device, full: bool, name: str, ceilings: Ceilings | None) -> Settings:
    """For a GPU: a preset on both backends, eager and compiled, and the peers. Else all of it, tiny."""
    backends, peers = ("triton", "torch"), PEERS
    if full:
        model = preset(name, 32768)
        size = max(1, 16384 // model.context)
        return Settings(device, model, backends, True, "inductor", peers, ("bf16",), size, 3, 5, ceilings)
    moe = MoEConfig(n_experts=4, k=2, d_expert=32)
    model = ModelConfig("smoke", 64, 16, n_layers=1, d_model=32, n_heads=2, d_ff=64, tie_embeddings=False, moe=moe)
    return Settings(device, model, backends, True, "aot_eager", peers, ("bf16",), 1, 1, 1, ceilings)


@dataclass
class Contestant:
    """One model to time. `step(precision)` is forward, backward and an AdamW step on the same batch."""

    name: str
    total: int
    flops: int  # of training, per token
    step: Callable[[str], None]
    seconds: dict[str, list[float]] = field(default_factory=dict)


Build = Callable[[], Contestant]


def contestants(settings: Settings) -> dict[str, Build]:
    """Name -> how to build it: our MoE on every backend, its dense twin, and the peers. The first is the reference."""
    shape = (settings.batch_size, settings.model.context + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(settings.model.vocab_size, shape, generator=generator).to(settings.device)
    twin = cost.dense_twin(settings.model, "active_params")
    builders: dict[str, Build] = {}
    for compiler in (None, settings.compiler) if settings.compiled else (None,):
        for backend in settings.backends:
            name = named("switchyard MoE", backend, compiler)
            builders[name] = functools.partial(ours, name, settings.model, backend, compiler, tokens)
        name = named("switchyard dense twin", "auto", compiler)
        builders[name] = functools.partial(ours, name, twin, "auto", compiler, tokens)
    if "transformers" in settings.peers:
        builders["transformers OLMoE"] = functools.partial(transformers_olmoe, settings.model, tokens)
        builders["transformers Llama (dense)"] = functools.partial(transformers_llama, twin, tokens)
    return builders


def named(model: str, backend: str, compiler: str | None) -> str:
    """A contestant's name, with what was chosen for it."""
    words = ([] if backend == "auto" else [backend]) + (["compiled"] if compiler else [])
    return f"{model} ({', '.join(words)})" if words else model


def measured(settings: Settings) -> list[dict[str, Any]]:
    """Rows of all contestants, every precision, timed in turns."""
    all_ = [build() for build in contestants(settings).values()]
    take_turns(all_, settings, print)
    return [row(model, all_[0], precision, settings) for precision in settings.precisions for model in all_]


def cases(settings: Settings) -> Iterator[Case]:
    """One case per contestant, in turns with the first alone: two models at a time fit where all would not."""
    builders = contestants(settings)
    first = next(iter(builders))
    builders[first] = functools.cache(builders[first])  # it is there in every case
    for name, build in builders.items():
        for precision in settings.precisions:
            key = {"suite": "train_step", "preset": settings.model.name, "model": name, "precision": precision}
            yield Case(key, functools.partial(_against, name, build, builders[first], precision, settings))


def _against(name: str, build: Build, first: Build, precision: str, settings: Settings) -> dict[str, Any]:
    if name.startswith("transformers"):
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise Absent("transformers not installed") from None
    reference = first()
    reference.seconds.clear()  # of another case
    pair = [reference] if build is first else [reference, build()]
    take_turns(pair, settings, lambda line: None, [precision])
    return row(pair[-1], reference, precision, settings)


def take_turns(
    all_: Sequence[Contestant], settings: Settings, say: Callable[[str], None], precisions: Sequence[str] = ()
) -> None:
    """Time every contestant, in rounds."""
    for round_ in range(settings.rounds):
        for contestant in all_:
            for precision in precisions or settings.precisions:
                seconds = time_steps(functools.partial(contestant.step, precision), settings.steps, settings.device)
                contestant.seconds.setdefault(precision, []).extend(seconds)
        say(f"round {round_ + 1}/{settings.rounds}")


def row(contestant: Contestant, reference: Contestant, precision: str, settings: Settings) -> dict[str, Any]:
    """What is said of one contestant."""
    seconds = statistics.median(contestant.seconds[precision])
    reference_s = statistics.median(reference.seconds[precision])
    speed = settings.batch_size * settings.model.context / seconds
    values = {
        "suite": "train_step",
        "precision": precision,
        "model": contestant.name,
        "parameters": contestant.total,
        "tokens_per_s": speed,
        "moe_speed_over_this": seconds / reference_s,
        "steps": len(contestant.seconds[precision]),
        "shape": {"batch": settings.batch_size, "context": settings.model.context, **vars_of(settings.model)},
    }
    if settings.ceilings is not None and precision == "bf16":  # the matmul rate is bf16's
        values |= {"mfu": speed * contestant.flops / settings.ceilings.matmul, "ceilings": settings.ceilings._asdict()}
    return values


def ours(name: str, cfg: ModelConfig, wanted: str, compiler: str | None, tokens: torch.Tensor) -> Contestant:
    """A Switchyard model, its router as OLMoE's: softmax, weights not renormalised, both losses on."""
    model = Transformer(cfg, RouterConfig(renormalize=False)).initialize(0).to(tokens.device)
    backend, _ = dispatch.choose(wanted, tokens.device)
    call: Callable[..., Any] = torch.compile(model, backend=compiler) if compiler else model

    def loss() -> torch.Tensor:
        output = call(tokens[:, :-1], backend=backend)
        balancing = sum(0.01 * layer.aux + 0.001 * layer.z for layer in output.routing)
        return next_token_loss(output.logits_BSV, tokens[:, 1:]) + balancing

    return Contestant(name, cost.size(cfg).total, cost.flops(cfg).training, stepper(model, loss, tokens.device))


def transformers_olmoe(cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """transformers' OLMoE with its default experts implementation, at these shapes."""
    import transformers

    assert cfg.moe is not None
    config = transformers.OlmoeConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.moe.d_expert,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_experts=cfg.moe.n_experts,
        num_experts_per_tok=cfg.moe.k, max_position_embeddings=cfg.context, output_router_logits=True,
        tie_word_embeddings=cfg.tie_embeddings,
    )  # fmt: skip
    return transformers_model("transformers OLMoE", config, cfg, tokens)


def transformers_llama(cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """transformers' Llama at the dense twin's shapes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, head_dim=head_dim(cfg),
        max_position_embeddings=cfg.context, tie_word_embeddings=cfg.tie_embeddings,
    )  # fmt: skip
    return transformers_model("transformers Llama (dense)", config, cfg, tokens)


def transformers_model(name: str, config: Any, cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """A peer's model, trained on its own loss."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).to(tokens.device)
    model.train()
    total = sum(p.numel() for p in model.parameters())
    inputs = tokens[:, :-1]
    step = stepper(model, lambda: model(input_ids=inputs, labels=inputs).loss, tokens.device)
    return Contestant(name, total, cost.flops(cfg).training, step)


def stepper(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Callable[[str], None]:
    """A training step: forward under the precision, backward, clip to norm 1, fused AdamW."""
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))

    def step(precision: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(step: Callable[[], None], n: int, device: torch.device) -> list[float]:
    """Seconds of each of `n` steps, after one that is not timed."""
    step()
    seconds = []
    for _ in range(n):
        timing.synchronize(device)
        start = time.perf_counter()
        step()
        timing.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def vars_of(cfg: ModelConfig) -> dict[str, Any]:
    """The shape of the model, by its letters."""
    assert cfg.moe is not None
    return {
        "D": cfg.d_model, "L": cfg.n_layers, "E": cfg.moe.n_experts, "K": cfg.moe.k, "F": cfg.moe.d_expert,
        "V": cfg.vocab_size,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, with a column for MFU where a row has it."""
    mfu = any("mfu" in row for row in rows)
    return (*HEADINGS, MFU) if mfu else HEADINGS, [cells(row, mfu) for row in rows]


def cells(row: dict[str, Any], mfu: bool = False) -> tuple[str, ...]:
    """What the table says of a row; mfu: with a column for it."""
    name = f"{row['preset']}: {row['model']}" if "preset" in row else row["model"]
    if row.get("status", "measured") != "measured":
        return name, row["precision"], "", row["status"], row["error"][:60], *[""] * mfu
    words = (
        name, row["precision"], f"{row['parameters']:,}", f"{row['tokens_per_s']:,.0f}",
        f"{row['moe_speed_over_this']:.2f}×",
    )  # fmt: skip
    return (*words, tables.number(row.get("mfu"), ".1%")) if mfu else words
