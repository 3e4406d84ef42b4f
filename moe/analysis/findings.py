"""Whether anything is wrong with a routing, in words: what an `Inspection` shows, the worst first, and what to try.

The limits are rules of thumb, written here once. A finding says its number; none says that all is well but
`nothing_wrong`, which says what was looked at.
"""

from typing import NamedTuple

from moe.analysis.inspection import CLOSE, Inspection, LayerView

SKEWED = 1.0  # MaxVio: the busiest expert has twice its fair share
FEW = 0.5  # effective experts over all
UNDECIDED = 0.98  # mean token entropy over ln E
TURNING = 0.5  # share of tokens whose margin is under CLOSE


class Finding(NamedTuple):
    """One thing that is not as it should be, in the layer where it is worst."""

    severity: int  # 3 experts are lost, 2 capacity is wasted, 1 to know when reading the figures
    kind: str
    degree: float  # how bad it is, against others of the kind
    text: str
    advice: str  # what to try first; "" where nothing needs to be


def findings(inspection: Inspection) -> list[Finding]:
    """What stands out, the worst first: of every kind the worst layer's, with how many others it is so in."""
    of_kind: dict[str, list[Finding]] = {}
    for finding in (finding for view in inspection.layers for finding in of_layer(view)):
        of_kind.setdefault(finding.kind, []).append(finding)
    told = []
    for alike in of_kind.values():
        worst, n_others = max(alike, key=lambda finding: finding.degree), len(alike) - 1
        also = f" So it is in {n_others} other layer{'s' if n_others > 1 else ''}." if n_others else ""
        told.append(worst._replace(text=worst.text + also))
    return sorted(told, key=lambda finding: -finding.severity)


def of_layer(view: LayerView) -> list[Finding]:
    """What stands out in one layer."""
    told: list[Finding] = []
    m, count_E = view.metrics, view.rows_YE.sum(0)

    def tell(severity: int, kind: str, degree: float, text: str, advice: str = "") -> None:
        told.append(Finding(severity, kind, degree, f"Layer {view.layer}: {text}", advice))

    # Experts that are lost.
    if m.dead:
        numbers = [str(e) for e in range(view.n_experts) if not count_E[e]]
        more = ", …" if m.dead > 8 else ""
        text = f"{m.dead} of {view.n_experts} experts take no token ({', '.join(numbers[:8])}{more})."
        tell(3, "dead", m.dead, text, "raise balance.aux tenfold, or use router=sigmoid-bias, which balances by a bias")
    elif view.starved:
        text = f"{view.starved} of {view.n_experts} experts take less than a tenth of a fair share."
        tell(2, "starved", view.starved, text, "raise balance.aux; or train on: a young router evens out")
    # Capacity that is wasted.
    if m.max_vio > SKEWED:
        text = f"expert {int(count_E.argmax())} takes {m.max_vio + 1:.1f} times its fair share."
        tell(2, "skewed", m.max_vio, text, "raise balance.aux")
    if m.effective_experts < FEW * view.n_experts:
        text = f"the load is as if {m.effective_experts:.1f} of {view.n_experts} experts shared it evenly."
        advice = "raise balance.aux, or lower optim.lr: routers that move fast collapse"
        tell(2, "few", -m.effective_experts / view.n_experts, text, advice)
    if m.dropped:
        text = f"{m.dropped:.1%} of the rows find no room."
        tell(2, "dropped", m.dropped, text, "raise balance.capacity, or leave it 0")
    # What to know when reading the figures.
    if view.entropy > UNDECIDED:
        text = f"the router prefers hardly any expert (token entropy is {view.entropy:.1%} of what no preference has)."
        tell(1, "undecided", view.entropy, text, "lower balance.aux or balance.z")
    if view.close > TURNING:
        text = f"{view.close:.0%} of the choices are closer than {CLOSE} in probability: another dtype may turn them."
        tell(1, "turning", view.close, text)
    return told


def nothing_wrong(inspection: Inspection) -> str:
    """The sentence for a routing in which nothing stands out: what was looked at, with its worst number."""
    worst = max(inspection.layers, key=lambda view: view.metrics.max_vio)
    least = min(inspection.layers, key=lambda view: view.metrics.effective_experts / view.n_experts)
    return (
        f"Nothing stands out: no expert is dead or starved, the busiest takes {worst.metrics.max_vio + 1:.2f} times "
        f"its fair share (layer {worst.layer}), and at least {least.metrics.effective_experts:.1f} of "
        f"{least.n_experts} experts share the load (layer {least.layer})."
    )


def verdict(inspection: Inspection) -> str:
    """One sentence: the worst finding and how many there are, or that nothing stands out."""
    told = [finding for finding in findings(inspection) if finding.severity > 1]
    if not told:
        return nothing_wrong(inspection)
    others = f" {len(told) - 1} more stand{'s' if len(told) == 2 else ''} out." if len(told) > 1 else ""
    return f"{told[0].text}{others}"
