"""Claims about experiments/pages/compare_page.py and its template."""

import dataclasses
import html.parser
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import CompareConfig, describe
from experiments.pages import compare_page
from experiments.stats.verdict import Pair
from tests.fake_runs import fake_pair

HOSTILE = "<script>alert(\"1\")</script> & 'x'"


def rendered(pairs, **settings):
    return compare_page.render(
        pairs, describe(CompareConfig(**settings), Path("runs/x"), pairs, "python -m experiments.compare")
    )


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text of the body in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "body" in self.open:
            self.text.append(data.strip())


@pytest.fixture(scope="module")
def one():
    return rendered([fake_pair()])


def test_the_first_sentence_is_the_verdict(one):
    pairs = [fake_pair()]
    result = describe(CompareConfig(), Path("runs/x"), pairs, "")
    assert Reader(one).text[0] == result.sentences[0]
    assert Reader(one).text[1:3] == result.sentences[1:]


def test_the_page_needs_nothing_but_itself(one):
    reader = Reader(one)
    assert one.startswith("<!doctype html>")
    assert not re.search(r"(https?:)?//", one)
    assert "@import" not in one
    assert set(re.findall(r"url\((.*?)\)", one)) <= {"#chart0", "#chart1"}
    for tag, attrs in reader.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "onload", "onclick"} & attrs.keys()


def test_every_tag_is_closed_in_order(one):
    assert Reader(one).open == []


def test_names_from_outside_are_text_and_never_markup():
    moe, dense = fake_pair(domains=(HOSTILE, "code"))
    moe = moe._replace(summary=dataclasses.replace(moe.summary, device=HOSTILE))
    moe.summary.model["name"] = moe.summary.versions[HOSTILE] = HOSTILE
    page = rendered([Pair(moe, dense)], run=HOSTILE)
    assert "<script" not in page
    reader = Reader(page)
    assert reader.open == []
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in Reader(rendered([fake_pair()])).tags}
    assert any(f"{HOSTILE}: loss" in text for text in reader.text)


def test_every_domain_and_every_layer_is_there(one):
    text = Reader(one).text
    for layer in ("Layer 1", "Layer 3"):
        assert text.count(layer) == 2  # its heat map and its specialists
    for domain in ("drama", "verse", "code"):
        assert text.count(domain) >= 3


def test_every_number_of_the_table_is_on_the_page(one):
    text = Reader(one).text
    for row in describe(CompareConfig(), Path("runs/x"), [fake_pair()], "").table:
        start, shown = text.index(row[0]), [cell for cell in row if cell]
        assert text[start : start + len(shown)] == shown


def test_dark_and_light_define_the_same_colours(one):
    light, dark = (set(re.findall(r"(--\w+):", rule)) for rule in re.findall(r":root \{(.*?)\}", one))
    assert light == dark
    assert set(re.findall(r"var\((--\w+)\)", one)) == light
    assert "@media (prefers-color-scheme: dark)" in one


def test_on_a_phone_the_cells_of_a_table_wrap_after_all_other_rules(one):
    styles = one[one.index("<style>") : one.index("</style>")]
    narrow = styles[styles.index("@media (max-width: 36rem)") :]
    assert "th, td { white-space: normal;" in narrow
    assert "nowrap" in styles.removesuffix(narrow)
    assert "nowrap" not in narrow


def test_the_dotted_line_stands_where_the_twins_loss_is_reached(one):
    chart = compare_page.loss_chart([fake_pair()], 0, "step")
    mark = {(each["name"], each["x"]): each["y"] for each in chart["marks"]}
    xs = sorted(x for name, x in mark if name == "moe")
    before = max(x for x in xs if x <= chart["reached"]["x"])
    after = min(x for x in xs if x >= chart["reached"]["x"])
    assert mark["moe", before] <= chart["reached"]["y"] <= mark["moe", after]
    assert chart["reached"]["y"] == mark["dense", xs[-1]]


def test_a_chart_draws_a_curve_per_run_and_kind():
    pairs = [fake_pair(seed=seed) for seed in range(3)]
    chart = compare_page.loss_chart(pairs, 1, "training time (s)")
    assert sorted((each["name"], each["kind"]) for each in chart["lines"]) == sorted(
        [("moe", "train"), ("moe", "val"), ("dense", "train"), ("dense", "val")] * 3
    )
    assert chart["reached"] is None  # of which seed?


def test_a_higher_loss_is_drawn_higher_and_a_later_step_further_right():
    chart = compare_page.loss_chart([fake_pair(difference=-0.08)], 0, "step")
    ends = {each["name"]: each["y"] for each in chart["ends"]}
    assert ends["moe"] > ends["dense"]  # y grows downwards
    xs = [each["x"] for each in chart["marks"] if each["name"] == "moe"]
    assert xs == sorted(xs)
    assert xs[-1] == chart["plot"]["x"] + chart["plot"]["width"]


def test_a_training_curve_leaves_out_steps_without_a_finite_loss():
    moe, _ = fake_pair(steps=20, eval_every=10)
    moe.metrics[5] = dataclasses.replace(moe.metrics[5], lm_loss=None)
    steps, loss = compare_page.training_curve(moe, "step")
    assert steps == [1, 2, 3, 4, *range(6, 21)]
    assert np.isfinite(loss).all()


def test_a_run_of_a_few_steps_has_a_page():
    assert "<svg" in rendered([fake_pair(steps=1, eval_every=1)])
    assert "<svg" in rendered([fake_pair(steps=3, eval_every=100, difference=0.0, noise=0.0)])


def test_shares_are_of_each_domains_own_rows():
    share = compare_page.shares([[30, 10], [0, 60], [0, 0]])
    assert share[:3] == pytest.approx(np.array([[0.3, 0.7], [0.75, 0.25], [0, 1]]))
    assert np.isnan(share[3]).all()


def test_heat_is_the_share_over_the_even_share():
    cells = compare_page.heat_map(["a"], compare_page.shares([[10, 30, 40, 0]])[:1], [0, 1, 2, 3])["cells"]
    assert [each["text"] for each in cells] == ["0.5", "1.5", "2.0", "0.0"]
    assert [each["tone"] for each in cells] == ["under", "over", "over", "under"]
    assert cells[1]["title"] == "a: expert 1 gets 37.50%, 1.50× the even share"


def test_colour_deepens_with_the_distance_from_even_both_ways():
    up, down = (
        [compare_page.shade(ratio)["opacity"] for ratio in ratios]
        for ratios in ((1, 1.5, 2, 4), (1, 1 / 1.5, 0.5, 0.25))
    )
    assert up == down == sorted(up)
    assert up[0] == 0
    assert compare_page.shade(0.0) == compare_page.shade(0.25)
    assert compare_page.shade(64.0) == compare_page.shade(4.0)


def test_experts_stand_under_the_domain_that_uses_them_most():
    share = compare_page.shares([[50, 10, 30, 10], [10, 60, 10, 20]])
    assert compare_page.by_domain(share) == [0, 2, 1, 3]


def test_the_specialist_is_the_expert_a_domain_uses_more_than_all_text_does():
    counts = [[80, 20, 0], [60, 0, 40]]
    found = compare_page.specialists(["drama", "verse"], compare_page.shares(counts))
    assert found == [
        {"expert": 0, "share": "80.0%", "overall": "70.0%"},
        {"expert": 2, "share": "40.0%", "overall": "20.0%"},
    ]


def test_a_domain_without_validation_text_is_said_to_have_none():
    moe, dense = fake_pair()
    for counts in moe.summary.load.counts:
        counts[1] = [0] * 16
    assert compare_page.specialists(["a", "b", "c"], compare_page.shares(moe.summary.load.counts[0]))[1] is None
    assert rendered([Pair(moe, dense)]).count("no validation text") == 2


def test_a_planted_specialisation_shows_and_its_absence_does_not():
    """Three domains that prefer a third of the experts each, against a router that takes no notice of them."""
    rng = np.random.default_rng(0)
    planted = np.array([[3 if i % 3 == d else 1 for i in range(12)] for d in range(3)]) * 1000
    blind = rng.poisson(1000, (3, 12))
    lift = lambda counts: max(
        float(each["share"][:-1]) / float(each["overall"][:-1])
        for each in compare_page.specialists(["a", "b", "c"], compare_page.shares(counts))
    )
    assert lift(planted) > 1.5
    assert lift(blind) < 1.1
