"""What the inspector's page says without its script: sentences, tables and small charts of a `Look`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.pages.charts import Series, line_chart
from moe.analysis.caveats import CAVEATS
from moe.analysis.effects import Difference
from moe.analysis.evidence import Evidence
from moe.analysis.findings import findings, verdict
from moe.analysis.history import History
from moe.analysis.inspection import Inspection, LayerView
from moe.analysis.probing import Probed
from moe.data.tokenizer import Tokenizer
from moe.run.terminal import printable

MISSED = 12  # experts in the table of those that are missed most


class Look(NamedTuple):
    """One run, or one model of another library, as the page shows it."""

    name: str
    inspection: Inspection
    tokenizer: Tokenizer | None  # None: token ids are shown
    history: History | None = None  # None: nothing is known of its training
    evidence: Evidence | None = None  # None: there are no domains to compare
    probed: Probed | None = None  # None: the model was not asked
    unasked: str = ""  # why not


class Chart(NamedTuple):
    """A figure, and its numbers as CSV."""

    svg: str
    csv: str


class SmallTable(NamedTuple):
    """Words in rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def words(look: Look) -> dict[str, Any]:
    """A run's sentences, tables and charts."""
    inspection = look.inspection
    about, views = inspection.about, inspection.layers
    # The worst is the page's first sentence.
    told = findings(inspection)
    worst = told[0] if told and told[0].severity > 1 else None
    return {
        "name": printable(look.name),
        "verdict": printable(verdict(inspection)),
        "advice": worst.advice if worst else "",
        "findings": told[1:] if worst else told,
        "layers": layer_table(inspection),
        "decisions": decision_chart(views),
        "coverage": coverage_chart(views),
        "serving": serving_table(views),
        "distinct": distinct_chart(inspection),
        "loss": loss_chart(look.history),
        "alarms": [printable(alarm.sentence()) for alarm in look.history.alarms] if look.history else [],
        "information": information_chart(look),
        "caveats": {name.replace(" ", "_"): CAVEATS[name].cannot_tell for name in CAVEATS},
        "names": names_table(look),
        "documents": look.evidence.documents if look.evidence else 0,
        "kept": kept_table(look.probed) if look.probed else None,
        "worst": worth_table(look.probed) if look.probed and look.probed.importance else None,
        "probed": look.probed,
        "unasked": look.unasked,
        "saturation": saturation_chart(look.probed),
        "decided": decided_table(look.probed) if look.probed and look.probed.decided else None,
        "history": look.history is not None and len(look.history.steps) > 0,
        "provenance": provenance(look),
        "sampling": printable(inspection.sampling),
        "k": about.k,
        "n_tokens": len(inspection.tokens.token),
    }


def layer_table(inspection: Inspection) -> SmallTable:
    """A row per MoE layer."""
    headings = (
        "layer", "experts", "MaxVio", "effective", "dead", "starved", "Gini", "CV²", "entropy", "margin", "close",
        "bits of domain",
    )  # fmt: skip
    rows = [
        (
            str(view.layer), str(view.n_experts), f"{view.metrics.max_vio:.2f}",
            f"{view.metrics.effective_experts:.1f}", str(view.metrics.dead), str(view.starved), f"{view.gini:.3f}",
            f"{view.cv_squared:.3f}", known(view.entropy, ".1%"), known(view.margin, ".3f"), known(view.close, ".0%"),
            f"{view.information:.3f}",
        )
        for view in inspection.layers
    ]  # fmt: skip
    return SmallTable(headings, rows)


def known(value: float, form: str) -> str:
    """A number, or a dash for one that is not known."""
    return "–" if math.isnan(value) else f"{value:{form}}"


def chart(series: Sequence[Series], x_title: str, y_title: str, whole: bool = False) -> Chart:
    """Curves, and their points."""
    lines = [f"curve,{x_title.replace(',', '')},{y_title}"]
    lines += [f"{one.name},{x:g},{y:g}" for one in series for x, y in zip(one.x, one.y, strict=True)]
    return Chart(line_chart(series, x_title, y_title, whole), "\n".join(lines))


def decision_chart(views: Sequence[LayerView]) -> Chart | None:
    """Entropy and margin by layer, where routers have scores and there is more than one layer."""
    scored = [view for view in views if not math.isnan(view.entropy)]
    if len(scored) < 2:
        return None
    x = [float(view.layer) for view in scored]
    curve = lambda name, y: Series(name, x, y, y, y)
    curves = [curve("entropy", [view.entropy for view in scored]), curve("margin", [view.margin for view in scored])]
    return chart(curves, "layer", "share of what it could be", whole=True)


def coverage_chart(views: Sequence[LayerView]) -> Chart:
    """Share of the rows that the busiest experts take: the most even layer, the most skewed, and an even load."""
    ordered = sorted(views, key=lambda view: view.gini)
    even = Series("even", [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0])
    curves = [even]
    for view in {id(view): view for view in (ordered[0], ordered[-1])}.values():
        share = [0.0, *view.coverage_E.tolist()]
        x = (np.arange(len(share)) / (len(share) - 1)).tolist()
        curves.append(Series(f"layer {view.layer}", x, share, share, share))
    return chart(curves, "share of the experts, busiest first", "share of the rows", whole=True)


def serving_table(views: Sequence[LayerView]) -> SmallTable:
    """Per number of devices, how much longer the busiest takes: mean and worst of the layers."""
    degrees = sorted({n for view in views for n, _, _ in view.devices})
    rows = []
    for degree in degrees:
        plain = [before for view in views for n, before, _ in view.devices if n == degree]
        copied = [after for view in views for n, _, after in view.devices if n == degree]
        rows.append((str(degree), *(f"{f(v):.2f}" for v in (plain, copied) for f in (np.mean, np.max))))
    headings = ("devices", "busiest over mean", "worst layer", "with a copy each", "worst layer")
    return SmallTable(headings, rows)


def distinct_chart(inspection: Inspection) -> Chart:
    """Different experts that a decode batch reads, over those that there are, by layer with the most and the fewest,
    against random choice."""
    views = inspection.layers
    ends = sorted(views, key=lambda view: view.distinct[-1][1] / view.n_experts)
    curves = []
    for view in {id(view): view for view in (ends[0], ends[-1])}.values():
        x = [math.log2(n) for n, _ in view.distinct]
        y = [count / view.n_experts for _, count in view.distinct]
        curves.append(Series(f"layer {view.layer}", x, y, y, y))
    k, n_experts = inspection.about.k, ends[0].n_experts
    x = [math.log2(n) for n, _ in ends[0].distinct]
    y = [1 - (1 - k / n_experts) ** n for n, _ in ends[0].distinct]
    curves.append(Series("random", x, y, y, y))
    return chart(curves, "log₂ of the tokens in a batch", "share of the experts", whole=True)


def loss_chart(history: History | None) -> Chart | None:
    """Validation loss over training."""
    if history is None or len(history.val_steps) < 2:
        return None
    x = [float(step) for step in history.val_steps]
    loss = history.val_loss
    return chart([Series("validation", x, loss, loss, loss)], "steps", "loss (nats per token)")


def provenance(look: Look) -> list[tuple[str, str]]:
    """Where every figure comes from."""
    about = look.inspection.about
    router = about.router.get("name", "")
    pairs = [
        ("Model", about.run),
        ("Checkpoint", about.checkpoint or "the folder's weights"),
        ("Tokens", look.inspection.sampling),
        ("Tokenizer", f"{look.tokenizer.name}, {about.tokenizer[:12]}" if look.tokenizer else "none: ids are shown"),
        ("Router", f"{router}, K = {about.k}"),
        ("Commit", about.commit or "unknown"),
        ("Trace", f"schema {about.schema}; experts are logical numbers"),
    ]
    return [(name, printable(value)) for name, value in pairs]


def information_chart(look: Look) -> Chart | None:
    """Bits of domain by layer, with what chance gives."""
    if look.evidence is None or len(look.inspection.layers) < 2:
        return None
    of, x = look.evidence.of.information, [float(view.layer) for view in look.inspection.layers]
    low, high = (np.where(np.isnan(end), of.value, end).tolist() for end in (of.low, of.high))
    chance = look.evidence.chance_L.tolist()
    curves = [Series("bits", x, of.value.tolist(), low, high), Series("chance", x, chance, chance, chance)]
    return chart(curves, "layer", "bits that an expert tells of the domain", whole=True)


def names_table(look: Look) -> SmallTable | None:
    """Experts that may be called after a domain; None where nothing could be compared."""
    if look.evidence is None:
        return None
    layers, domains = look.inspection.about.layers, look.inspection.about.domains
    rows = [
        (
            f"layer {layers[name.layer]}, expert {name.expert}", printable(domains[name.domain]),
            f"{name.lift:.1f} ({name.lift_low:.1f} to {name.lift_high:.1f})",
            f"{name.p:.3f}", f"{name.p_of_tokens:.3f}",
        )
        for name in sorted(look.evidence.earned(), key=lambda name: -name.lift)
    ]  # fmt: skip
    headings = ("expert", "domain", "times as often as anything", "p", "p beyond tokens")
    return SmallTable(headings, rows)


def kept_table(probed: Probed) -> SmallTable | None:
    """The loss with a share of the experts alone."""
    rows = []
    for share, told in probed.kept.items():
        random = [effect.total.difference for effect in told if effect.what.startswith("at random")]
        named = {effect.what: interval(effect.total) for effect in told}
        by_chance = f"{min(random):+.3f} to {max(random):+.3f}"
        rows.append((f"{share:.1%}", named["by use"], named["by each domain's use"], by_chance))
    return SmallTable(("experts kept", "the busiest", "each domain’s busiest", "at random"), rows) if rows else None


def worth_table(probed: Probed) -> SmallTable:
    """The experts that the loss would miss most."""
    ordered = sorted(probed.importance.items(), key=lambda pair: -pair[1].total.difference)[:MISSED]
    rows = []
    for (layer, expert), effect in ordered:
        domain, most = max(effect.domains.items(), key=lambda pair: pair[1].difference)
        rows.append((f"layer {layer}, expert {expert}", interval(effect.total), f"{domain} {most.difference:+.3f}"))
    return SmallTable(("masked", "loss (nats per token)", "most in"), rows)


def decided_table(probed: Probed) -> SmallTable:
    """What the routers' probabilities say of how sure they are."""
    rows = [
        (
            str(one.layer), f"{one.information / math.log(max(2, one.n_experts)):.1%}", f"{one.top_k_mass:.1%}",
            "".join(f"{ahead.agreement:.0%} (by chance {ahead.chance:.0%})" for ahead in probed.lookahead
                    if ahead.layer == one.layer) or "–",
        )
        for one in probed.decided
    ]  # fmt: skip
    return SmallTable(
        ("layer", "router information, of ln E", "mass of the K largest", "agreement a layer ahead"), rows
    )


def interval(difference: Difference) -> str:
    """A difference with its interval."""
    return f"{difference.difference:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def saturation_chart(probed: Probed | None) -> Chart | None:
    """How much of the last checkpoint's routing earlier ones have, the mean over the layers, and by chance; and how
    much changed since the checkpoint before."""
    if probed is None or probed.over_time is None:
        return None
    told = probed.over_time.checkpoints
    x = [float(one.step) for one in told]
    mean = [float(np.mean(one.saturation)) for one in told]
    low, high = ([float(end(one.saturation)) for one in told] for end in (min, max))
    chance = [float(np.mean(probed.over_time.chance))] * len(told)
    churn = [float(np.mean(one.churn)) for one in told[1:]]
    return chart(
        [
            Series("saturation", x, mean, low, high), Series("by chance", x, chance, chance, chance),
            Series("churn", x[1:], churn, churn, churn),
        ],
        "step", "share of the choices", whole=True,
    )  # fmt: skip


def side_by_side(looks: Sequence[Look]) -> SmallTable:
    """A row per run: its worst layer by each number."""
    rows = []
    for look in looks:
        views = look.inspection.layers
        worst = lambda name, views=views: max(getattr(view, name) for view in views)
        rows.append(
            (
                printable(look.name),
                f"{max(view.metrics.max_vio for view in views):.2f}",
                f"{min(view.metrics.effective_experts / view.n_experts for view in views):.0%}",
                str(sum(view.metrics.dead for view in views)),
                f"{worst('gini'):.3f}",
                f"{np.mean([view.information for view in views]):.3f}",
                known(float(np.mean(look.inspection.tokens.loss)), ".4f"),
            )
        )
    headings = ("run", "worst MaxVio", "fewest effective", "dead", "worst Gini", "bits of domain", "loss")
    return SmallTable(headings, rows)
