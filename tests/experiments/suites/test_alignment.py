"""Claims about the study of alignment: its arms, its data, and what its tables say."""

import pytest

from experiments.suites import alignment
from experiments.suites.alignment import (
    ARMS,
    Row,
    arm_config,
    cells,
    measure,
    own_figures,
    pair_cells,
    route_cells,
    slug,
)
from moe.data.tasks import DIGITS
from moe.run.jsonl import read_lines
from moe.run.summary import MetricsLine
from tests.small_runs import silent


def test_arms_differ_in_their_objective_alone_but_for_those_that_are_drawn_elsewhere(tmp_path):
    configs = {arm.name: arm_config(arm, 1, 5, tmp_path) for arm in ARMS}
    assert len({slug(name) for name in configs}) == len(ARMS)
    exact, anywhere = configs["exact"], configs["anywhere"]
    assert (exact.objective.reward, anywhere.objective.reward) == ("exact", "contains")
    anywhere.objective, anywhere.run = exact.objective, exact.run
    assert anywhere == exact
    drawn, replayed = configs["exact, drawn in bf16"], configs["exact, drawn in bf16, replayed"]
    assert (drawn.dispatch, drawn.objective.draw_dispatch) == ("reference", "torch")
    assert (drawn.objective.replay, replayed.objective.replay) == (False, True)
    assert configs["by the reward model"].objective.judge == configs["a reward model"].run
    assert all(config.balance.aux == config.balance.bias_rate == 0 for config in configs.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two arms of two steps, from a start that says little: what it can be paid for is any digit."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "ARMS", [arm for arm in ARMS if arm.name in ("anywhere", "DPO, summed")])
        patch.setattr(alignment, "sums", lambda seed: SUMS(seed)[:400])
        rows = measure(folder, [3], 2, 60, silent)
        again = measure(folder, [3], 2, 60, lambda line: pytest.fail(line) if line.startswith("step") else None)
    return folder, rows, again


SUMS = alignment.sums


def test_what_is_finished_is_not_trained_again_and_measures_the_same(measured):
    _, rows, again = measured
    assert rows == again
    assert [(row.arm, row.seed, row.steps) for row in rows] == [
        ("start", 0, 60),
        ("anywhere", 3, 2),
        ("DPO, summed", 3, 2),
    ]
    assert all(0 <= row.exact <= row.contains <= 1 for row in rows)
    assert rows[1].figures.keys() >= {"reward", "gap", "kl", "flips", "ratio", "far"}
    assert rows[2].figures.keys() >= {"accuracy", "chosen", "rejected", "flips"}


def test_the_data_lists_all_digits_now_and_then(measured):
    folder, _, _ = measured
    texts = [line["text"] for line in read_lines(folder / "data" / "texts" / "texts.jsonl")]
    assert 0.02 < sum(text.endswith(DIGITS) for text in texts) / len(texts) < 0.09


def line(step, **answers):
    return MetricsLine(step, 0.0, answers=answers or None)


def test_figures_are_of_the_last_steps_and_the_largest_ratio_of_all():
    lines = [line(0), *(line(step, reward=float(step > 30), ratio=0.1 * step) for step in range(1, 41))]
    lines[1] = line(1, reward=0.0, ratio=9.0)
    assert own_figures(lines) == {"reward": 0.5, "ratio": 9.0}


def test_a_line_of_the_table_has_the_mean_and_the_range_of_an_arms_runs():
    figures = {"reward": 0.5, "kl": 1.0, "flips": 0.01, "ratio": 0.2, "far": 0.0}
    rows = [Row("exact", seed, 100, 0.5 + 0.1 * seed, 0.7, 0.0, 2.0, figures) for seed in (0, 1)]
    rows.append(Row("DPO, summed", 0, 100, 0.4, 0.4, 0.0, 2.5, {"flips": 0.1}))
    first, second = cells(rows)
    assert first == ("exact", "2", "55% (50% to 60%)", "70%", "0%", "2.0", "0.50", "1.00")
    assert second[-2:] == ("–", "–")
    pair = Row(
        "DPO, IPO", 0, 100, 0.4, 0.4, 0.0, 2.5, {"accuracy": 0.8, "chosen": -2.0, "rejected": -15.0, "flips": 0.4}
    )
    assert list(pair_cells([*rows, pair])) == [("DPO, IPO", "1", "80%", "-2.0", "-15.0", "40%")]
    assert list(route_cells(rows)) == [("exact", "2", "1.00%", "0.2", "0.000%", "55% (50% to 60%)")]
