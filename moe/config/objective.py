"""What a run minimises: the loss of the text, or one of answers to prompts."""

from dataclasses import dataclass
from typing import Annotated

from moe.config.balance import BalanceConfig
from moe.config.data import DataConfig
from moe.config.model import ModelConfig
from moe.config.parse import ANY, MANY, Between, OneOf
from moe.config.router import RouterConfig, facts
from moe.config.train import TrainConfig
from moe.errors import BadInput

# The data that every objective but the text's learns from.
READS = {"reward": "preferences", "dpo": "preferences", "grpo": "prompts"}


@dataclass
class ObjectiveConfig:
    """The objective, and the settings of each (moe/train/preference.py and grpo.py have the formulas). All but lm start
    from a `source`, keep selection biases as they are, and know nothing of the balance but its losses."""

    # lm (every token) | reward (a reward model) | dpo (both of preferences) | grpo (of answers that the model draws)
    name: Annotated[str, OneOf("lm", "reward", "dpo", "grpo")] = "lm"
    margin: Annotated[float, Between(0, ANY)] = 0.0  # reward: by how much the preferred answer's is to be larger
    beta: Annotated[float, Between(1e-6, ANY)] = 0.1  # dpo: how much a log-ratio to the source counts
    loss: Annotated[str, OneOf("sigmoid", "sigmoid_norm", "ipo")] = "sigmoid"  # dpo: sigmoid_norm and ipo by token
    group: Annotated[int, Between(2, MANY)] = 8  # grpo: answers to a prompt; train.batch_size counts answers
    # grpo, what an answer's loss is divided by: grpo (its length) | dapo (the step's tokens) | dr_grpo (the longest
    # that could be; and no deviation in the advantage)
    normalize: Annotated[str, OneOf("grpo", "dapo", "dr_grpo")] = "dapo"
    clip_low: Annotated[float, Between(0, 1)] = 0.2  # grpo: a ratio below 1 - clip_low is clipped
    clip_high: Annotated[float, Between(0, ANY)] = 0.2  # grpo: a ratio above 1 + clip_high is clipped
    kl: Annotated[float, Between(0, ANY)] = 0.0  # grpo: coefficient of the KL from the source, in nats per token
    max_new: Annotated[int, Between(1, MANY)] = 16  # grpo: tokens of the longest answer
    temperature: Annotated[float, Between(0.001, 1000.0)] = 1.0  # grpo: of the policy that draws, and is trained
    # grpo, what an answer gets: exact (1 if it is the prompt's, ended) | contains (1 if that is somewhere in it) |
    # model (what the run in `judge` says)
    reward: Annotated[str, OneOf("exact", "contains", "model")] = "exact"
    judge: str = ""  # reward=model: the folder of a run with objective.name=reward
    # grpo: train on the experts that the answers were drawn by, not on those chosen anew (2510.11370)
    replay: bool = False
    # grpo: the experts' backend while answers are drawn; same: as in training
    draw_dispatch: Annotated[str, OneOf("same", "reference", "torch", "triton")] = "same"
    # grpo: the precision while answers are drawn; same: as in training
    draw_precision: Annotated[str, OneOf("same", "bf16", "fp32")] = "same"


def validate(
    cfg: ObjectiveConfig,
    source: str,
    model: ModelConfig,
    router: RouterConfig,
    balance: BalanceConfig,
    data: DataConfig,
    train: TrainConfig,
) -> None:
    """Refuse an objective without what it learns from or starts from, and settings that are not its own. Raises
    `BadInput`."""
    if bool(cfg.judge) != (cfg.reward == "model"):
        raise BadInput(
            f"objective.judge={cfg.judge} with objective.reward={cfg.reward}: objective.reward=model and "
            "objective.judge=RUN, the folder of a reward model, go together."
        )
    if cfg.name == "lm":
        return
    # What it learns from, and what it starts from.
    if data.name != READS[cfg.name]:
        raise BadInput(f"objective.name={cfg.name} learns from data={READS[cfg.name]}, and data.name is {data.name}.")
    if not source:
        raise BadInput(f"objective.name={cfg.name} needs source=RUN: the run whose model it starts from.")
    # What of routing would change beside the policy, or differ between drawing and training.
    for name in ("bias_rate", "capacity", "tile"):
        if getattr(balance, name):
            raise BadInput(
                f"balance.{name}={getattr(balance, name)} has no place in objective.name={cfg.name}: set "
                f"balance.{name}=0 (or balance=none; a selection bias stays as the source has it)."
            )
    if balance.force != "none" or balance.scope == "global":
        key = f"force={balance.force}" if balance.force != "none" else "scope=global"
        raise BadInput(f"balance.{key} has no meaning for objective.name={cfg.name}.")
    if cfg.replay and (model.moe is None or not facts(router).rectangular or model.moe.depth < 1):
        raise BadInput(
            f"objective.replay=true needs a router with as many choices for every token, and router.name={router.name} "
            "(or a dense model, or model.moe.depth below 1) is none."
        )
    _validate_rows(cfg, model, train)


def _validate_rows(cfg: ObjectiveConfig, model: ModelConfig, train: TrainConfig) -> None:
    """Refuse batches that would cut pairs and groups apart, and answers without room."""
    rows = train.batch_size // train.accumulate
    if cfg.name in ("reward", "dpo") and rows % 2:
        raise BadInput(
            f"train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts cuts a pair of answers "
            f"apart for objective.name={cfg.name}: give an even number of rows to each."
        )
    if cfg.name == "grpo" and train.batch_size % cfg.group:
        raise BadInput(
            f"train.batch_size={train.batch_size} answers are no whole number of groups of objective.group={cfg.group}."
        )
    if cfg.name == "grpo" and cfg.max_new >= model.context:
        raise BadInput(f"objective.max_new={cfg.max_new} leaves no room for a prompt in model.context={model.context}.")
