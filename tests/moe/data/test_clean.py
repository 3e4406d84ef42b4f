"""The cleaning pipeline: what each step drops, keeps and counts."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config.data import CleanConfig
from moe.data import clean as pipeline
from moe.data.clean import clean
from moe.data.sources import Document
from moe.data.unreadable import Unreadable
from moe.errors import BadInput

OFF = CleanConfig(html=False, unicode="none", min_chars=0, max_chars=0, max_repetition=1, exact=False, near=0)


def texts(*given: str, name: str = "a.txt", **on) -> list[str]:
    """The texts left of `given`, with only the steps in `on` switched on."""
    return [d.text for d in clean([Document(text, "d", name) for text in given], replace(OFF, **on))[0]]


def prose(seed: int, words: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


# ---------------------------------------------------------------- the pipeline


def test_the_version_stands_for_what_cleaning_does():
    """Where this fails, the same documents come out otherwise: raise moe.data.clean.VERSION and add its line here."""
    page = (
        "<html><head><title>t</title></head><body><h1>Head</h1><p>one&nbsp;<strong>two</strong><pre>a  b</pre><ul>"
        "<li>x</ul></body>"
    )
    sentences = " ".join(prose(1))
    given = [
        page,
        "Itâ€™s caf\u0065\u0301\x07",
        sentences,
        sentences + " more",
        sentences.replace(" ", "\n"),
        "line\n" * 99,
    ]
    named = [Document(text, "d", f"{i}.html" if i == 0 else f"{i}.txt") for i, text in enumerate(given)]
    kept, _ = clean(named, CleanConfig(min_chars=5))
    digest = hashlib.sha256(json.dumps([[d.text, d.name] for d in kept]).encode()).hexdigest()[:16]
    assert digest == {2: "0b215ab37401cc98"}[pipeline.VERSION]


def test_every_step_counts_documents_and_bytes_in_and_out():
    long = "é" * 150
    kept, steps = clean(
        [
            Document(f"<p>{long}</p>", "d", "a.html"),
            Document("short", "d", "b.txt"),
            Document("the same line\n" * 20, "d", "c.txt"),
            Document(long, "e", "d.txt"),
        ],
        CleanConfig(),
    )
    assert kept == [Document(long, "d", "a.html.txt")]
    assert [(s.name, s.documents_in, s.documents_out, s.bytes_in, s.bytes_out) for s in steps] == [
        ("html", 4, 4, 307 + 5 + 280 + 300, 300 + 5 + 280 + 300),
        ("unicode", 4, 4, 885, 885),
        ("length", 4, 3, 885, 880),
        ("repetition", 3, 2, 880, 600),
        ("exact", 2, 1, 600, 300),
        ("near", 1, 1, 300, 300),
    ]


def test_a_step_that_is_off_is_not_there_and_changes_nothing():
    documents = [Document("x\r\n\x00" * 5, "d", "a.html")] * 2
    assert clean(documents, OFF) == (documents, [])
    assert [step.name for step in clean(documents, replace(OFF, exact=True))[1]] == ["exact"]


TEXT = st.text(max_size=80) | st.text(alphabet="ab é\u0301\u2019Ã©â€™\ufb01\r\n\t\x85\x1b[0m", max_size=80)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=6), st.sampled_from(["NFC", "NFKC"]))
def test_cleaning_twice_is_cleaning_once(given, form):
    cfg = CleanConfig(unicode=form, min_chars=1, max_repetition=0.6, near=0)
    once, _ = clean([Document(text, "d", f"{i}.txt") for i, text in enumerate(given)], cfg)
    twice, steps = clean(once, cfg)
    assert twice == once
    assert all(step.documents_in == step.documents_out and step.bytes_in == step.bytes_out for step in steps)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.sampled_from([0.5, 0.9]))
def test_removing_near_duplicates_twice_is_removing_them_once(seeds, near):
    given = [" ".join([*prose(seed, 200), f"end{i}"]) for i, seed in enumerate(seeds)]
    once = texts(*given, near=near)
    assert texts(*once, near=near) == once
    assert len(once) == len(set(seeds))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a b", "a  b", "\na\tb ", "ab", "b a"]), max_size=12))
def test_exact_duplicates_leave_the_first_of_each_kind(given):
    first = {tuple(text.split()): text for text in reversed(given)}  # by words, an oracle without hashing
    assert sorted(texts(*given, exact=True)) == sorted(first.values())


# ---------------------------------------------------------------- html


def test_html_becomes_its_visible_text_with_paragraphs_apart():
    page = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body>
    <!-- a comment --><h1>Head&amp;line</h1><script>var x = "<p>no</p>";</script>
    <p>One <b>bold</b>
       word.</p><p>Two<br>lines</p><ul><li>first</li><li>second</li></ul>
    <pre>def f():
    return  1</pre></body></html>"""
    assert texts(page, name="x/page.HTML.gz", html=True) == [
        "Head&line\n\nOne bold word.\n\nTwo\nlines\n\nfirst\n\nsecond\n\ndef f():\n    return  1"
    ]


@pytest.mark.parametrize("name", ["page.htm", "page.html.zst", "page.html"])
def test_html_is_known_by_its_name(name):
    assert texts("<p>a &lt; b</p>", name=name, html=True) == ["a < b"]


@pytest.mark.parametrize("name", ["page.txt", "html", "a.html:3", "code.py"])
def test_other_text_keeps_its_angle_brackets(name):
    text = "if a < b: print('<p>&lt;</p>')"
    assert texts(text, name=name, html=True, unicode="NFC") == [text]


@pytest.mark.parametrize("tag", ["strong", "span", "label", "output", "col", "abbr", "data", "sup", "h7", "pp"])
def test_a_tag_within_a_line_breaks_none_whatever_its_name_contains(tag):
    assert texts(f"<p>some <{tag}>words</{tag}>, more</p>", name="a.html", html=True) == ["some words, more"]


@pytest.mark.parametrize("tag", ["P", "h1", "h6", "tr", "li", "caption", "option", "summary", "legend", "search"])
def test_a_block_stands_alone(tag):
    assert texts(f"before<{tag}>it</{tag}>after", name="a.html", html=True) == ["before\nit\nafter"]


def test_html_that_was_converted_is_not_converted_again():
    once, _ = clean([Document("<p>&lt;b&gt; is bold</p>", "d", "a.html")], replace(OFF, html=True))
    assert once[0].text == "<b> is bold"
    assert clean(once, replace(OFF, html=True))[0] == once


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<div>" * 20_000 + "deep" + "</div>" * 20_000, "deep"),
        ("<i>x" * 3000, "x" * 3000),
        ("<p>x</p>" * 5000, "\n\n".join(["x"] * 5000)),
        ("a" + "<b> </b>" * 5000 + "b", "a" + " " * 5000 + "b"),
    ],
    ids=["deep", "unclosed", "wide", "spaces"],
)
def test_a_page_may_be_deep_and_wide(page, text):
    assert texts(page, name="a.html", html=True) == [text]


@pytest.mark.parametrize(
    "page", ["<a " * 9000, "<a x='" * 9000, "<!-- > " * 9000, "<![CDATA[" * 9000, "<![odd[ x", "<p>" * 2**20]
)
def test_a_page_that_cannot_be_parsed_in_time_is_counted_and_the_others_kept(page):
    pages = [Document(page, "d", "bad.html"), Document("<p>good", "d", "good.html")]
    tally = Unreadable("skip")
    assert [d.text for d in clean(pages, replace(OFF, html=True), tally)[0]] == ["good"]
    assert tally.counts.total() == 1
    assert tally.places[0].startswith("bad.html ")
    with pytest.raises(BadInput, match=r"1 document cannot be read .*data\.on_error=skip"):
        clean(pages, replace(OFF, html=True))


# ---------------------------------------------------------------- unicode


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("cafÃ© â€” yes", "café — yes"),  # UTF-8 read as Windows-1252
        ("e\u0301", "é"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\x00b\x07c\x7fd\te\n", "abcd\te\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("“curly”", "“curly”"),
        ("&lt;p&gt; &amp;amp;", "&lt;p&gt; &amp;amp;"),
        ("ﬁ", "ﬁ"),
    ],
)
def test_damage_is_repaired_and_meaning_kept(damaged, repaired):
    assert texts(damaged, unicode="NFC") == [repaired]


def test_nfkc_folds_compatibility_characters():
    assert texts("ﬁ ①", unicode="NFKC") == ["fi 1"]


# ---------------------------------------------------------------- length and repetition


def test_length_limits_are_inclusive_and_ignore_white_space_at_the_ends():
    given = ["x" * n for n in (4, 5, 7, 8)] + ["  abc  \n"]
    assert texts(*given, min_chars=5, max_chars=7) == ["x" * 5, "x" * 7]


def test_repetition_is_the_share_of_characters_in_repeated_lines():
    line, other = "a line of twenty chr", "twenty others here.."
    assert pipeline.repetition(f"{line}\n{other}") == 0
    assert pipeline.repetition(f"{line}\n\n  {line}\n{other}\n") == pytest.approx(2 / 3)
    assert pipeline.repetition(f"{line}\n" * 3) == 1
    assert pipeline.repetition("else:\n" * 50 + line) == 0  # short lines repeat in good text
    assert pipeline.repetition("") == 0


def test_a_document_at_the_limit_of_repetition_stays():
    half = "a line of twenty chr\na line of twenty chr\ntwenty others here..\ntwenty more of them."
    assert texts(half, max_repetition=0.5) == [half]
    assert texts(half, max_repetition=0.49) == []


# ---------------------------------------------------------------- near duplicates


def jaccard(a: list[str], b: list[str]) -> float:
    one, two = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(one & two) / len(one | two)


def test_near_duplicates_go_and_the_earlier_document_stays():
    original = prose(0)
    changed = [*original[:150], "changed", *original[151:]]
    other = prose(1)
    assert jaccard(original, changed) > 0.95
    given = [" ".join(words) for words in (original, other, changed)]
    assert texts(*given, near=0.8) == given[:2]


@pytest.mark.parametrize("near", [0.3, 0.5, 0.8])
def test_what_goes_is_what_is_similar(near):
    """Against the exact Jaccard similarity of word 5-shingles: MinHash with 128 permutations is off by 0.044 at most on
    average, so pairs three deviations above the threshold go and those three below stay."""
    gone = stayed = 0
    for seed in range(25):
        original = prose(seed, 400)
        changed = list(original)
        for place in random.Random(seed).sample(range(400), k=1 + 5 * seed):
            changed[place] = "changed"
        left = len(texts(" ".join(original), " ".join(changed), near=near))
        similarity = jaccard(original, changed)
        if similarity > near + 0.13:
            assert left == 1, similarity
            gone += 1
        if similarity < near - 0.13:
            assert left == 2, similarity
            stayed += 1
    assert gone
    assert stayed


@pytest.mark.parametrize("near", [0.01, 0.5, 0.99, 1.0])
def test_every_threshold_drops_a_copy_and_keeps_a_stranger(near):
    a, b = " ".join(prose(2)), " ".join(prose(3))
    assert texts(a, b, a, near=near) == [a, b]


def test_short_texts_are_compared_whole():
    assert texts("a b", "a c", "a b", "", "", near=0.8) == ["a b", "a c", ""]


def test_shingle_hashes_are_one_for_each_distinct_shingle():
    words = prose(4, 1000) + prose(4, 500)
    found = pipeline.shingle_hashes(" ".join(words), {})
    assert len(found) == len({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    assert all(0 <= value < 2**32 for value in found)


def test_hashes_do_not_change_from_run_to_run():
    program = "from moe.data.clean import shingle_hashes; print(shingle_hashes('one two three four five six', {}))"
    run = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{pipeline.shingle_hashes('one two three four five six', {})}\n"
