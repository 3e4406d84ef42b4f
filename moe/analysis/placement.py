"""What a load means for serving: experts on devices, experts that a decode batch touches.

Counts are of routed rows by expert; the window is what was counted. Under expert parallelism (EP) device d of n holds
experts d·E/n to (d + 1)·E/n − 1, and a step takes as long as the busiest device.
"""

import heapq
import math

import torch
from torch import Tensor


def device_load(count_E: Tensor, n_devices: int) -> Tensor:
    """Rows of every device, (n_devices,). Raises `ValueError` where the devices do not divide the experts evenly."""
    if n_devices < 1 or len(count_E) % n_devices:
        raise ValueError(f"n_devices={n_devices} does not divide {len(count_E)} experts evenly")
    return count_E.view(n_devices, -1).sum(1)


def imbalance(load_D: Tensor) -> float:
    """max load / mean load: 1 when even; a step takes so many times what it would if it were. 1 without any rows. Its
    inverse is SGLang's *balancedness*."""
    mean = load_D.double().mean().item()
    return load_D.max().item() / mean if mean else 1.0


def replicated_load(count_E: Tensor, n_devices: int, n_replicas: int) -> Tensor:
    """Rows of every device, (n_devices,) float64, when the busiest experts have `n_replicas` copies besides, and copies
    are placed greedily: the busiest expert is split once more, n_replicas times; then copies go, the heaviest first, to
    the device with the least load that has a slot left (the scheme of EPLB, without its groups). Raises `ValueError`
    where slots do not divide evenly."""
    n_slots = len(count_E) + n_replicas
    if n_devices < 1 or n_slots % n_devices:
        raise ValueError(f"n_devices={n_devices} does not divide {n_slots} slots evenly")
    # Copies: of the expert whose copies are busiest.
    copies_E = [1] * len(count_E)
    rows_E = count_E.double().tolist()
    heap = [(-rows, e) for e, rows in enumerate(rows_E)]
    heapq.heapify(heap)
    for _ in range(n_replicas):
        _, e = heapq.heappop(heap)
        copies_E[e] += 1
        heapq.heappush(heap, (-rows_E[e] / copies_E[e], e))
    # Devices: heaviest copy first, each to the least loaded device with room.
    weights = sorted((rows_E[e] / copies_E[e] for e in range(len(rows_E)) for _ in range(copies_E[e])), reverse=True)
    devices = [(0.0, d, n_slots // n_devices) for d in range(n_devices)]
    full = []
    for weight in weights:
        load, d, room = heapq.heappop(devices)
        if room > 1:
            heapq.heappush(devices, (load + weight, d, room - 1))
        else:
            full.append((d, load + weight))
    return torch.tensor([load for _, load in sorted(full)], dtype=torch.float64)


def distinct_experts(expert_TK: Tensor, batch: int) -> float:
    """Mean number of different experts that `batch` tokens in a row take together: what a decode step of so many
    sequences reads from memory. Trailing tokens that fill no batch are left out; NaN where there is no whole one."""
    whole = len(expert_TK) // batch
    if not whole:
        return math.nan
    group_GN = expert_TK[: whole * batch].reshape(whole, -1)
    # A number for every pair of group and expert: different pairs are what is counted.
    n_experts = int(expert_TK.max()) + 1
    pair_GN = torch.arange(whole)[:, None] * max(1, n_experts) + group_GN
    return len(pair_GN[group_GN >= 0].unique()) / whole


def expected_distinct(n_experts: int, k: int, batch: int) -> float:
    """The same for tokens that each take K of E at random: E · (1 − (1 − K/E)^batch)."""
    return n_experts * (1 - (1 - k / n_experts) ** batch)
