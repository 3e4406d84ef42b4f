"""Distillation: a finished run as the teacher of another, which learns its probabilities besides the text."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config.run import Config
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run.load import load_run


def load_teacher(cfg: Config, tokenizer: str, device: torch.device) -> Transformer | None:
    """The model of `cfg.distill.teacher`, in eval mode; None where no teacher is asked for.
    `tokenizer` is the fingerprint of the student's.

    Raises `BadInput` for a folder that is no run's, a router of one's own that is not trusted, another
    tokenizer or vocabulary, and a shorter context."""
    if not cfg.distill.teacher:
        return None
    folder = Path(cfg.distill.teacher)
    teacher, its_tokenizer, _ = load_run(folder, cfg.distill.which, cfg.trust or cfg.router.name)
    if its_tokenizer.fingerprint != tokenizer:
        raise BadInput(
            f"distill.teacher={folder} has another tokenizer ({its_tokenizer.fingerprint[:12]}) than this run "
            f"({tokenizer[:12]}): the two must read the same ids."
        )
    for key, teachers, students in (
        ("vocab_size", teacher.cfg.vocab_size, cfg.model.vocab_size),
        ("context", teacher.cfg.context, cfg.model.context),
    ):
        if teachers < students or (key == "vocab_size" and teachers != students):
            raise BadInput(f"distill.teacher={folder} has model.{key}={teachers}, and this run {students}.")
    return teacher.to(device)


def distill_loss(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(teacher / T) || softmax(student / T)), in nats, the mean over tokens (Hinton et al., 1503.02531):
    logits (..., V) and (..., V) -> scalar, in float32 at least. T² keeps the gradient's size whatever T. The teacher
    gets no gradient. Raises `BadInput` for a temperature that is not above 0."""
    if not 0 < temperature < float("inf"):
        raise BadInput(f"temperature={temperature} is out of range: accepted is above 0.")
    dtype = torch.promote_types(student_BSV.dtype, torch.float32)
    student_NV = F.log_softmax(student_BSV.to(dtype).flatten(0, -2) / temperature, dim=-1)
    teacher_NV = F.log_softmax(teacher_BSV.detach().to(dtype).flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True)
