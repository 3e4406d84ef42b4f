"""How a model is trained, saved and watched."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from moe.config.parse import ANY, MANY, Between, OneOf
from moe.errors import BadInput


@dataclass
class OptimConfig:
    """AdamW, or Muon for the matrices between embeddings and output; warm-up, then a schedule."""

    lr: Annotated[float, Between(0, ANY)] = 2e-3  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the running means of gradient and square
    eps: Annotated[float, Between(0, 1)] = 1e-8  # added to the root of the mean square
    weight_decay: Annotated[float, Between(0, ANY)] = 0.1  # on matrices; never on norms, biases or selection biases
    clip: Annotated[float, Between(0, ANY)] = 1.0  # global gradient norm; 0: off
    # cosine | wsd (warm-up, stable, decay) | constant
    schedule: Annotated[str, OneOf("cosine", "wsd", "constant")] = "cosine"
    warmup: Annotated[int, Between(-1, MANY)] = -1  # steps; -1: a tenth of the run, at most 50
    final: Annotated[float, Between(0, 1)] = 0.1  # learning rate at the end, as a share of lr
    decay: Annotated[float, Between(0, 1)] = 0.2  # wsd: share of the steps spent decaying
    # adamw | muon: matrices of attention, MLPs and each expert; AdamW for embeddings, output, routers, norms and biases
    name: Annotated[str, OneOf("adamw", "muon")] = "adamw"
    muon_lr: Annotated[float, Between(0, ANY)] = 0.0  # muon: peak learning rate of its matrices; 0: lr
    momentum: Annotated[float, Between(0, 1)] = 0.95  # muon: decay of the running mean of its matrices' gradients
    ns_steps: Annotated[int, Between(1, 99)] = 5  # muon: Newton-Schulz steps that orthogonalise an update
    # muon, what a matrix of R rows and C columns has for a rate: original (times sqrt(max(1, R / C))) |
    # match_rms_adamw (times 0.2 sqrt(max(R, C)): updates as large as AdamW's, so that its rate and decay serve)
    adjust: Annotated[str, OneOf("original", "match_rms_adamw")] = "match_rms_adamw"
    # the last share of the steps over whose weights the mean is taken, which the model becomes at the end; 0: off
    average: Annotated[float, Between(0, 1)] = 0.0


@dataclass
class TrainConfig:
    steps: Annotated[int, Between(1, 2**62)] = 600  # optimiser steps
    batch_size: Annotated[int, Between(1, MANY)] = 8  # sequences per optimiser step, B
    accumulate: Annotated[int, Between(1, MANY)] = 1  # micro-batches a step is split into
    # auto | bf16 (autocast) | fp32; auto: the faster one, measured as a run begins (on a GPU bf16 where it has it)
    precision: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    # CPU threads; 0: torch's default. Recorded, because it can change the last bits
    threads: Annotated[int, Between(0, 4096)] = 0
    checkpoint_activations: bool = False  # compute activations again in the backward pass, for less memory
    compile: bool = False  # torch.compile the model
    non_finite: Annotated[str, OneOf("stop", "skip")] = "stop"  # stop | skip (the step is not taken, and counted)
    eval_every: Annotated[int, Between(0, 2**62)] = 100  # steps; 0: only at the end
    # validation tokens per evaluation, spread evenly over the validation split
    eval_tokens: Annotated[int, Between(1, 2**62)] = 65536


@dataclass
class DistillConfig:
    """Another run's model as a teacher (Hinton et al., 1503.02531). The loss is (1 − weight) · cross-entropy
    + weight · temperature² · KL(teacher || model), both in nats per token, beside the routers' losses."""

    teacher: str = ""  # a run's folder; "": none
    which: str = "best"  # of its checkpoints: best (lowest validation loss) | last | step-N
    weight: Annotated[float, Between(0, 1)] = 0.5  # share of the loss that is the teacher's
    temperature: Annotated[float, Between(0.001, 1000.0)] = 1.0  # what logits are divided by


@dataclass
class CheckpointConfig:
    every: Annotated[int, Between(0, 2**62)] = 200  # steps; 0: only at the end and on interruption
    # save while training goes on: a thread writes a copy made in memory, one checkpoint at a time
    aside: bool = False
    keep: Annotated[int, Between(1, 1_000_000)] = 2  # the newest k; the best one by validation loss is kept besides


@dataclass
class LogConfig:
    # steps between plain progress lines; metrics.jsonl has a line for every step
    every: Annotated[int, Between(1, 2**62)] = 10
    # watch how decided routers are and how experts learn, and raise alarms (moe/analysis/doctor.py)
    doctor: bool = True
    experts: bool = False  # also write which experts every token took, at every step (moe/analysis/replay.py)
    tensorboard: bool = False  # also write TensorBoard files
    wandb: str = ""  # project name; "": off
    trackio: str = ""  # project name; "": off


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """How many of `steps` optimiser steps the learning rate rises."""
    return min(50, steps // 10) if optim.warmup < 0 else optim.warmup


def validate(optim: OptimConfig, train: TrainConfig) -> None:
    """Refuse schedules, batches and devices that cannot be. Raises `BadInput`."""
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise BadInput(f"optim.betas={optim.betas} must be two numbers in [0, 1).")
    if optim.momentum == 1:
        raise BadInput("optim.momentum=1.0 would never take a gradient in: accepted is at least 0 and below 1.")
    if optim.name != "muon":
        defaults = OptimConfig()
        for key in ("muon_lr", "momentum", "ns_steps", "adjust"):
            if getattr(optim, key) != getattr(defaults, key):
                raise BadInput(f"optim.{key}={getattr(optim, key)} is a setting of Muon: add optim.name=muon.")
    if optim.warmup > train.steps:
        raise BadInput(
            f"optim.warmup={optim.warmup} is longer than train.steps={train.steps}: give fewer, or -1 for a tenth of "
            "the run."
        )
    if train.batch_size % train.accumulate:
        raise BadInput(f"train.accumulate={train.accumulate} must divide train.batch_size={train.batch_size} evenly.")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", train.device):
        raise BadInput(f"train.device={train.device} is not one of auto, cpu, cuda, cuda:N.")
