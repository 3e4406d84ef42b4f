"""Alarms while a run trains: what goes wrong with its routing, the likely cause, and the first setting to try.

A doctor reads metrics lines in order and keeps nothing else, so that one that reads them from the file again knows what
the one of the interrupted run knew. Nothing of the training depends on it. Every alarm is raised once, and again only
after it has been quiet for as long as it looks back.

How often each alarm fires rightly and wrongly was measured by fault injection: docs/alarms.md.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moe.run.summary import Alarm, LayerMetrics, MetricsLine

WINDOW = 50  # steps that a rule looks back
MEASURED = 10  # values that it looks back of what is measured every log.every steps alone
LEAP = 0.3  # nats: a smaller one of the loss is no spike, unless the loss is
TIMES = 5.0  # the highest of the last FEW losses: a spike however small they are, and however fast they fell before
FEW = 5
EVERY = 10  # steps from one look to the next
YOUNG = 100  # steps in which nothing of a router is said: it has not learnt yet
MORE = "balance.aux ten times as high, and at least 0.01"  # what most advise first
ENOUGH = 20.0  # rows of a fair load from which on an expert with none, or a tenth, is none by chance


class Rule(NamedTuple):
    """One alarm of a layer: what it reads, when it fires, and its words."""

    kind: str
    read: Callable[[LayerMetrics], float | None]
    fires: Callable[[list[float]], bool]  # of the last values
    evidence: str  # with {now}, {least} and {most}
    cause: str
    advice: str
    needs: int = WINDOW  # values
    rows: float = 0.0  # a fair load must have: fewer are by chance what the rule looks for


RULES = (
    Rule(
        "dead experts",
        lambda layer: float(layer.dead),
        lambda values: min(values) >= 1,
        f"at least {{least:.0f}} took no token in each of the last {WINDOW} steps",
        "a router that has settled on the others",
        f"{MORE}, or router=sigmoid-bias",
        rows=ENOUGH,
    ),
    Rule(
        "starved experts",
        lambda layer: None if layer.starved is None else float(layer.starved),
        lambda values: min(values) >= 1,
        f"at least {{least:.0f}} took less than a tenth of a fair share in each of the last {WINDOW} steps",
        "too little pull towards an even load, or an expert whose output does harm",
        MORE,
        rows=ENOUGH,
    ),
    Rule(
        "uneven load",
        lambda layer: layer.max_vio,
        lambda values: statistics.median(values) > 1.5,
        f"the median MaxVio of the last {WINDOW} steps is {{now:.2f}}",
        "a balance that is too weak, too slow, or of the wrong sign",
        f"{MORE}; of a router with a bias balance.bias_rate",
    ),
    Rule(
        "router without doubt",
        lambda layer: layer.entropy,
        lambda values: statistics.median(values) < 0.15,
        "token entropy is {now:.3f} of what no preference has",
        "a router that learns too fast: it can hardly change its mind any more",
        "a lower optim.lr, or balance.z ten times as high",
        needs=MEASURED,
    ),
    Rule(
        "bias runs away",
        lambda layer: layer.bias,
        lambda values: statistics.median(values) > 1.0,
        "the largest selection bias is {now:.2f}, and scores lie between 0 and 1",
        "steps of the bias that are too large",
        "balance.bias_rate a tenth as high",
    ),
    Rule(
        "logits grow",
        lambda layer: layer.losses.get("z"),
        lambda values: statistics.median(values) > 100.0,
        "the mean squared log-sum-exp is {now:.0f}",
        "no z-loss, or a router that began too large",
        "balance.z=0.001, or a lower model.init_std",
    ),
    Rule(
        "an expert hardly learns",
        lambda layer: layer.weakest,
        lambda values: max(values) < 0.05,
        f"the smallest gradient of an expert was at most {{most:.3f}} of the median’s, {MEASURED} times in a row",
        "an expert that gets few tokens, or none of any weight",
        MORE,
        needs=MEASURED,
    ),
)


KINDS = (*(rule.kind for rule in RULES), "loss spike")


@dataclass
class _Series:
    """What a rule has read of a layer: the last values, and when it fired last."""

    last: deque[float]
    fired: float = -math.inf  # step


class Doctor:
    """Reads lines, in order. `fair`: by MoE layer, the rows of a step that a fair load has; not given: many."""

    def __init__(self, fair: dict[int, float] | None = None) -> None:
        self.fair = fair or {}
        self.series: dict[tuple[str, int], _Series] = {}
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spiked = -math.inf  # step

    def catch_up(self, lines: Iterable[MetricsLine]) -> "Doctor":
        """Read what was written before an interruption."""
        for line in lines:
            self.read(line)
        return self

    def read(self, line: MetricsLine) -> list[Alarm]:
        """The alarms that this line raises."""
        alarms = self._spike(line)
        for layer in line.layers or [] if line.step > YOUNG else []:
            for rule in RULES:
                value = rule.read(layer)
                few = self.fair.get(layer.layer, math.inf) < rule.rows
                if few or value is None or not math.isfinite(value):
                    continue
                alarm = self._rule(rule, layer.layer, line.step, value)
                alarms += [alarm] if alarm else []
        return alarms

    def _rule(self, rule: Rule, layer: int, step: int, value: float) -> Alarm | None:
        """Read one more value; the alarm, if it begins here."""
        series = self.series.get((rule.kind, layer))
        if series is None:
            series = self.series[rule.kind, layer] = _Series(deque(maxlen=rule.needs))
        series.last.append(value)
        if step % EVERY or len(series.last) < rule.needs or not rule.fires(values := list(series.last)):
            return None
        since, series.fired = step - series.fired, step
        if since <= WINDOW:
            return None
        words = {"now": statistics.median(values), "least": min(values), "most": max(values)}
        return Alarm(rule.kind, step, layer, rule.evidence.format(**words), rule.cause, rule.advice)

    def _spike(self, line: MetricsLine) -> list[Alarm]:
        """The alarm for a loss far above those before it."""
        loss = line.lm_loss
        if loss is None or not math.isfinite(loss):
            return []
        alarms = []
        if _leaps(loss, list(self.losses)) and line.step > self.spiked + WINDOW:
            self.spiked = line.step
            middle = statistics.median(self.losses)
            evidence = f"{loss:.3g} nats per token, after a median of {middle:.3g} over {len(self.losses)} steps"
            cause = "a bad batch, or a learning rate at its limit"
            alarms = [Alarm(KINDS[-1], line.step, None, evidence, cause, "a lower optim.lr, or optim.clip=1.0")]
        self.losses.append(loss)
        return alarms


def _leaps(loss: float, before: list[float]) -> bool:
    """Whether a loss is far above those before it: several times the highest of the last few, or by their spread."""
    if len(before) >= FEW and 0 < TIMES * max(before[-FEW:]) < loss:
        return True
    if len(before) < WINDOW or loss <= min(before) + LEAP:  # most steps end here, before anything is sorted
        return False
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in before)
    return loss > middle + max(6 * spread, LEAP)
