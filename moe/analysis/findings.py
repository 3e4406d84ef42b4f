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
    """One thing that is not as it should be."""

    severity: int  # 3 experts are lost, 2 capacity is wasted, 1 to know when reading the figures
    layer: int  # among all layers
    text: str
    advice: str  # what to try first; "" where nothing needs to be


def findings(inspection: Inspection) -> list[Finding]:
    """What stands out, the worst first."""
    told = [finding for view in inspection.layers for finding in of_layer(view)]
    return sorted(told, key=lambda finding: -finding.severity)


def of_layer(view: LayerView) -> list[Finding]:
    """What stands out in one layer."""
    told, layer, m = [], view.layer, view.metrics
    count_E = view.rows_YE.sum(0)
    tell = lambda severity, text, advice="": told.append(Finding(severity, layer, f"Layer {layer}: {text}", advice))
    # Experts that are lost.
    if m.dead:
        numbers = [str(e) for e in range(view.n_experts) if not count_E[e]]
        more = ", …" if m.dead > 8 else ""
        tell(
            3,
            f"{m.dead} of {view.n_experts} experts take no token ({', '.join(numbers[:8])}{more}).",
            "raise balance.aux tenfold, or use router=sigmoid-bias, which balances by a bias",
        )
    elif view.starved:
        advice = "raise balance.aux; or train on: a young router evens out"
        tell(2, f"{view.starved} of {view.n_experts} experts take less than a tenth of a fair share.", advice)
    # Capacity that is wasted.
    if m.max_vio > SKEWED:
        busiest = int(count_E.argmax())
        tell(2, f"expert {busiest} takes {m.max_vio + 1:.1f} times its fair share.", "raise balance.aux")
    if m.effective_experts < FEW * view.n_experts:
        text = f"the load is as if {m.effective_experts:.1f} of {view.n_experts} experts shared it evenly."
        tell(2, text, "raise balance.aux, or lower optim.lr: routers that move fast collapse")
    if m.dropped:
        tell(2, f"{m.dropped:.1%} of the rows find no room.", "raise balance.capacity, or leave it 0")
    # What to know when reading the figures.
    if view.entropy > UNDECIDED:
        text = f"the router prefers hardly any expert (token entropy is {view.entropy:.1%} of what no preference has)."
        tell(1, text, "lower balance.aux or balance.z; what an expert takes says little here")
    if view.close > TURNING:
        text = f"{view.close:.0%} of the choices are closer than {CLOSE} in probability: another dtype may turn them."
        tell(1, text)
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
