"""What a run's model itself has to be asked: what its experts are worth, which are alike, and how they came about."""

from dataclasses import dataclass
from pathlib import Path

from moe.analysis.effects import Effect, effects, every_expert, keep, measure
from moe.analysis.redundancy import Redundancy, redundancy
from moe.analysis.stability import Lookahead, OverTime, lookahead, over_checkpoints
from moe.analysis.tracing import What, windows_of_run
from moe.config.router import facts
from moe.run.load import find_checkpoint, load_run

SHARES = (0.25, 0.125)  # of the experts, that are kept


@dataclass(frozen=True)
class Probed:
    """The answers, all of the same text."""

    sampling: str
    importance: dict[tuple[int, int], Effect]  # every expert masked in turn, by (layer among all layers, expert)
    kept: dict[float, list[Effect]]  # by the share of the experts: by use, by each domain's use, and at random
    alike: list[Redundancy]  # by MoE layer
    lookahead: list[Lookahead]
    over_time: OverTime | None  # None where the run has a single checkpoint

    @property
    def passes(self) -> int:
        """Experts that were masked."""
        return len(self.importance)


def probe(run: Path, which: str, what: What, trust: bool = False) -> Probed:
    """Ask the run's model at the checkpoint `which`. Masking every expert takes L · E passes over the text, each from
    the masked layer on. A router that keeps no fixed number of experts is not asked about keeping few of them. Raises
    `BadInput` as `load_run` does, and for a dense model or a soft router."""
    model, tokenizer, cfg = load_run(run, which, trust)
    windows = windows_of_run(what, cfg, tokenizer)
    batches, domains = list(windows), windows.domains
    variants = every_expert(model)
    told = effects(measure(model, batches, domains, variants), variants)
    importance = {(effect.changes[0].layer, effect.changes[0].experts[0]): effect for effect in told}
    maskable = facts(cfg.router).scored and all(router.fixed_k for router in model.routers())
    checkpoint = find_checkpoint(run / "checkpoints", which).name
    names = sorted((path.name for path in (run / "checkpoints").glob("step-*")), key=lambda name: int(name[5:]))
    names = names[: names.index(checkpoint) + 1]
    return Probed(
        windows.sampling,
        importance,
        {share: keep(model, batches, domains, share) for share in SHARES} if maskable else {},
        redundancy(model, batches),
        lookahead(model, batches),
        over_checkpoints(run, what, names, trust) if len(names) > 1 else None,
    )
