"""Claims about the charts: where marks are, what they say, and that they are whole by themselves."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from experiments.pages import charts
from experiments.pages.charts import Frame, Point, Series

SVG = "{http://www.w3.org/2000/svg}"
CURVES = [
    Series("one", [0.0, 50.0, 100.0], [5.0, 4.0, 3.5], [5.0, 3.9, 3.4], [5.0, 4.1, 3.6]),
    Series("<two>", [0.0, 50.0, 100.0], [5.0, 4.2, 3.7], [5.0, 4.2, 3.7], [5.0, 4.2, 3.7]),
]


def _parsed(text):
    return ET.fromstring(text)


def test_every_point_of_a_curve_stands_where_its_numbers_are():
    picture = _parsed(charts.line_chart(CURVES, "steps", "loss"))
    dots = picture.findall(f".//{SVG}circle")
    assert len(dots) == 6
    assert dots[1].find(f"{SVG}title").text == "one, steps 50: 4.0000"
    frame = Frame((0.0, 100.0), (3.4, 4.2), "steps", "loss")
    assert float(dots[1].get("cx")) == frame.across(50)
    assert float(dots[1].get("cy")) == frame.down(4.0)
    lines = [line.get("points").split() for line in picture.findall(f".//{SVG}polyline")]
    assert [len(points) for points in lines] == [3, 3]
    assert len(picture.findall(f".//{SVG}polygon")) == 1  # a band where seeds differ


def test_names_are_text_and_no_markup_and_stand_at_the_ends():
    text = charts.line_chart(CURVES, "steps", "loss")
    assert "<two>" not in text
    words = ["".join(node.itertext()) for node in _parsed(text).findall(f".//{SVG}text")]
    assert {"one 3.500", "<two> 3.700", "steps", "loss"} <= set(words)


def test_a_chart_is_described_for_who_cannot_see_it():
    assert _parsed(charts.line_chart(CURVES, "steps", "loss")).get("aria-label") == (
        "loss over steps: one ends at 3.500, <two> ends at 3.700"
    )


def test_points_on_the_front_are_joined_and_all_have_names():
    points = [Point("a", 1.0, 4.0, True), Point("b", 2.0, 3.0, True), Point("c", 2.5, 3.9, False)]
    picture = _parsed(charts.scatter(points, "FLOPs", "loss"))
    (front,) = picture.findall(f".//{SVG}polyline")
    assert len(front.get("points").split()) == 2
    names = ["".join(node.itertext()) for node in picture.findall(f".//{SVG}text")]
    assert {"a 4.000", "b 3.000", "c 3.900"} <= set(names)
    bars = charts.scatter([p._replace(low=p.y - 0.5, high=p.y + 0.5) for p in points], "FLOPs", "loss")
    assert len(_parsed(bars).findall(f".//{SVG}line")) == len(picture.findall(f".//{SVG}line")) + 3


def test_many_arms_all_have_a_place_and_a_look_of_their_own():
    many = [Series(f"an-arm-of-this-study-{i}", [0.0, 1.0], [5.0, 4.0], [5.0, 3.9], [5.0, 4.1]) for i in range(30)]
    picture = _parsed(charts.line_chart(many, "steps", "loss"))
    texts = [text for text in picture.iter(f"{SVG}text") if "…" in text.text]
    assert len({text.text for text in texts}) == 30
    heights = sorted(float(text.get("y")) for text in texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= charts.NAME - 0.11
    assert heights[0] > 0
    assert heights[-1] < float(picture.get("viewBox").split()[3]) - charts.BOTTOM + 10
    looks = [(line.get("class"), line.get("stroke-dasharray")) for line in picture.iter(f"{SVG}polyline")]
    assert len(set(looks)) == 30


@pytest.mark.parametrize("heights", [[10.0, 11.0, 12.0], [290.0, 291.0, 292.0], [5.0, 100.0]])
def test_names_that_would_overlap_are_moved_apart_in_their_order(heights):
    moved = charts.spread(heights, 15.0)
    assert all(b - a >= 15.0 - 1e-9 for a, b in itertools.pairwise(moved))
    assert max(moved) <= charts.HEIGHT - charts.BOTTOM


def test_a_picture_has_its_style_for_light_and_dark_and_loads_nothing():
    text = charts.line_chart(CURVES, "steps", "loss")
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"(?:href|src)=", text) == []


def test_one_point_of_one_arm_is_drawn():
    _parsed(charts.scatter([Point("a", 1.0, 4.0, True)], "FLOPs", "loss"))
    _parsed(charts.line_chart([Series("a", [0.0], [3.0], [3.0], [3.0])], "steps", "loss"))


@pytest.mark.parametrize(("low", "high"), [(0, 600), (0, 7), (3.1, 3.9), (0, 0.004), (5.6, 5.61), (0, 123456)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert np.allclose(np.diff(ticks), np.diff(ticks)[0])


# What eyes without one kind of cone see of linear sRGB (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def _linear(colour):
    """Linear sRGB of #rrggbb."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    """CIE L*a*b* of linear sRGB, white D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x = np.array(to_xyz) @ np.clip(linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(("colours", "paper"), [(charts.COLOURS, "#ffffff"), (charts.IN_THE_DARK, "#12151a")])
def test_no_two_colours_look_alike_to_any_eyes_and_all_stand_out_from_the_page(eyes, colours, paper):
    seen = [_lab(np.array(EYES[eyes]) @ _linear(colour)) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20  # 2 is just noticeable
    luminance = lambda colour: _linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05
    for colour in colours:
        lighter, darker = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert lighter / darker > 2.5  # WCAG's contrast
