"""What routing does, as one self-contained HTML page: no network, it opens from disk.

What can be read without a script (words, tables, small charts) is in the page as text; the rest is drawn by
inspector.js from arrays that stand in it (`packed`). Documents may hold anything: their text reaches the page as JSON
in which no tag can stand, is only ever set as text, and the page's policy lets no script run but its own.

Letters beyond the glossary: L the MoE layers, C passages, W tokens of one, N what is left of a list.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from experiments.pages.charts import Series, line_chart
from experiments.pages.packed import Pack, index_kind
from moe.analysis.caveats import CAVEATS
from moe.analysis.effects import Difference
from moe.analysis.evidence import Evidence
from moe.analysis.findings import findings, verdict
from moe.analysis.history import History
from moe.analysis.inspection import Inspection, LayerView
from moe.analysis.probing import Probed
from moe.data.tokenizer import Tokenizer
from moe.run.terminal import printable

HERE = Path(__file__).parent
TEXT_BYTES = 2_000_000  # what the passages of a run may take in the page, before they are compressed
HISTORY_BYTES = 2_000_000  # the same of loads over training
MISSED = 12  # experts in the table of those that are missed most
NONE = -1
AROUND = 7  # tokens to either side of a passage's own
ARROWS = str.maketrans("\n\t\u200b\u200c\u200d\ufeff\u00ad", "↵⇥␣␣␣␣␣")
SCALE = 100  # of ratios that are kept as whole numbers


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


def render(looks: Sequence[Look]) -> str:
    """The page of one look, or of several side by side."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pack = Pack()
    data = {"runs": [packed(pack, i, look) for i, look in enumerate(looks)]}
    script = (HERE / "inspector.js").read_text(encoding="utf-8")
    return environment.from_string((HERE / "inspector.html").read_text(encoding="utf-8")).render(
        looks=[words(look) for look in looks],
        together=side_by_side(looks) if len(looks) > 1 else None,
        data=as_json(data | {"arrays": pack.directory}),
        block=pack.text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def as_json(tree: Any) -> str:
    """JSON in which no tag and no comment can begin or end."""
    text = json.dumps(tree, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as people read it: its text, bytes that are no text as \\x.., line breaks and tabs as arrows, and what
    else would not show as pictures; its id where there is no tokenizer."""
    if tokenizer is None or token >= tokenizer.vocab_size:
        return f"⟨{token}⟩"
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return printable(text.translate(ARROWS)) or f"⟨{token}⟩"


# What the script is given.


def packed(pack: Pack, i: int, look: Look) -> dict[str, Any]:
    """Add a run's arrays to the pack, by names that begin with its number; what of it is no array."""
    inspection, views = look.inspection, look.inspection.layers
    about = inspection.about
    widest = max(about.n_experts)
    add = lambda name, array: pack.add(f"{i}/{name}", array)
    # Load and domains.
    by_layer = lambda arrays, kind: np.stack([padded(array, widest).astype(kind) for array in arrays])
    add("domain", by_layer([view.rows_YE for view in views], np.uint32))
    # Cards: tokens, partners, passages.
    strings = Strings(look.tokenizer)
    for name in ("taken", "predicted"):
        tops = [getattr(view, name) for view in views]
        numbered = [strings.numbers(top.token) for top in tops]
        add(f"{name}/token", by_experts(numbered, widest, NONE).astype(np.int32))
        add(f"{name}/rows", by_experts([top.rows for top in tops], widest, 0).astype(np.int32))
        add(f"{name}/lift", by_experts([top.lift for top in tops], widest, 0).astype(np.float32))
    for name in ("together", "onward"):
        kept = [partners for view in views if (partners := getattr(view, name)) is not None]
        if kept:
            width = max(partners.expert.shape[1] for partners in kept)
            square = lambda array, fill, width=width: np.pad(
                array, ((0, 0), (0, width - array.shape[1])), constant_values=fill
            )
            experts = [square(p.expert, NONE) for p in kept]
            ratios = [np.round(square(p.ratio, 0) * SCALE).clip(0, 2**16 - 1) for p in kept]
            add(f"{name}/expert", by_experts(experts, widest, NONE).astype(np.int16))
            add(f"{name}/ratio", by_experts(ratios, widest, 0).astype(np.uint16))
    add("contexts", by_experts([passages(inspection, view, strings) for view in views], widest, NONE).astype(np.int32))
    # Passages token by token, and loads over training.
    chosen_N = text_rows(inspection)
    text = text_arrays(inspection, chosen_N, strings)
    for name, array in text.items():
        add(f"text/{name}", array)
    history = look.history
    if history and len(history.load_steps):
        steps_N = thin(len(history.load_steps), HISTORY_BYTES // max(1, 2 * history.load_NLE[0].size))
        load_NLE = np.nan_to_num(history.load_NLE[steps_N])
        add("history/load", np.round(load_NLE * SCALE).clip(0, 2**16 - 1).astype(np.uint16))
        add("history/load_steps", np.array(history.load_steps, np.int32)[steps_N])
    if history and len(history.steps):
        add("history/effective", history.effective_NL.astype(np.float32))
        add("history/max_vio", history.max_vio_NL.astype(np.float32))
        add("history/steps", np.array(history.steps, np.int32))
    if look.evidence:
        for end in ("low", "high"):
            lift = np.nan_to_num(getattr(look.evidence.of.lift, end)).transpose(0, 2, 1)
            add(f"lift/{end}", np.round(lift * SCALE).clip(0, 2**16 - 1).astype(np.uint16))
    if look.probed:
        importance = [[importance_of(look, view, e) for e in range(widest)] for view in views]
        add("importance", np.array(importance, np.float32))
        add("twin", np.stack([twins(look, view, widest) for view in views]).astype(np.float32))
    return {
        "name": printable(look.name),
        "earned": [name._asdict() for name in look.evidence.earned()] if look.evidence else [],
        "layers": about.layers,
        "n_experts": about.n_experts,
        "k": about.k,
        "domains": [printable(domain) for domain in about.domains],
        "tokens": len(inspection.tokens.token),
        "around": AROUND,
        "none": NONE,
        "scale": SCALE,
        "strings": strings.texts,
    }


def importance_of(look: Look, view: LayerView, expert: int) -> tuple[float, float, float]:
    """What masking an expert does to the loss, in nats, with both ends of its interval; NaN where it was not tried."""
    assert look.probed is not None, "asked of a model that was"
    effect = look.probed.importance.get((view.layer, expert))
    return (effect.total.difference, effect.total.low, effect.total.high) if effect else (math.nan,) * 3


def twins(look: Look, view: LayerView, widest: int) -> np.ndarray:
    """Of every expert its nearest twin, how alike their outputs are, and how alike they are by chance: (E, 3)."""
    assert look.probed is not None, "asked of a model that was"
    alike = next(one for one in look.probed.alike if one.layer == view.layer)
    twin_E3 = np.full((widest, 3), NONE, float)
    for e, twin in enumerate(alike.twin_E):
        if twin >= 0:
            twin_E3[e] = twin, alike.cosine_EE[e, twin], alike.chance_cosine
    return twin_E3


class Strings:
    """The texts of the tokens that the page shows, each once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.number_of: dict[int, int] = {}

    def numbers(self, token: np.ndarray) -> np.ndarray:
        """Every token's place in `texts`; a negative one stays."""
        tokens, inverse = np.unique(token, return_inverse=True)
        places = [NONE if t < 0 else self.number(int(t)) for t in tokens]
        return np.array(places, np.int64)[inverse].reshape(token.shape)

    def number(self, token: int) -> int:
        """One token's."""
        if token not in self.number_of:
            self.number_of[token] = len(self.texts)
            self.texts.append(shown(self.tokenizer, token))
        return self.number_of[token]


def padded(array: np.ndarray, width: int) -> np.ndarray:
    """With zeros to the right, to so many columns."""
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def by_experts(arrays: Sequence[np.ndarray], widest: int, fill: int) -> np.ndarray:
    """Arrays (E, ...) of layers that may have different numbers of experts, as one (L, E, ...)."""
    fitted = [np.pad(a, [(0, widest - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=fill) for a in arrays]
    return np.stack(fitted)


def passages(inspection: Inspection, view: LayerView, strings: Strings) -> np.ndarray:
    """The tokens round every passage of every expert, (E, C, W) as numbers of texts, the one in question in the
    middle; `NONE` beyond the ends of its window, and where there is no passage."""
    tokens, around = inspection.tokens, np.arange(-AROUND, AROUND + 1)
    row_ECW = view.contexts_EC[:, :, None] + around
    inside_ECW = (row_ECW >= 0) & (row_ECW < len(tokens.token)) & (view.contexts_EC[:, :, None] >= 0)
    row_ECW = row_ECW.clip(0, len(tokens.token) - 1)
    same_ECW = tokens.window[row_ECW] == tokens.window[view.contexts_EC.clip(0)][:, :, None]
    return strings.numbers(np.where(inside_ECW & same_ECW, tokens.token[row_ECW], NONE))


def text_rows(inspection: Inspection) -> np.ndarray:
    """Rows of the tokens that the page shows one by one: whole windows, spread evenly."""
    tokens, routes = inspection.tokens, inspection.routes
    start_W = np.flatnonzero(np.diff(tokens.window, prepend=NONE))
    size = len(tokens.token) // len(start_W)
    bytes_of_token = 3 * routes.expert_TLK[0].size + 8
    chosen = thin(len(start_W), max(1, TEXT_BYTES // (bytes_of_token * size)))
    return np.flatnonzero(np.isin(tokens.window, tokens.window[start_W[chosen]]))


def thin(n: int, most: int) -> np.ndarray:
    """At most so many of n places, spread evenly."""
    return np.linspace(0, n - 1, min(n, max(1, most))).round().astype(int)


def text_arrays(inspection: Inspection, row_N: np.ndarray, strings: Strings) -> dict[str, np.ndarray]:
    """What the page shows of these tokens: text, where they stand, loss, and in every layer experts, weights and
    entropy (as a share of ln E, of 255)."""
    tokens, routes, about = inspection.tokens, inspection.routes, inspection.about
    expert_NLK = routes.expert_TLK[row_N].astype(np.int64)
    kind = index_kind(max(about.n_experts))  # one number more than there are experts: none
    none = max(about.n_experts)
    scale_L = np.array([math.log(n) if n > 1 else 1.0 for n in about.n_experts])
    entropy_NL = np.nan_to_num(routes.entropy_TL[row_N] / scale_L)
    return {
        "token": strings.numbers(tokens.token[row_N]).astype(np.int32),
        "doc": tokens.doc[row_N].astype(np.int32),
        "pos": tokens.pos[row_N].astype(np.int32),
        "domain": tokens.domain[row_N].astype(np.int32),
        "window": tokens.window[row_N].astype(np.int32),
        "loss": np.nan_to_num(tokens.loss[row_N]).astype(np.float32),
        "expert": np.where(expert_NLK < 0, none, expert_NLK).astype(kind),
        "weight": np.round(np.nan_to_num(routes.weight_TLK[row_N]).clip(0, 1) * 255).astype(np.uint8),
        "entropy": np.round(entropy_NL.clip(0, 1) * 255).astype(np.uint8),
    }


# What can be read without the script.


def words(look: Look) -> dict[str, Any]:
    """A run's sentences, tables and charts."""
    inspection = look.inspection
    about, views = inspection.about, inspection.layers
    return {
        "name": printable(look.name),
        "verdict": printable(verdict(inspection)),
        "findings": findings(inspection),
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
        "worst": worth_table(look.probed) if look.probed else None,
        "probed": look.probed,
        "unasked": look.unasked,
        "saturation": saturation_chart(look.probed),
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
            f"{name.share:.0%} ({name.share_low:.0%} to {name.share_high:.0%})", f"{name.p:.3f}",
            f"{name.p_of_tokens:.3f}",
        )
        for name in sorted(look.evidence.earned(), key=lambda name: -name.lift)
    ]  # fmt: skip
    headings = ("expert", "domain", "times as often as anything", "of the domain’s tokens", "p", "p beyond tokens")
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


def interval(difference: Difference) -> str:
    """A difference with its interval."""
    return f"{difference.difference:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def saturation_chart(probed: Probed | None) -> Chart | None:
    """How much of the last checkpoint's routing earlier ones have, the mean over the layers, and by chance."""
    if probed is None or probed.over_time is None:
        return None
    told = probed.over_time.checkpoints
    x = [float(one.step) for one in told]
    mean = [float(np.mean(one.saturation)) for one in told]
    low, high = ([float(end(one.saturation)) for one in told] for end in (min, max))
    chance = [float(np.mean(probed.over_time.chance))] * len(told)
    return chart(
        [Series("saturation", x, mean, low, high), Series("chance", x, chance, chance, chance)],
        "step", "agreement with the last checkpoint", whole=True,
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
                f"{np.mean(look.inspection.tokens.loss):.4f}",
            )
        )
    headings = ("run", "worst MaxVio", "fewest effective", "dead", "worst Gini", "bits of domain", "loss")
    return SmallTable(headings, rows)
