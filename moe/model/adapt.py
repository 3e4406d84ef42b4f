"""Train some of a model: freeze the rest, choose experts, or learn low-rank changes of matrices (LoRA).

A weight W that changes in a way of its own is a parametrization of torch.nn.utils.parametrize: its module still has W,
computed from what is trained, so that no layer, backend or kernel knows of it. In a checkpoint there are then, under
`MODULE.parametrizations.NAME`, the frozen and the trained tensors; `merged` makes W of them and `unmerged` the reverse.

Letters beyond the glossary: R the rank · C experts that are trained · O and I rows and columns of a matrix.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.config.tune import ADAPTED, TuneConfig
from moe.errors import BadInput
from moe.model.experts import Experts
from moe.model.transformer import Transformer

Tensors = dict[str, Tensor]
ADAPTER = re.compile(r"(.*)\.parametrizations\.(\w+)\.(original|0\.\w+)")
# What a parameter belongs to, by its name; the first that fits.
PARTS_BY_NAME = (
    ("norms", re.compile(r"(.*_)?norm\.\w+|.*[._]norm\.\w+")),
    ("attention", re.compile(r"blocks\.\d+\.attn\..*")),
    ("router", re.compile(r"blocks\.\d+\.(mlp\.router|depth)\..*")),
    ("experts", re.compile(r"blocks\.\d+\.mlp\.(experts|cheap)\..*|blocks\.\d+\.mlp\.default_ED")),
    ("mlp", re.compile(r"blocks\.\d+\.mlp\..*")),
    ("embeddings", re.compile(r"(embed|position|head)\..*")),
    ("reward", re.compile(r"reward\..*")),  # a reward model's head, always trained
)


class LowRank(nn.Module):
    """W + alpha/R · B A of a frozen W, (O, I) or a stack (E, O, I) where every expert has a B and an A of its own
    (LoRA, 2106.09685). A begins random and B 0, so that the model begins as it was. `expert_C`: of these experts
    alone."""

    scale: Tensor
    expert_C: Tensor | None

    def __init__(self, weight: Tensor, rank: int, scale: float, expert_C: Tensor | None, seed: str) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        stack = stack if expert_C is None else [len(expert_C)]
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
        a = torch.empty(*stack, rank, columns).normal_(
            0, columns**-0.5, generator=torch.Generator().manual_seed(number)
        )
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("expert_C", expert_C)

    def forward(self, weight: Tensor) -> Tensor:
        return low_rank(weight, self.a, self.b, float(self.scale), self.expert_C)


def low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float, expert_C: Tensor | None) -> Tensor:
    """W + scale · B A, of the experts `expert_C` alone where they are given."""
    change = scale * (b @ a)
    return weight + change if expert_C is None else weight.index_add(0, expert_C, change.to(weight.dtype))


class Chosen(nn.Module):
    """A stack (E, ...) of which only the experts `expert_C` are trained: (C, ...) -> (E, ...)."""

    base: Tensor
    expert_C: Tensor

    def __init__(self, weight: Tensor, expert_C: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", weight.detach().clone())
        self.register_buffer("expert_C", expert_C)

    def forward(self, trained: Tensor) -> Tensor:
        return self.base.index_copy(0, self.expert_C, trained)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained of a stack."""
        return weight[self.expert_C]


def part_of(name: str) -> str:
    """The part, of `PARTS` of moe/config/tune.py, that a parameter of this name belongs to."""
    for part, pattern in PARTS_BY_NAME:
        if pattern.fullmatch(name):
            return part
    raise AssertionError(f"{name} belongs to no part")


def adapt(model: Transformer, cfg: TuneConfig, seed: int = 0) -> Transformer:
    """Make of a model one whose parameters are what `cfg` says is trained, with the same outputs. `seed` draws the
    low-rank changes' A, each by its own name. Raises `BadInput` where nothing would be trained."""
    if cfg == TuneConfig():
        return model
    # Freeze; what changes in a way of its own is put in its place.
    trained, chosen = cfg.trained(), cfg.chosen(model.cfg)
    for name, p in list(model.named_parameters()):
        is_stack = name.endswith(("w_up_EFD", "w_down_EDF"))
        left_out = chosen and part_of(name) == "experts" and not is_stack
        p.requires_grad_(p.requires_grad and part_of(name) in (*trained, "reward") and not left_out)
    for path, module, name in list(matrices(model)):
        if part_of(f"{path}.{name}") not in trained:
            continue
        weight, expert_C = getattr(module, name), None
        if isinstance(module, Experts) and chosen:
            module.chosen = chosen[int(path.split(".")[1])]
            if not module.chosen:
                weight.requires_grad_(False)
                continue
            expert_C = torch.tensor(module.chosen, device=weight.device)
        if cfg.rank:
            weight.requires_grad_(False)
            change: nn.Module = LowRank(weight, cfg.rank, cfg.alpha / cfg.rank, expert_C, f"{seed}/{path}.{name}")
            parametrize.register_parametrization(module, name, change)
        elif expert_C is not None:
            parametrize.register_parametrization(module, name, Chosen(weight, expert_C))
    # With a rank, the vectors beside the matrices of attention, experts and MLPs stay as they are.
    if cfg.rank:
        for name, p in model.named_parameters():
            if not ADAPTER.fullmatch(name) and part_of(name) in ADAPTED:
                p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"tune.parts={list(trained)} leaves nothing that is trained in this model.")
    return model


def matrices(model: Transformer) -> Iterator[tuple[str, nn.Module, str]]:
    """The path, the module and the name in it of every matrix, or stack of them, of attention, experts and MLPs."""
    for path, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Experts):
            yield from ((path, module, name) for name in ("w_up_EFD", "w_down_EDF"))
        elif isinstance(module, nn.Linear) and part_of(f"{path}.weight") in ("attention", "mlp"):
            yield path, module, "weight"


def merged(tensors: Mapping[str, Tensor]) -> Tensors:
    """A model's tensors as they are without `adapt`: every W computed from what was trained of it. Others are the same
    objects."""
    return {name: whole({kind: tensors[key] for kind, key in of.items()}) for name, of in pieces(tensors).items()}


def pieces(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the tensors of these names are of: for each of the plain model its pieces' names by their kind, "original"
    alone where nothing changes it."""
    by_name: dict[str, dict[str, str]] = {}
    for name in names:
        match = ADAPTER.fullmatch(name)
        module, weight, kind = match.groups() if match else ("", "", "original")
        by_name.setdefault(f"{module}.{weight}" if match else name, {})[kind.removeprefix("0.")] = name
    return by_name


def whole(of: Tensors) -> Tensor:
    """A tensor from its pieces, by their kind."""
    if "base" in of:
        return of["base"].index_copy(0, of["expert_C"], of["original"])
    if "a" in of:
        return low_rank(of["original"], of["a"], of["b"], float(of["scale"]), of.get("expert_C"))
    return of["original"]


def unmerged(model: Transformer, tensors: Tensors) -> Tensors:
    """The reverse, for an adapted model that is to begin with these weights: low-rank changes begin at none."""
    state = model.state_dict()
    result = dict(tensors)
    for name in [name for name in state if name.endswith(".original")]:
        module, weight = name.removesuffix(".original").split(".parametrizations.")
        given, place = result.pop(f"{module}.{weight}"), f"{module}.parametrizations.{weight}.0"
        result |= {key: value for key, value in state.items() if key.startswith(f"{place}.")}
        result[name] = given
        if f"{place}.base" in state:
            result |= {f"{place}.base": given, name: given[state[f"{place}.expert_C"].to(given.device)]}
    return result
