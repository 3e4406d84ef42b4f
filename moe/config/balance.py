"""What keeps the load even, and what of it goes with which router."""

from dataclasses import dataclass, field
from typing import Annotated

from moe.config.model import MoEConfig
from moe.config.parse import ANY, MANY, Between, OneOf
from moe.config.router import RouterConfig, facts, validate_router
from moe.errors import BadInput

SCORE_TERMS = ("aux", "z", "importance", "load", "entropy", "spread", "bandpass")
SCHEDULED = (*SCORE_TERMS, "bias_rate")


@dataclass
class BalanceConfig:
    """What keeps the load even. Coefficients of the losses added to the language-model loss; 0 switches one off."""

    aux: Annotated[float, Between(0, ANY)] = 0.01  # load-balancing loss, E * sum_i f_i m_i
    # what aux is computed over: sequence | batch (a micro-batch) | global (the optimiser step, as is then every other
    # term; moe.routing.balance has the whole table)
    scope: Annotated[str, OneOf("sequence", "batch", "global")] = "batch"
    z: Annotated[float, Between(0, ANY)] = 0.001  # router z-loss
    importance: Annotated[float, Between(0, ANY)] = 0.0  # CV² of every expert's summed weights (Shazeer 2017)
    # CV² of the smooth estimate of the load (Shazeer 2017); needs router.noisy
    load: Annotated[float, Between(0, ANY)] = 0.0
    entropy: Annotated[float, Between(0, ANY)] = 0.0  # mean entropy of a token's probabilities: lower is more decided
    spread: Annotated[float, Between(0, ANY)] = 0.0  # ln E minus the entropy of the mean probabilities: 0 when even
    bandpass: Annotated[float, Between(0, ANY)] = 0.0  # squared excess of E · m_i over the band [1 − band, 1 + band]
    band: Annotated[float, Between(0, ANY)] = 0.2  # half the width of that band
    bias_rate: Annotated[float, Between(0, ANY)] = 0.0  # step of the loss-free bias update; needs router.selection_bias
    # sign (2408.15664) | proportional (to the relative excess of load)
    bias_step: Annotated[str, OneOf("sign", "proportional")] = "sign"
    # factors on a coefficient (or bias_rate) at equal distances over the run, straight lines between: {aux: [1,1,0]}
    schedule: dict[str, list[float]] = field(default_factory=dict)
    # in training an expert takes at most capacity · K · T / E rows, rounded up; 0: all
    capacity: Annotated[float, Between(0, ANY)] = 0.0
    # which rows stay when an expert is full: the first, or those with the highest score
    priority: Annotated[str, OneOf("position", "score")] = "position"
    # residual (the row is dropped) | next (the token's next best expert with room takes it)
    overflow: Annotated[str, OneOf("residual", "next")] = "residual"
    # in training round every expert's rows to a multiple of this (token rounding, 2512.14080); 0: off
    tile: Annotated[int, Between(0, MANY)] = 0
    # for debugging and benchmarks, whatever capacity is. none | balanced: experts in turn | recorded: in training those
    # that the run `recorded`, trained with log.experts=true on the same batches, took at each step
    force: Annotated[str, OneOf("none", "balanced", "recorded")] = "none"
    recorded: str = ""  # its folder


def rows_vary(moe: MoEConfig, router: RouterConfig, balance: BalanceConfig) -> str:
    """The setting for which the work of a token's experts in training is not known before it is measured; "": it is."""
    choices, work = facts(router).choices, moe.work()
    if choices not in ("k", "ragged", "mixture"):
        return f"router.name={router.name}"
    if router.second == "random":
        return "router.second=random"
    if choices != "mixture" and len(set(work)) > 1 and moe.k < len(work):
        return f"model.moe.widths={moe.widths}" if moe.widths else f"its {moe.n_cheap} experts that cost nothing"
    for name in ("capacity", "tile"):
        if getattr(balance, name):
            return f"balance.{name}={getattr(balance, name)}"
    return ""


def validate(layers: list[MoEConfig], router: RouterConfig, balance: BalanceConfig) -> None:
    """Check the router, and what of the balance does not go with it. `layers`: the settings of every MoE layer; none
    for a dense model, of which no more than a known router is asked. Raises `BadInput`."""
    validate_router(layers, router)
    if layers:
        _validate_terms(router, balance)
        _validate_policies(router, balance)
        _validate_schedule(balance)


def _validate_terms(router: RouterConfig, balance: BalanceConfig) -> None:
    """Refuse losses and biases that the router has nothing for."""
    if balance.bias_rate > 0 and not router.selection_bias:
        raise BadInput(
            f"balance.bias_rate={balance.bias_rate} needs a selection bias to update: set router.selection_bias=true."
        )
    if not facts(router).scored:
        for name in SCORE_TERMS:
            if getattr(balance, name):
                raise BadInput(
                    f"balance.{name}={getattr(balance, name)} reads scores, and router.name={router.name} gives none: "
                    f"set balance.{name}=0 (or balance=none)."
                )
    if balance.load and not router.noisy:
        raise BadInput(
            f"balance.load={balance.load} needs router.noisy=true: without noise the load has no gradient "
            "(balance.importance and balance.aux do without)."
        )
    if balance.load and router.gradient == "sparsemixer":
        raise BadInput(f"balance.load={balance.load} has no estimate for router.gradient=sparsemixer.")


def _validate_policies(router: RouterConfig, balance: BalanceConfig) -> None:
    """Refuse what overrides or limits a choice where the router does not choose so, and two of them at once."""
    # Which of them the router's rows and scores allow.
    about = facts(router)
    policies = {"capacity": balance.capacity, "tile": balance.tile, "force": balance.force != "none"}
    for name, on in policies.items():
        if on and (not about.rectangular or (name != "capacity" and not about.scored)):
            raise BadInput(
                f"balance.{name}={getattr(balance, name)} has no meaning for router.name={router.name}: "
                f"set balance.{name}={'none' if name == 'force' else 0}."
            )
    if router.gradient == "default-vector":
        for name in ("tile", "force"):
            if policies[name]:
                raise BadInput(
                    f"balance.{name}={getattr(balance, name)} has no meaning for router.gradient=default-vector."
                )
        if balance.overflow == "next":
            raise BadInput("balance.overflow=next has no meaning for router.gradient=default-vector.")
    # Which of them go together.
    if (balance.force == "recorded") != bool(balance.recorded):
        raise BadInput(
            f"balance.force={balance.force} with balance.recorded={balance.recorded!r}: force=recorded and the folder "
            "of the recorded run go together."
        )
    if balance.force != "none" and balance.tile:
        raise BadInput(f"balance.tile={balance.tile} and balance.force={balance.force}: choose one of them.")
    if balance.capacity and balance.tile:
        raise BadInput(f"balance.capacity={balance.capacity} and balance.tile={balance.tile}: choose one of them.")
    if balance.overflow == "next" and (not balance.capacity or not about.scored):
        raise BadInput("balance.overflow=next needs balance.capacity above 0 and a router with scores.")


def _validate_schedule(balance: BalanceConfig) -> None:
    for name, factors in balance.schedule.items():
        if name not in SCHEDULED:
            raise BadInput(f"balance.schedule.{name} is not a coefficient; accepted here: {', '.join(SCHEDULED)}.")
        if not factors or not all(0 <= factor < float("inf") for factor in factors):
            raise BadInput(f"balance.schedule.{name}={factors} must be a list of factors of at least 0, like [1,0].")
