"""Suite page: how long the inspector's page takes to answer, in a real browser, and how large it is.

A page of random routes is opened from disk in headless Chromium; a row's numbers are the milliseconds from a click on
an expert to the next frame, over clicks all over the heat map, and the same of a hover and of choosing a passage.
Needs Playwright and a Chromium that the system has.

    python -m experiments.bench suite=page out=experiments/results/page.jsonl
"""

import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.pages.inspector_page import render
from experiments.pages.inspector_tables import Look
from experiments.suites.cases import Absent, Case
from moe.analysis.inspection import inspect
from moe.analysis.trace import About, Batch, Trace, Writer

HEADINGS = ("page", "size", "opens", "click to paint", "slowest of ten", "hover", "passage")
CONTEXT = 128
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# From an event to the frame that shows what it did.
TIMED = """async ([id, kind, x, y, value]) => {
  const part = document.getElementById(id), box = part.getBoundingClientRect();
  const start = performance.now();
  if (kind === "change") { part.selectedIndex = value % part.length; part.dispatchEvent(new Event("change")); }
  else part.dispatchEvent(new PointerEvent(kind, {clientX: box.x + x * box.width, clientY: box.y + y * box.height}));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}"""


class Size(NamedTuple):
    """A model, and how many of its tokens are traced."""

    layers: int
    experts: int
    k: int
    tokens: int


class Asked(NamedTuple):
    """What is measured."""

    sizes: tuple[Size, ...]
    clicks: int


def settings(device: torch.device, full: bool, rounds: int) -> Asked:
    """`rounds` times twenty clicks, or two on a tiny page."""
    if full:
        return Asked((Size(2, 8, 2, 100_096), Size(16, 64, 8, 100_096), Size(64, 256, 8, 16_384)), 20 * rounds)
    return Asked((Size(2, 4, 2, 256),), 2)


def cases(asked: Asked) -> Iterator[Case]:
    """A case per size."""
    for size in asked.sizes:
        yield Case({"suite": "page", **size._asdict()}, functools.partial(measured, size, asked.clicks))


def measured(size: Size, clicks: int) -> dict[str, Any]:
    """A row's numbers: bytes, seconds to open, and milliseconds to paint."""
    with tempfile.TemporaryDirectory() as folder:
        trace = random_trace(size, Path(folder) / "trace")
        path = Path(folder) / "index.html"
        path.write_text(render([Look("random", inspect(trace), None)]), encoding="utf-8")
        return {"bytes": path.stat().st_size} | in_browser(path, clicks)


def random_trace(size: Size, folder: Path) -> Trace:
    """Tokens by Zipf's law and routes at random, with a history of none."""
    rng = np.random.default_rng(0)
    shape = (size.tokens, size.layers)
    # Different experts of a token: strides from a random one, by an odd step.
    first_TL1 = rng.integers(0, size.experts, (*shape, 1))
    step_TL1 = 2 * rng.integers(0, max(1, size.experts // 2), (*shape, 1)) + 1
    expert_TLK = (first_TL1 + step_TL1 * np.arange(size.k)) % size.experts
    domains = ["code", "docs", "drama", "math", "verse"]
    about = About(
        "random", "", "", 50_000, CONTEXT, list(range(size.layers)), [size.experts] * size.layers, size.k, domains,
        "random routes",
    )  # fmt: skip
    windows = size.tokens // CONTEXT
    by_window = lambda column: np.asarray(column).reshape(windows, CONTEXT)
    token_T = np.minimum(rng.zipf(1.3, size.tokens), 49_999)
    place_T = np.arange(size.tokens) % CONTEXT
    window_T = np.arange(size.tokens) // CONTEXT
    loss_T = 5 * rng.random(size.tokens)
    columns = [token_T, np.roll(token_T, -1), window_T % len(domains), window_T, place_T, loss_T]
    weight_TLK = np.full(expert_TLK.shape, 1 / size.k, np.float32)
    scores = rng.random(shape), rng.random(shape)
    with Writer(folder, about) as writer:
        tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, loss_BS = map(by_window, columns)
        routes = expert_TLK, weight_TLK, *scores
        writer.add(Batch(tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, loss_BS, *routes))
    return Trace(folder)


def in_browser(path: Path, clicks: int) -> dict[str, Any]:
    """Open the page and work it. Raises `Absent` without a browser."""
    chromium = next((path_of for name in BROWSERS if (path_of := shutil.which(name))), None)
    if chromium is None:
        raise Absent("no Chromium on this machine")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Absent("playwright not installed") from None
    rng = np.random.default_rng(1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=true]", timeout=120_000)
        opened = time.perf_counter() - start

        def times(id: str, kind: str) -> list[float]:
            # The left tenth of a heat map has its names.
            places = [(0.1 + 0.89 * x, 0.9 * y) for x, y in rng.random((clicks, 2))]
            return [page.evaluate(TIMED, [id, kind, x, y, i + 1]) for i, (x, y) in enumerate(places)]

        click, hover, passage = times("load-map", "click"), times("load-map", "pointermove"), times("passage", "change")
        browser.close()
    middle = statistics.median
    slow = float(np.quantile(click, 0.9))
    return {
        "opens": opened,
        "click": middle(click),
        "click_slow": slow,
        "hover": middle(hover),
        "passage": middle(passage),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    name = f"{row['layers']} layers × {row['experts']} experts"
    if row["status"] != "measured":
        return (name, row.get("error", row["status"]), *[""] * (len(HEADINGS) - 2))
    ms = lambda key: f"{row[key]:.0f} ms"
    return (
        name,
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['opens']:.2f} s",
        *map(ms, ("click", "click_slow", "hover", "passage")),
    )
