"""Benchmarks, as ratios within one run.

    python -m experiments.bench suite=train_step                          # the MoE against its own dense twin
    python -m experiments.bench suite=train_step peers=[transformers]     # and against transformers' models
    python -m experiments.bench suite=train_step model.n_experts=64 rounds=2

Prints a table and writes a JSON line per row, with device, versions and commit, to `out`. Contestants take turns,
`rounds` times, so that a slow spell of the machine falls on all of them; a row's number is the median of its steps.
"""

import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments import cli, tables
from moe import dispatch, machine, presets
from moe.config import BadInput, ModelConfig, MoEConfig, OptimConfig, RouterConfig, TrainConfig, head_dim
from moe.model import Transformer, next_token_loss
from moe.optim import build_optimizer
from moe.run import write_atomically

SUITES = ("train_step",)
PEERS = ("transformers",)
HEADINGS = ("model", "precision", "parameters", "tokens/s", "the Switchyard MoE is")


def bench_model() -> ModelConfig:
    """OLMoE's architecture at a size two CPU cores train in a tenth of a second."""
    moe = MoEConfig(n_experts=16, k=4, d_expert=128)
    return ModelConfig(
        name="bench", vocab_size=4096, context=256, n_layers=4, d_model=256, n_heads=4, d_ff=512, qk_norm="full",
        tie_embeddings=False, moe=moe,
    )  # fmt: skip


@dataclass
class BenchConfig:
    """Settings of a benchmark."""

    suite: str = "train_step"
    peers: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=bench_model)
    dispatch: str = "auto"
    batch_size: int = 8
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    rounds: int = 5
    steps: int = 3  # timed steps per contestant and round, after one untimed
    device: str = "auto"
    threads: int = 0
    out: str = "experiments/results/train_step.jsonl"


@dataclass
class Contestant:
    """One model to time. `step(precision)` is forward, backward and an AdamW step on the same batch."""

    name: str
    total: int
    step: Callable[[str], None]
    seconds: dict[str, list[float]] = field(default_factory=dict)


@cli.command("bench", BenchConfig)
def main(cfg: BenchConfig) -> None:
    """Run a suite, print its table, write its rows."""
    if cfg.suite not in SUITES:
        raise BadInput(f"suite={cfg.suite} is not one of {', '.join(SUITES)}.")
    for peer in cfg.peers:
        if peer not in PEERS:
            raise BadInput(f"peers has {peer!r}; known peers are {', '.join(PEERS)}.")
        if importlib.util.find_spec(peer) is None:
            raise BadInput(f"peers has {peer}, which is not installed: pip install 'moe-switchyard[bench]'.")
    for precision in cfg.precisions:
        if precision not in ("fp32", "bf16"):
            raise BadInput(f"precisions has {precision!r}; accepted are fp32, bf16.")
    if not cfg.model.moe:
        raise BadInput("model.moe=null: the benchmark compares a Mixture-of-Experts model with its dense twin.")
    train_step(cfg)


def train_step(cfg: BenchConfig) -> None:
    """Tokens per second of whole training steps: ours, our dense twin's, and each peer's on the same shapes."""
    device = machine.choose_device(cfg.device)
    threads = machine.set_threads(TrainConfig(threads=cfg.threads))
    where = {"device": machine.device_name(device), "threads": threads, "versions": machine.versions()}
    where |= machine.git_state()
    machine.keep_freed_memory()  # for every contestant alike
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.batch_size, cfg.model.context + 1)
    tokens = torch.randint(cfg.model.vocab_size, shape, generator=generator).to(device)
    twin = presets.dense_twin(cfg.model, "active_params")
    contestants = [ours("switchyard MoE", cfg, cfg.model, tokens), ours("switchyard dense twin", cfg, twin, tokens)]
    if "transformers" in cfg.peers:
        contestants += [transformers_olmoe(cfg.model, tokens), transformers_llama(twin, tokens)]
    for round_ in range(cfg.rounds):
        for contestant in contestants:
            for precision in cfg.precisions:
                seconds = time_steps(lambda: contestant.step(precision), cfg.steps, device)  # noqa: B023 — called at once
                contestant.seconds.setdefault(precision, []).extend(seconds)
        print(f"round {round_ + 1}/{cfg.rounds}", flush=True)
    n_tokens = cfg.batch_size * cfg.model.context
    reference = contestants[0]
    rows = [
        {
            "suite": cfg.suite,
            "precision": precision,
            "model": each.name,
            "parameters": each.total,
            "tokens_per_s": n_tokens / statistics.median(each.seconds[precision]),
            "moe_speed_over_this": statistics.median(each.seconds[precision])
            / statistics.median(reference.seconds[precision]),
            "steps": len(each.seconds[precision]),
            "shape": {"batch": cfg.batch_size, "context": cfg.model.context, **vars_of(cfg.model)},
            "command": shlex.join(["python", "-m", "experiments.bench", *sys.argv[1:]]),
            **where,
        }
        for precision in cfg.precisions
        for each in contestants
    ]
    tables.print_table(HEADINGS, map(cells, rows))
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(json.dumps(row) + "\n" for row in rows))


def ours(name: str, cfg: BenchConfig, model_cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """A Switchyard model, its router as OLMoE's: softmax, weights not renormalised, both losses on."""
    model = Transformer(model_cfg, RouterConfig(renormalize=False)).initialize(0).to(tokens.device)
    backend = dispatch.choose(cfg.dispatch, tokens.device)

    def loss() -> torch.Tensor:
        output = model(tokens[:, :-1], backend=backend)
        balancing = sum(0.01 * each.aux + 0.001 * each.z for each in output.routing)
        return next_token_loss(output.logits_BSV, tokens[:, 1:]) + balancing

    return Contestant(name, presets.size(model_cfg).total, stepper(model, loss, tokens.device))


def transformers_olmoe(cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """transformers' OLMoE with its default experts implementation, at these shapes."""
    import transformers

    assert cfg.moe is not None
    config = transformers.OlmoeConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.moe.d_expert,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_experts=cfg.moe.n_experts,
        num_experts_per_tok=cfg.moe.k, max_position_embeddings=cfg.context, output_router_logits=True,
    )  # fmt: skip
    return transformers_model("transformers OLMoE", config, tokens)


def transformers_llama(cfg: ModelConfig, tokens: torch.Tensor) -> Contestant:
    """transformers' Llama at the dense twin's shapes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, head_dim=head_dim(cfg),
        max_position_embeddings=cfg.context,
    )  # fmt: skip
    return transformers_model("transformers Llama (dense)", config, tokens)


def transformers_model(name: str, config: Any, tokens: torch.Tensor) -> Contestant:
    """A peer's model, trained on its own loss."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).to(tokens.device)
    model.train()
    total = sum(p.numel() for p in model.parameters())
    inputs = tokens[:, :-1]
    return Contestant(name, total, stepper(model, lambda: model(input_ids=inputs, labels=inputs).loss, tokens.device))


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
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def vars_of(cfg: ModelConfig) -> dict[str, Any]:
    """The shape of the model, by its letters."""
    assert cfg.moe is not None
    return {
        "D": cfg.d_model, "L": cfg.n_layers, "E": cfg.moe.n_experts, "K": cfg.moe.k, "F": cfg.moe.d_expert,
        "V": cfg.vocab_size,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    speed = f"{row['moe_speed_over_this']:.2f}×"
    return row["model"], row["precision"], f"{row['parameters']:,}", f"{row['tokens_per_s']:,.0f}", speed


if __name__ == "__main__":
    main()
