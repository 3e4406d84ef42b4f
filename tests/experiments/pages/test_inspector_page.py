"""Claims about the inspector's page: what is in it, what a real browser makes of it, and that no document's text gets
more than shown."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments.pages.inspector_page import as_json, render
from experiments.pages.inspector_tables import Look, words
from moe.analysis.evidence import weigh
from moe.analysis.history import History
from moe.analysis.inspection import inspect
from moe.data.tokenizer import Tokenizer
from moe.run.summary import Alarm
from tests.browser import browser, needs_browser, opened
from tests.planted_traces import WINDOW, random_routes, write_trace

T, L, E, K = 1600, 3, 8, 2
HOSTILE = [
    "<script>window.hacked=1</script>", "</script><img src=x onerror=alert(1)>", "<!--", "]]>", "{{ 7*7 }}",
    "\x1b[31mred\x07", "\u202eevil\u2066", "😀", "&lt;b&gt;", "'\"`${1}", "﷽" * 20,
]  # fmt: skip


def tokenizer():
    """Bytes, 'tokens' with names, and the hostile ones."""
    texts = [f" word{i}" for i in range(40)] + HOSTILE
    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(texts)}
    return Tokenizer("planted", r"(?s).", ranks, {"<|endoftext|>": len(ranks)})


def history():
    """100 steps in which layer 1 collapses from step 50 on."""
    steps = np.arange(1, 101)
    load_NLE = np.ones((10, L, E))
    load_NLE[5:, 1] = [8.0, *[0.0] * 7]
    effective_NL = np.ones((100, L))
    effective_NL[50:, 1] = 1 / 8
    return History(
        layers=[0, 1, 2],
        load_steps=[10 * (i + 1) for i in range(10)],
        load_NLE=load_NLE,
        steps=steps.tolist(),
        max_vio_NL=np.zeros((100, L)),
        effective_NL=effective_NL,
        val_steps=[0, 50, 100],
        val_loss=[5.0, 4.0, 3.5],
        alarms=[Alarm("uneven load", 60, 1, "MaxVio is 7.00", "a <weak> balance", "balance.aux=0.1")],
    )


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """Two runs over the same text: the first has an expert 5 of layer 1 that takes ' word7' alone, and a dead one in
    layer 2; the other is random."""
    folder = tmp_path_factory.mktemp("traces")
    words = tokenizer()
    rng = np.random.default_rng(0)
    token_T = 256 + rng.integers(0, 40, T)
    token_T[5 : 5 + 2 * len(HOSTILE) : 2] = 256 + 40 + np.arange(len(HOSTILE))
    domain_T = np.repeat(rng.integers(0, 2, T // WINDOW), WINDOW)
    expert_TLK = random_routes(T, L, E, K)
    expert_TLK[:, 1] = np.where(expert_TLK[:, 1] == 5, 6, expert_TLK[:, 1])
    expert_TLK[token_T == 263, 1, 0] = 5
    expert_TLK[:, 2] = np.where(expert_TLK[:, 2] == 3, 2, expert_TLK[:, 2])
    columns = dict(token=token_T, domain=domain_T, domains=["prose <b>", "code"], n_experts=[E] * L)
    columns["weight_TLK"] = np.tile([0.75, 0.25], (T, L, 1))
    first = inspect(write_trace(folder / "first", expert_TLK, tokenizer=words.fingerprint, **columns))
    other = inspect(write_trace(folder / "other", random_routes(T, L, E, K, 9), tokenizer=words.fingerprint, **columns))
    return [Look("first<i>", first, words, history()), Look("other", other, words, None)]


@pytest.fixture(scope="module")
def page_path(looks, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render(looks), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened_browser:
        yield opened_browser


@pytest.fixture
def page(chromium, page_path):
    made = opened(chromium, page_path)
    yield made
    assert made.said == [], "nothing fails, nothing is asked of a network, no dialog opens"
    made.context.close()


# Without a browser.


def test_the_page_says_its_verdict_in_words_and_loads_nothing(page_path):
    text = page_path.read_text()
    assert text.count("Layer 2: 1 of 8 experts take no token (3).") == 1
    assert "Try first: raise balance.aux tenfold" in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_alarms_of_the_training_stand_on_the_page_and_a_quiet_one_is_said(page_path, looks):
    text = page_path.read_text()
    assert "Uneven load in layer 1 at step 60: MaxVio is 7.00. Likely a &lt;weak&gt; balance; try" in text
    quiet = looks[0]._replace(history=dataclasses.replace(history(), alarms=[]))
    assert "The doctor raised no alarm" in render([quiet])


def test_json_in_the_page_holds_no_tag_and_reads_back_the_same():
    tree = {"strings": HOSTILE, "n": 1}
    text = as_json(tree)
    assert not set("<>&") & set(text)
    assert json.loads(text) == tree


def test_hostile_text_stands_nowhere_as_markup(page_path):
    text = page_path.read_text()
    data = text.index('id="data"')
    assert "hacked" in text[data:], "it is there, as data"
    assert "hacked" not in text[:data]
    assert "<i>" not in text
    assert text.count("</script>") == 3
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(text), "nor anything that turns text or moves a cursor"


@pytest.mark.parametrize(("n_layers", "n_experts", "k"), [(16, 64, 8), (64, 256, 8)])
def test_a_large_page_stays_under_8_megabytes(tmp_path, n_layers, n_experts, k):
    n_tokens = 100_000 if n_layers == 16 else 4_000
    rng = np.random.default_rng(0)
    # Different experts of a token: in strides from a random one, by a step that shares no factor with their number.
    first_TL1 = rng.integers(0, n_experts, (n_tokens, n_layers, 1))
    expert_TLK = (first_TL1 + (2 * rng.integers(0, n_experts // 2, (n_tokens, 1, 1)) + 1) * np.arange(k)) % n_experts
    token_T = np.minimum(rng.zipf(1.3, n_tokens), 49_000)
    trace = write_trace(tmp_path / "t", expert_TLK, token=token_T, vocab_size=50_000)
    text = render([Look("large", inspect(trace), None)])
    assert len(text) < 8_000_000, f"{len(text):,} bytes"


# In one.


@needs_browser
def test_a_click_on_the_load_shows_the_experts_card(page):
    box = page.locator("#load-map canvas").first.bounding_box()
    # Layer 1 is the second of three rows, over 18 px of numbers; expert 5 the third column from the right.
    column, height = 44, box["height"] - 18
    page.mouse.click(box["x"] + box["width"] - column * 2.5, box["y"] + height / 2)
    assert page.locator("#where").inner_text() == "layer 1 · expert 5"
    card = page.locator("#card").inner_text()
    assert "layer 1, expert 5" in card
    assert "·word7 " in card
    assert page.locator("#card .passage mark").first.inner_text() == " word7"
    assert page.locator("#number").input_value() == "5"


@needs_browser
def test_what_is_pointed_at_is_said_with_its_number(page, looks):
    view = looks[0].inspection.layers[0]
    ratio = view.rows_YE.sum(0)[7] / (K * T / E)
    box = page.locator("#load-map canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 6)
    tip = page.locator("#tip")
    assert tip.is_visible()
    said = re.fullmatch(r"layer 0, expert 7: ([\d.]+) times a fair share of all text", tip.inner_text())
    assert float(said[1]) == pytest.approx(ratio, abs=0.051)


@needs_browser
def test_arrow_keys_and_enter_choose_and_a_reader_is_told(page):
    page.locator("#load-map").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#load-map-said").inner_text().startswith("layer 1, expert 2: ")
    page.keyboard.press("Enter")
    assert page.locator("#where").inner_text() == "layer 1 · expert 2"


@needs_browser
def test_the_slider_goes_back_to_before_the_collapse(page):
    page.select_option("#measure", "training")
    at = lambda: page.locator("#load-map").evaluate(
        "box => { box.focus(); box.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'})); }"
    )
    assert page.locator("#step-said").inner_text() == "100"
    at()
    assert (
        page.locator("#load-map-said").inner_text()
        == "layer 1, expert 0: 8.0 times a fair share of the batch of step 100"
    )
    page.locator("#step").evaluate("slider => { slider.value = 0; slider.dispatchEvent(new Event('input')); }")
    page.locator("#load-map").evaluate("box => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp'}))")
    at()
    assert (
        page.locator("#load-map-said").inner_text()
        == "layer 1, expert 0: 1.0 times a fair share of the batch of step 10"
    )


@needs_browser
def test_the_search_finds_the_expert_of_a_token(page):
    page.fill("#search", "word7")
    hits = page.locator("#search-said span")
    assert "layer 1, expert 5" in hits.first.inner_text()
    assert "read" in hits.first.inner_text()
    hits.first.locator("button").click()
    assert page.locator("#where").inner_text() == "layer 1 · expert 5"
    page.fill("#search", "no such token")
    assert "No expert has it" in page.locator("#search-said").inner_text()


@needs_browser
def test_a_heading_sorts_its_table(page):
    column = lambda: (
        page.locator("section[data-run='0'] table.sorts").first.locator("tbody td:nth-child(5)").all_inner_texts()
    )
    assert column() == ["0", "0", "1"]
    heading = page.locator("section[data-run='0'] table.sorts th button", has_text="dead").first
    heading.click()
    assert column() == ["1", "0", "0"]
    heading.click()
    assert column() == ["0", "0", "1"]


@needs_browser
def test_a_token_shows_its_experts_in_every_layer_under_both_runs(page, looks):
    inspection, other = (look.inspection for look in looks)
    page.locator("#tokens").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    rows = page.locator("#strip tbody tr")
    assert rows.count() == L
    for layer in range(L):
        for column, seen in ((2, inspection), (3, other)):
            numbers = rows.nth(layer).locator(f"td:nth-child({column}) button").all_inner_texts()
            assert numbers == [str(e) for e in seen.routes.expert_TLK[3, layer]]
        assert "75%" in rows.nth(layer).inner_text()
    assert "loss of the next token 1.0" in page.locator("#strip").inner_text()
    page.locator("#token-9").hover()
    assert page.locator("#tip").inner_text().splitlines()[1] == "layer 1: " + ", ".join(
        f"{e} ({share})" for e, share in zip(inspection.routes.expert_TLK[9, 1], ("75%", "25%"), strict=True)
    )


@needs_browser
def test_another_run_can_be_chosen_and_what_is_not_known_of_it_is_said(page, looks):
    page.select_option("#run", "1")
    assert page.locator("h1:visible").inner_text() == words(looks[1])["verdict"]
    assert page.locator("#measure option").all_inner_texts() == [
        "load of all text",
        "preference for prose <b>",
        "preference for code",
    ]
    assert page.get_by_text("Nothing is known of this model’s training.").is_visible()
    assert not page.locator("#time-live").is_visible()


@needs_browser
def test_pairs_are_drawn_and_the_last_layer_has_none_after_it(page):
    page.select_option("#pair-kind", "onward")
    page.locator("#pair-map").wait_for(state="visible")
    page.select_option("#layer", "2")
    page.locator("#pair-map").wait_for(state="hidden")
    assert page.locator("#pairs-said").inner_text() == "There is no MoE layer after this one."


@needs_browser
def test_a_domains_expert_is_marked_with_its_lift_and_interval_and_no_share_is_shown(chromium, tmp_path):
    """In layer 1 expert 6 takes nothing but domain b, whose documents are a third of all."""
    domain_D = np.arange(60) % 3
    domain_T, doc_T = (np.repeat(column_D, 4 * WINDOW) for column_D in (domain_D, np.arange(60)))
    expert_TLK = random_routes(len(doc_T), 2, 8, 1)
    expert_TLK[:, 1] = np.where(expert_TLK[:, 1] == 6, 7, expert_TLK[:, 1])
    expert_TLK[(domain_T == 1) & (np.random.default_rng(1).random(len(doc_T)) < 0.4), 1] = 6
    trace = write_trace(tmp_path / "t", expert_TLK, domain=domain_T, doc=doc_T, domains=["a", "b", "c"])
    inspection = inspect(trace)
    path = tmp_path / "index.html"
    path.write_text(render([Look("named", inspection, None, evidence=weigh(inspection))]), encoding="utf-8")
    page = opened(chromium, path)
    page.select_option("#layer", "1")
    page.locator("#domain-map").focus()
    for key in ["ArrowDown", *["ArrowRight"] * 6]:
        page.keyboard.press(key)
    said = page.locator("#domain-map-said").inner_text()
    number, low, high = re.fullmatch(
        r"b, expert 6: taken ([\d.]+) times as often as anything \(95% interval ([\d.]+) to ([\d.]+)\)", said
    ).groups()
    assert float(number) == 3.0
    assert 2.5 < float(low) <= 3.0 <= float(high) < 3.5
    assert page.said == []
    # The dot, in the middle of its cell and of no other of the row.
    dots = page.evaluate(
        """() => {
          const [map, over] = document.querySelectorAll("#domain-map canvas");
          const ink = (c) => over.getContext("2d").getImageData(over.width - 44 * (8 - c) + 22, 26 * 1.5, 1, 1).data[3];
          return [...Array(8).keys()].filter((c) => ink(c) > 0);
        }"""
    )
    assert dots == [6]
    rows = page.locator("table", has_text="p beyond tokens").locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [["layer 1, expert 6", "b"]]
    assert "May be called after b: it takes that 3.0 times" in _card(page, 6)
    assert "K/E" not in page.locator("body").inner_text()


def _card(page, expert):
    page.fill("#number", str(expert))
    page.locator("#number").press("Enter")
    return page.locator("#card").inner_text()


@needs_browser
def test_no_documents_text_is_run_or_parsed(page):
    text = page.locator("#tokens").inner_text()
    assert "<script>window.hacked=1</script>" in text
    assert "onerror=alert(1)" in text
    assert page.evaluate("window.hacked") is None
    assert page.locator("#tokens img, #card img, #tokens b").count() == 0
    assert page.locator("#tokens *").evaluate_all("parts => new Set(parts.map((part) => part.tagName)).size") == 1


@needs_browser
def test_the_pages_policy_runs_no_script_but_its_own(chromium, page_path, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(page_path.read_text().replace("<nav", "<script>window.hacked = 2</script><nav", 1))
    page = opened(chromium, path)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in page.said)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_in_light_and_dark_and_on_a_phone_nothing_is_cut_off(chromium, page_path, scheme):
    page = opened(chromium, page_path, color_scheme=scheme, viewport={"width": 390, "height": 844})
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 26)"}[scheme]
    corner = page.evaluate(
        "[...document.querySelector('#load-map canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    assert corner[:3] == {"light": [255, 255, 255], "dark": [18, 21, 26]}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.said == []


@needs_browser
def test_figures_can_be_saved_as_numbers_and_pictures(page):
    with page.expect_download() as saved:
        page.locator("#load ~ .save button", has_text="CSV").first.click()
    lines = saved.value.path().read_text().splitlines()
    assert lines[0] == '"","0","1","2","3","4","5","6","7"'
    assert [line.split(",")[0] for line in lines[1:]] == ['"layer 0"', '"layer 1"', '"layer 2"']
    assert lines[3].split(",")[4] == '"0"'
    figure = page.locator("figure:visible").first
    for kind, beginning in (("SVG", b"<svg"), ("CSV", b"curve,")):
        with page.expect_download() as saved:
            figure.get_by_role("button", name=kind).click()
        assert saved.value.path().read_bytes().startswith(beginning)


@needs_browser
def test_everything_that_can_be_worked_has_a_name(page):
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, [tabindex='0']")].filter((part) =>
          part.offsetParent && !(part.textContent.trim() || part.getAttribute("aria-label") || part.labels?.length))
          .map((part) => part.outerHTML)"""
    )
    assert nameless == []
