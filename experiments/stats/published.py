"""Published times of all-to-alls and training steps, and what the simulator says of each.

Constants of the machines in conf/machine were fitted to the rows marked so, one constant to a row, and to no other.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from experiments.stats.cluster import MachineConfig
from experiments.stats.step_time import Ask, step, work_of
from experiments.stats.traffic import Traffic, draw, exchange, row_bytes, traffic
from moe.config.model import ModelConfig
from moe.config.parallel import Layout

CLOSE = 0.15  # the error within which a row counts as predicted
V1 = "legacy.md of DeepEP"
V2 = "README.md of DeepEP"
KRAKEN = "kraken pull 32"
BRIDGE = "performance-summary.md of Megatron Bridge, 25.11"
CORE = "2603.07685, abstract"
D, E, K = 7168, 256, 8  # of DeepEP's measurements
SAMPLE = 1024  # tokens of a rank whose routes are drawn, where a step has more

# What the simulator says and nobody published a number for that could be found.
UNCHECKED = (
    "FLAME-MoE's throughput (its repository gives numbers of nodes alone)",
    "ring collectives of shards and copies",
    "loads that are recorded or follow Zipf's law",
    "capacity, and node-limited routing beyond 8 nodes",
    "a step's memory on many GPUs",
    "any step on more than 2,048 GPUs",
)


class Row(NamedTuple):
    """A published number beside what is predicted; of a range both ends are published."""

    what: str
    machine: str
    unit: str
    low: float
    high: float
    predicted: float
    fitted: str  # the constant that was fitted to this row; "": none was
    source: str

    @property
    def error(self) -> float:
        """Of the prediction, relative to the nearer end of what is published; 0 inside."""
        return self.predicted / min(max(self.predicted, self.low), self.high) - 1

    @property
    def verdict(self) -> str:
        """In words."""
        if self.fitted:
            return f"fitted: {self.fitted}"
        return f"within {CLOSE:.0%}" if abs(self.error) <= CLOSE else "missed"


def rows(machines: Mapping[str, MachineConfig], models: Mapping[str, ModelConfig]) -> list[Row]:
    """All rows, by the machines and models of conf/, by their names."""
    return [*low_latency(machines), *kernels(machines), *small(machines), *hierarchy(machines, models),
            *steps(machines, models)]  # fmt: skip


@cache
def routes(ranks: int, inside: int, tokens: int, k_groups: int, two_level: bool, e: int = E, k: int = K) -> Traffic:
    """The traffic of equally likely experts; `k_groups` of the nodes, chosen by their best score as in DeepEP's tests;
    0: all."""
    groups = ranks // inside if k_groups else 1
    expert_TK = draw(tokens * ranks, e, k, groups=groups, k_groups=min(k_groups, groups), best=1)
    return traffic(expert_TK, e, ranks, inside, two_level)


def low_latency(machines: Mapping[str, MachineConfig]) -> Iterator[Row]:
    """DeepEP's low-latency kernels: 128 tokens, a row for every expert, sent straight."""
    machine, published = machines["h800"], {
        "dispatch": {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194},
        "combine": {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360},
    }  # fmt: skip
    for kind, row in (("dispatch", row_bytes(D, "fp8")), ("combine", row_bytes(D, "bf16"))):
        for ranks, micros in published[kind].items():
            # 128 tokens are too few for the busiest rank of one draw to say much.
            moved = routes(ranks, min(ranks, 8), 128, 0, False).evened()
            seconds = exchange(machine, moved, row)
            fitted = "launch" if (kind, ranks) == ("dispatch", 16) else ""
            what = f"low-latency {kind}, EP{ranks}"
            yield Row(what, "h800", "µs", micros, micros, seconds * 1e6, fitted, V1)


def kernels(machines: Mapping[str, MachineConfig]) -> Iterator[Row]:
    """DeepEP's kernels of two levels, in bytes per second as it counts them: a row for each node of a token, its own
    one included, or for each rank inside of one node."""
    published = {
        ("h800", V1, 4096): {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)},
        ("h100", V2, 8192): {16: (90, 81), 32: (61, 61)},
        ("gb200", V2, 8192): {8: (726, 740)},
    }
    fitted = {("h800", 8): "nvlink.efficiency", ("h800", 64): "network.efficiency", ("gb200", 8): "nvlink.efficiency"}
    for (name, source, tokens), sizes in published.items():
        for ranks, bandwidths in sizes.items():
            moved = routes(ranks, 8, tokens, 4 if ranks > 8 else 0, True)
            logical = moved.logical if ranks > 8 else float(moved.taken_R.mean()) * ranks / (ranks - 1)
            for kind, gigabytes in zip(("dispatch", "combine"), bandwidths, strict=True):
                row = row_bytes(D, "fp8" if kind == "dispatch" else "bf16")
                speed = logical * row / exchange(machines[name], moved, row) / 1e9
                constant = fitted.get((name, ranks), "") if kind == "dispatch" else ""
                what = f"{kind} of {tokens:,} tokens, EP{ranks}"
                yield Row(what, name, "GB/s", gigabytes, gigabytes, speed, constant, source)


def small(machines: Mapping[str, MachineConfig]) -> Iterator[Row]:
    """Two H100s, 4,096 rows of 8 KiB on each, one expert for each token."""
    moved = routes(2, 2, 4096, 0, True, 8, 1)
    seconds = exchange(machines["h100"], moved, row_bytes(4096, "bf16"))
    for kind, measured in (("dispatch", (80.064, 740.032, 812.768)), ("combine", (83.392, 621.120, 165.344))):
        for how, micros in zip(("Triton", "NVSHMEM", "eager"), measured, strict=True):
            yield Row(f"{kind}, 2 GPUs, {how}", "h100", "µs", micros, micros, seconds * 1e6, "", KRAKEN)


def hierarchy(machines: Mapping[str, MachineConfig], models: Mapping[str, ModelConfig]) -> Iterator[Row]:
    """How much sooner rows arrive that go once to a node, on 4 nodes of 8; the H800's stand in for theirs."""
    machine, parallel = machines["h800"], Layout(1, 32, 32)
    for name in ("deepseek-v3", "qwen3-30b-a3b"):
        model = dataclasses.replace(models[name], context=4096)
        assert model.moe is not None
        moved = [routes(32, 8, SAMPLE, 0, how, model.moe.n_experts, model.moe.k) for how in (False, True)]
        row = row_bytes(model.d_model, "bf16")
        sooner = exchange(machine, moved[0], row) / exchange(machine, moved[1], row)
        yield Row(f"all-to-all of {name}, 32 GPUs", "h800", "× as fast", 1.55, 3.32, sooner, "", "2508.09591")
        ask = Ask(overlap_shards=1.0, recompute=False)
        work = work_of(model)
        taken = [step(work, machine, parallel, [way], SAMPLE, ask).seconds for way in moved]
        yield Row(f"step of {name}, 32 GPUs", "h800", "× as fast", 1.18, 1.27, taken[0] / taken[1], "", "2508.09591")


# Model, machine, GPUs, ep, context, tokens of a GPU in a step, matmul, tokens per second and GPU, fitted, source.
STEPS = (
    ("llama3-70b", "h100", 64, 1, 8192, 16384, "fp8", 1602, "dense_fp8", BRIDGE),
    ("llama3-8b", "h100", 8, 1, 8192, 131072, "fp8", 14451, "", BRIDGE),
    ("deepseek-v3", "h800", 2048, 64, 4096, 30720, "fp8", 1e12 / 180e3 / 3600, "experts_fp8", "2412.19437, table 1"),
    ("qwen3-30b-a3b", "h100", 16, 8, 4096, 131072, "fp8", 5275, "", BRIDGE),
    ("qwen3-235b-a22b", "h100", 256, 32, 4096, 65536, "fp8", 1575, "", BRIDGE),
    ("llama3-70b", "gb200", 64, 1, 8192, 32768, "fp8", 4312, "dense_fp8", BRIDGE),
    ("llama3-8b", "gb200", 8, 1, 8192, 131072, "fp8", 31508, "", BRIDGE),
    ("deepseek-v3", "gb200", 256, 64, 4096, 65536, "bf16", 3139, "dense_bf16 and experts_bf16", BRIDGE),
    ("deepseek-v3", "gb200", 256, 32, 4096, 65536, "fp8", 4018, "experts_fp8", BRIDGE),
    ("deepseek-v3", "gb200", 256, 32, 4096, 65536, "fp8", 4018 * 1048 / 1003, "", CORE),
    ("qwen3-235b-a22b", "gb200", 256, 32, 4096, 131072, "bf16", 4916, "", BRIDGE),
    ("qwen3-235b-a22b", "gb200", 256, 32, 4096, 131072, "fp8", 4916 * 919 / 728, "", CORE),
    ("qwen3-30b-a3b", "gb200", 8, 8, 4096, 262144, "fp8", 23766, "", BRIDGE),
    ("llama3-70b", "gb300", 64, 1, 8192, 32768, "fp8", 4520, "", BRIDGE),
    ("llama3-8b", "gb300", 8, 1, 8192, 131072, "fp8", 37556, "", BRIDGE),
    ("deepseek-v3", "gb300", 256, 32, 4096, 65536, "bf16", 3848, "", BRIDGE),
    ("deepseek-v3", "gb300", 256, 32, 4096, 65536, "fp8", 4357, "", BRIDGE),
    ("deepseek-v3", "gb300", 256, 32, 4096, 65536, "fp8", 4357 * 1233 / 1088, "", CORE),
    ("qwen3-235b-a22b", "gb300", 256, 16, 4096, 131072, "bf16", 6131, "", BRIDGE),
    ("qwen3-235b-a22b", "gb300", 256, 16, 4096, 131072, "fp8", 6131 * 974 / 907, "", CORE),
    ("qwen3-30b-a3b", "gb300", 8, 8, 4096, 262144, "fp8", 28934, "", BRIDGE),
)  # fmt: skip


def steps(machines: Mapping[str, MachineConfig], models: Mapping[str, ModelConfig]) -> Iterator[Row]:
    """Whole training runs, in tokens per second and GPU, so that it does not matter how anyone counts FLOPs.

    They split models in pipelines, which are not simulated: here a step is one micro-batch, and what shards move is
    hidden. Megatron's routes are forced to be even; DeepSeek hides its all-to-alls, sends rows in fp8 and to 4 nodes at
    most (2412.19437, 3.2)."""
    configs = {model: dataclasses.replace(models[model], context=context) for model, _, _, _, context, *_ in STEPS}
    works = {model: work_of(cfg) for model, cfg in configs.items()}
    for model, name, gpus, ep, _, tokens, matmul, published, fitted, source in STEPS:
        deepseek = name == "h800"
        rows, hidden, nodes = ("fp8", 1.0, 4) if deepseek else ("bf16", 0.0, 0)
        cfg, machine = configs[model], machines[name]
        moved = []
        if cfg.moe is not None:
            inside = min(ep, machine.gpus)
            moved = [routes(ep, inside, SAMPLE, nodes, True, cfg.moe.n_experts, cfg.moe.k).evened()]
        ask = Ask(tokens, 1, matmul, rows, hidden, overlap_shards=1.0, recompute=False)
        taken = step(works[model], machine, Layout(1, gpus, ep), moved, SAMPLE, ask)
        what = f"{model}, {gpus:,} GPUs, {matmul}"
        yield Row(what, name, "tokens/s", published, published, tokens / taken.seconds, fitted, source)
