"""Claims about the table of a sweep, from comparisons that nobody trained."""

import dataclasses
import json

import pytest

from experiments.compare import CompareConfig, describe
from experiments.pages import sweep_table
from experiments.pages.sweep_table import HEADINGS, Job, judged, labels, lines, notes, report
from experiments.pages.tables import markdown
from experiments.stats import arms, statistics
from experiments.stats.verdict import Pair
from tests.fake_runs import fake_pair, with_dropped, with_routing


def fake_job(tmp_path, overrides, seed=0, difference=-0.08, twin="aaaa", leak=0.0, routing=True) -> Job:
    """A comparison of one seed; its MoE's layers have MaxVio 0.5 and 1.5."""
    moe, dense = fake_pair(difference=difference, seed=seed)
    if routing:
        with_routing(moe, max_vio=(0.5, 1.5), effective_experts=12.0, skipped=0.125)
        with_dropped(moe, lambda step: (0.25, 0.5) if step % 2 else (0.5, 0.75))
    pair = Pair(moe._replace(leak=leak), dense._replace(leak=0.0))
    folder = tmp_path / f"{overrides}-{seed}"
    result = describe(CompareConfig(), folder, [pair], "python -m experiments.compare -m", twin)
    return Job([*overrides.split(), f"seed={seed}"], result)


@pytest.fixture
def jobs(tmp_path):
    """Two routers with three seeds each; the second is better and leaks."""
    found = []
    for router, difference, leak in (("softmax", -0.01, 0.0), ("expert-choice", -0.2, 0.03)):
        for seed in (0, 1, 2):
            overrides = f"experiment=routers router={router}"
            found.append(fake_job(tmp_path, overrides, seed, difference - 0.01 * seed, leak=leak * seed))
    return found


def test_there_is_a_line_per_router_and_one_for_the_twin_the_lowest_loss_first(jobs):
    found = lines(jobs)
    assert [line.label for line in found] == ["expert-choice", "softmax", "dense twin"]
    assert [line.seeds for line in found] == [[0, 1, 2]] * 3
    assert [line.loss for line in found] == sorted(line.loss for line in found)


def test_the_difference_to_the_twin_is_paired_by_seed(jobs):
    line = next(each for each in lines(jobs) if each.label == "softmax")
    assert line.differences == pytest.approx([-0.01, -0.02, -0.03])
    interval = statistics.t_interval([-0.01, -0.02, -0.03])
    assert (line.difference, line.difference_half) == pytest.approx((interval.mean, interval.high - interval.mean))
    assert line.difference_half < line.loss_half  # what the seeds have in common is gone


def test_everyone_is_compared_with_softmax_seed_by_seed(jobs):
    found = {line.label: line for line in lines(jobs[3:] + jobs[:3])}  # in whatever order they come
    losses = {label: dict(zip(line.seeds, line.losses, strict=True)) for label, line in found.items()}
    assert found["softmax"].against is found["softmax"].against_half is None
    for label in ("expert-choice", "dense twin"):
        interval = statistics.t_interval([losses[label][seed] - losses["softmax"][seed] for seed in (0, 1, 2)])
        own = found[label].against, found[label].against_half
        assert own == pytest.approx((interval.mean, interval.high - interval.mean))


def test_a_router_with_a_seed_that_softmax_lacks_is_not_compared_with_it(jobs):
    found = {line.label: line for line in lines(jobs[1:])}
    assert found["softmax"].seeds == [1, 2]
    assert found["expert-choice"].against is None


def test_a_sweep_without_softmax_has_no_column_for_it(tmp_path):
    headings, rows = sweep_table.table(lines([fake_job(tmp_path, f"router={name}") for name in ("hash", "base")]))
    assert "Against softmax" not in headings
    assert {len(row) for row in rows} == {len(headings)} == {len(HEADINGS) - 4}  # nor ranks and words of one seed


def test_the_baseline_can_be_another_line(jobs):
    found = lines(jobs, "expert-choice")
    best, softmax, twin = found
    assert (best.against, softmax.against) == (None, pytest.approx(softmax.loss - best.loss))
    assert twin.against == pytest.approx(twin.loss - best.loss)
    headings, _ = sweep_table.table(found, "expert-choice")
    assert "Against expert-choice" in headings


def test_a_line_says_how_many_parameters_there_are_and_how_many_are_active(jobs):
    found = lines(jobs)
    assert {line.label: (line.active, line.total) for line in found} == {
        "softmax": (1_000_000, 3_000_000),
        "expert-choice": (1_000_000, 3_000_000),
        "dense twin": (1_000_000, 1_000_000),
    }
    headings, rows = sweep_table.table(found)
    assert [row[headings.index("Parameters")] for row in rows] == ["3,000,000", "3,000,000", "1,000,000"]


def test_results_without_numbers_of_parameters_have_no_columns_for_them(jobs):
    found = [dataclasses.replace(line, active=None, total=None) for line in lines(jobs)]
    headings, _ = sweep_table.table(found)
    assert not {"Active", "Parameters"} & set(headings)


def test_routing_is_the_mean_of_layers_and_seeds_and_the_leak_the_largest(jobs):
    leaking, softmax, twin = lines(jobs)
    assert (softmax.max_vio, softmax.effective_experts, softmax.skipped) == (1.0, 12.0, 0.125)
    assert softmax.dropped == 0.5  # of training: 0.25 and 0.5 in one layer, 0.5 and 0.75 in the other
    assert (twin.max_vio, twin.effective_experts, twin.dropped, twin.skipped) == (None, None, None, None)
    assert (leaking.leak, softmax.leak, twin.leak) == (0.06, 0.0, 0.0)
    assert (softmax.tokens_per_s, twin.tokens_per_s) == (3000, 5000)


def test_one_seed_has_no_interval(tmp_path):
    line, twin = lines([fake_job(tmp_path, "router=softmax")])
    assert (line.loss_half, line.difference_half, twin.difference) == (None, None, None)
    assert judged([line, twin]) == [line, twin]
    assert notes([line, twin]) == ["One seed gives no verdict: the differences have no interval over seeds."]
    assert sweep_table.cells(line)[1:7] == ("", "3.240", "−0.080", "", "", "")
    assert sweep_table.cells(twin)[1:12] == (
        "", "3.320", "", "+0.080", "", "", "1,000,000", "1,000,000", "", "", ""
    )  # fmt: skip


def test_a_run_without_routing_over_the_validation_set_leaves_those_cells_empty(tmp_path):
    line, _ = lines([fake_job(tmp_path, "router=softmax", routing=False)])
    assert sweep_table.cells(line)[9:13] == ("", "", "", "")


def test_routers_whose_twins_differ_have_a_line_for_each_twin_named_but_for_the_usual(tmp_path):
    found = [fake_job(tmp_path, f"router={name}", twin=twin) for name, twin in (("a", "k2"), ("b", "k1"), ("c", "k2"))]
    assert {line.label for line in lines(found)} == {"a", "b", "c", "dense twin", "dense twin of b"}


@pytest.mark.parametrize(
    ("jobs", "called"),
    [
        (["router=a seed=0", "router=a seed=1", "router=b seed=0"], ["a", "a", "b"]),
        (["experiment=routers router=a", "experiment=routers router=b"], ["a", "b"]),
        (["router=a optim.lr=1", "router=a optim.lr=2"], ["optim.lr=1", "optim.lr=2"]),
        (["router=a model.moe.k=1", "router=b model.moe.k=2"], ["a model.moe.k=1", "b model.moe.k=2"]),
        (["router=a seed=0", "router=a seed=1"], ["a", "a"]),
        (["seed=0", "seed=1"], ["MoE", "MoE"]),
        (["+router=a", "+router=b"], ["a", "b"]),
        (["router.name=softmax", "router.name=mine\\:Nearest"], ["softmax", "Nearest"]),
        (["router.name=mine:Nearest seed=0", "router.name=mine:Nearest seed=1"], ["Nearest", "Nearest"]),
        (["router.name=a\\:Same", "router.name=b\\:Same"], ["a:Same", "b:Same"]),
    ],
)
def test_a_line_is_called_by_what_varies_but_for_the_seed(jobs, called):
    assert labels([each.split() for each in jobs]) == called


def test_the_table_is_printed_and_written_with_every_number(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    report(jobs)
    out = capsys.readouterr().out
    table = markdown(*sweep_table.table(judged(lines(jobs))))
    assert table in out
    assert "\nNot comparable, because the router sees later tokens: expert-choice.\n" in out
    written = (tmp_path / "table.md").read_text()
    assert out.endswith(f"{written}table: {tmp_path / 'table.md'}\n")
    assert written.startswith(f"{table}\nWords are corrected for the comparisons of their column (Holm)")
    first, *others = json.loads((tmp_path / "table.json").read_text())
    assert (first["label"], first["seeds"], first["leak"]) == ("expert-choice", [0, 1, 2], 0.06)
    assert (first["rank"], first["beside_twin"]) == (None, None)  # it sees later tokens
    assert others[0]["beside_twin"]["word"] == "inconclusive"
    assert others[0]["text"] != ""
    assert (first["commit"], first["device"]) == ("0123abc", "a processor")
    assert len(others) == 2


@pytest.fixture
def sweep(tmp_path):
    """Four routers with four seeds each, from far better than softmax to far worse, none of which leaks."""
    found = []
    for router, difference in (("softmax", 0.0), ("better", -0.5), ("alike", 0.001), ("worse", 0.4)):
        for seed, noise in enumerate((0.0, 0.01, -0.01, 0.004)):
            turned = noise * (1 if router == "softmax" else -1)
            found.append(fake_job(tmp_path, f"experiment=routers router={router}", seed, difference + turned))
    return found


def test_words_are_holms_and_intervals_hold_together_each_column_for_itself(sweep):
    found = {line.label: line for line in judged(lines(sweep))}
    losses = {label: dict(zip(line.seeds, line.losses, strict=True)) for label, line in found.items()}
    others = [label for label in found if label != "softmax"]
    differences = [[losses[label][seed] - losses["softmax"][seed] for seed in range(4)] for label in others]
    for label, expected in zip(others, arms.judge_arms(differences), strict=True):
        assert found[label].beside_baseline == expected
        numbers = expected.deviation, expected.detectable, expected.seeds_needed
        assert (found[label].deviation, found[label].detectable, found[label].seeds_needed) == numbers
    words = {label: found[label].beside_baseline.word for label in others}
    assert words == {"better": "better", "alike": "inconclusive", "worse": "worse", "dense twin": "inconclusive"}
    assert found["softmax"].beside_baseline is found["dense twin"].beside_twin is None
    cells = dict(zip(HEADINGS, sweep_table.cells(found["worse"]), strict=True))
    _, low, high = found["worse"].beside_baseline.interval
    assert cells["Against {baseline}"] == f"+0.398 (+{low:.3f} to +{high:.3f}), worse"


def test_a_margin_lets_lines_be_equivalent(sweep):
    wide = {line.label: line for line in judged(lines(sweep), margin=0.2)}
    assert wide["alike"].beside_baseline.word == "equivalent"
    assert wide["better"].beside_baseline.said() == "better"


def test_the_ranks_are_intervals_of_all_pairs(sweep):
    found = judged(lines(sweep))
    scores = [line.losses for line in found]
    assert [line.seeds for line in found] == [[0, 1, 2, 3]] * 5
    assert [tuple(line.rank) for line in found] == arms.rank_intervals(scores)
    assert sweep_table.cells(found[0])[1] == "1"
    assert sweep_table.cells(found[1])[1] == "2–4"


def test_a_leaking_router_has_neither_word_nor_rank_and_the_others_are_not_corrected_for_it(jobs):
    leaking, softmax, twin = judged(lines(jobs))
    assert (leaking.beside_twin, leaking.beside_baseline, leaking.rank) == (None, None, None)
    assert softmax.beside_twin == arms.judge_arms([softmax.differences])[0]
    assert (softmax.rank, twin.rank) == ([1, 2], [1, 2])


def test_lines_of_another_text_are_neither_ranked_together_nor_compared_with_the_baseline(jobs):
    moved = [
        Job(job.overrides, dataclasses.replace(job.result, text="another", twin="bbbb")) if i > 2 else job
        for i, job in enumerate(jobs)
    ]
    found = judged(lines(moved))
    assert {line.label: line.against is None for line in found} == {
        "expert-choice": True, "softmax": True, "dense twin": False, "dense twin of expert-choice": True
    }  # fmt: skip
    assert [line.rank for line in found] == [None] * 4
    assert "Lines of different text or tokenizer have no common ranks, and no common baseline." in notes(found)


def test_results_of_earlier_versions_are_judged_from_their_losses(sweep):
    found = judged(lines(sweep))
    new = ("beside_twin", "beside_baseline", "rank", "deviation", "detectable", "seeds_needed")
    old = [dataclasses.replace(line, **dict.fromkeys(new), text="") for line in found]
    assert judged(old) == [dataclasses.replace(line, text="") for line in found]
