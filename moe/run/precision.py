"""Which precision a run's matmuls have where the settings leave it open: on a processor the faster one, measured.

What a processor says of itself does not tell: with bf16 instructions but without tiles (AMX) some multiply bf16 at
twice the speed of fp32, and others at half of it.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe.config.model import entering, is_moe_layer, layer_moe
from moe.config.run import Config
from moe.model.cost import attention_matrices, expert_width
from moe.model.experts import up_width

ROUNDS = 3  # of timings, whose median counts, after one that does not
DECIDED = 4.0  # times as slow: no further round
MULTIPLICATIONS = 2**23  # of one timed matmul at most, by fewer rows of it: milliseconds for them all
WIDEST = 1024  # columns of a timed matmul, and rows of its weights, at most


class Matmul(NamedTuple):
    """(rows, n_in) by (n_in, n_out)."""

    rows: int
    n_in: int
    n_out: int

    def size(self) -> int:
        """Multiplications."""
        return self.rows * self.n_in * self.n_out

    def small(self) -> "Matmul":
        """The same of fewer rows, so that it is soon done."""
        n_in, n_out = min(self.n_in, WIDEST), min(self.n_out, WIDEST)
        return Matmul(min(self.rows, max(32, MULTIPLICATIONS // (n_in * n_out))), n_in, n_out)


def choose_precision(
    cfg: Config, device: torch.device, seconds: Callable[[Matmul, str], float] | None = None
) -> tuple[str, str]:
    """bf16 or fp32, and why: as asked; on a GPU bf16 where it multiplies that natively; elsewhere the faster of the two
    over the matmuls of one training step, on the threads in use. `seconds` times one of them, `timed` by default. A
    close race may end otherwise another time: a run keeps what its config.yaml has."""
    if cfg.train.precision != "auto":
        return cfg.train.precision, "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU multiplies it") if native else ("fp32", "the GPU does not multiply bf16")
    # Every shape in turns, so that what else the machine does slows both.
    total = {"bf16": 0.0, "fp32": 0.0}
    for matmul, n in matmuls(cfg).items():
        small = matmul.small()
        rounds: list[dict[str, float]] = []
        while len(rounds) < 1 + ROUNDS and not _decided(rounds):
            rounds.append({name: (seconds or timed)(small, name) for name in total})
        rounds = rounds[1:]
        for name in total:
            median_s = statistics.median(taken[name] for taken in rounds)
            total[name] += n * median_s * matmul.size() / small.size()
    faster = min(("fp32", "bf16"), key=total.__getitem__)
    took = " and ".join(f"{total[name]:.3g} s in {name}" for name in sorted(total, key=total.__getitem__))
    return faster, f"the matmuls of a step take {took} on {torch.get_num_threads()} threads"


def _decided(rounds: list[dict[str, float]]) -> bool:
    """Whether a round that counts was no race: where bf16 is emulated, more of them would cost seconds."""
    return len(rounds) > 1 and max(rounds[-1].values()) > DECIDED * min(rounds[-1].values())


def matmuls(cfg: Config) -> Counter[Matmul]:
    """The matmuls of one step's forward passes and how many of each, experts as if all were equally busy."""
    model, n_micro = cfg.model, cfg.train.accumulate
    n_sequences, d = cfg.train.batch_size // n_micro, model.d_model
    n_of: Counter[Matmul] = Counter()
    for layer in range(model.n_layers):
        moe = layer_moe(model, layer) if is_moe_layer(model, layer) else None
        tokens = n_sequences * (entering(moe, model.context) if moe else model.context)
        # Attention's projections; then the MLP, or the experts.
        n_of += Counter(Matmul(tokens, n_in, n_out) for n_in, n_out in attention_matrices(model))
        mlps = [(1, tokens, model.d_ff)]
        if moe is not None:
            mlps = [(moe.n_experts, max(1, tokens * moe.k // moe.n_experts), round(expert_width(moe)))]
            mlps += [(1, tokens, moe.n_shared * moe.d_expert)] if moe.n_shared else []
        for n, rows, width in mlps:
            n_of[Matmul(rows, d, up_width(model, width))] += n
            n_of[Matmul(rows, width, d)] += n
    n_of[Matmul(n_sequences * model.context, d, model.vocab_size)] += 1
    return Counter({matmul: n * n_micro for matmul, n in n_of.items()})


def timed(matmul: Matmul, precision: str) -> float:
    """Seconds that it and its gradients take on this machine's processor, conversions from fp32 included."""
    x = torch.ones(matmul.rows, matmul.n_in, requires_grad=True)
    weight = torch.ones(matmul.n_out, matmul.n_in, requires_grad=True)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = F.linear(x, weight)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start
