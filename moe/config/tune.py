"""Which weights training changes, and how: all of them, some parts, some experts, or low-rank changes of them."""

from dataclasses import dataclass, field
from typing import Annotated

from moe.config.model import ModelConfig, layer_moe, moe_layers
from moe.config.parse import ANY, MANY, Between
from moe.errors import BadInput

PARTS = ("embeddings", "attention", "experts", "mlp", "router", "norms")
ADAPTED = ("attention", "experts", "mlp")  # whose matrices a low-rank change can be made of


@dataclass
class TuneConfig:
    """What of a model is trained. Everything else keeps the weights it has, to the bit."""

    # of embeddings (with the output head), attention, experts (routed ones), mlp (dense and shared ones), router (its
    # selection bias too), norms; empty: all, or with a rank attention and experts
    parts: list[str] = field(default_factory=list)
    # only these routed experts, as LAYER:EXPERT or, in every MoE layer, as EXPERT; empty: all of them
    experts: list[str] = field(default_factory=list)
    # the rank of the change B A that every matrix of attention, experts and mlp gets (LoRA, 2106.09685), each expert
    # one of its own; 0: the matrices themselves change
    rank: Annotated[int, Between(0, MANY)] = 0
    alpha: Annotated[float, Between(0, ANY)] = 16.0  # rank: the change is scaled by alpha / rank

    def trained(self) -> tuple[str, ...]:
        """The parts that are trained."""
        return tuple(self.parts) or (("attention", "experts") if self.rank else PARTS)

    def chosen(self, model: ModelConfig) -> dict[int, list[int]]:
        """The experts that are trained of each MoE layer, ascending; empty where it is all of them."""
        chosen: dict[int, set[int]] = {layer: set() for layer in moe_layers(model)} if self.experts else {}
        for name in self.experts:
            of_layer, colon, expert = name.rpartition(":")
            for layer in [int(of_layer)] if colon else chosen:
                chosen[layer].add(int(expert))
        return {layer: sorted(experts) for layer, experts in chosen.items()}


def validate(cfg: TuneConfig, model: ModelConfig) -> None:
    """Refuse parts and experts that the model does not have. Raises `BadInput`."""
    for part in cfg.parts:
        if part not in PARTS:
            raise BadInput(f"tune.parts has {part!r}: accepted are {', '.join(PARTS)}.")
    if len(set(cfg.parts)) < len(cfg.parts):
        raise BadInput(f"tune.parts={cfg.parts} names a part twice.")
    if cfg.rank and not set(cfg.trained()) & set(ADAPTED):
        raise BadInput(f"tune.rank={cfg.rank} needs one of {', '.join(ADAPTED)} in tune.parts={cfg.parts}.")
    routed = moe_layers(model)
    if not routed and set(cfg.parts) & {"experts", "router"}:
        raise BadInput(f"tune.parts={cfg.parts} names what a dense model does not have: leave out experts and router.")
    if not cfg.rank and cfg.alpha != TuneConfig.alpha:
        raise BadInput(f"tune.alpha={cfg.alpha} scales low-rank changes, and tune.rank=0 makes none.")
    if cfg.experts and not routed:
        raise BadInput(f"tune.experts={cfg.experts} means nothing to a dense model: leave it out.")
    # Experts by name.
    if cfg.experts and "experts" not in cfg.trained():
        raise BadInput(f"tune.experts={cfg.experts} means nothing where tune.parts={cfg.parts} leaves the experts out.")
    for name in cfg.experts:
        numbers = name.split(":")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise BadInput(f"tune.experts has {name!r}: accepted are EXPERT, as 3, and LAYER:EXPERT, as 2:3.")
        layers = [int(numbers[0])] if len(numbers) == 2 else routed
        for layer in layers:
            if layer not in routed:
                raise BadInput(f"tune.experts has {name!r}: layer {layer} has no experts; MoE layers are {routed}.")
            n_experts = layer_moe(model, layer).n_experts
            if int(numbers[-1]) >= n_experts:
                raise BadInput(f"tune.experts has {name!r}: the experts of layer {layer} are 0 to {n_experts - 1}.")
            if layer_moe(model, layer).widths:
                raise BadInput(f"tune.experts={cfg.experts} needs experts of one width: model.moe.widths is set.")
