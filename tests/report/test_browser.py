"""The pages in a real browser: silent, alone, accessible, and everything on them works."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rankalloc.report import exports
from rankalloc.report.facts import Facts
from rankalloc.report.writing import write_report
from tests.support import report_odd_samples as odd
from tests.support.report_browser import CHROMIUM, browser, download, findings
from tests.support.report_pages import pages

pytest.importorskip("playwright", reason="needs playwright, which the extra 'test' installs")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

REPORTS = sorted((Path(__file__).parents[2] / "reports").glob("*.html"))
VIEWS = [("light", 1280), ("dark", 1280), ("light", 400)]


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def made():
    return pages()


def ranks_on(tab, figure="map"):
    """{index of the layer: the number in its cell} of a map."""
    found = tab.eval_on_selector_all(
        f"#figure-{figure} [data-cell] text", "nodes => nodes.map(n => [n.parentNode.dataset.cell, n.textContent])"
    )
    return {int(cell): int(text) for cell, text in found}


def column(tab, table, place):
    return tab.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden])", f"rows => rows.map(row => row.cells[{place}].textContent)"
    )


@pytest.mark.parametrize(
    ("scheme", "width"), [VIEWS[0], *(pytest.param(*view, marks=pytest.mark.long) for view in VIEWS[1:])]
)
def test_a_comparison_is_silent_alone_and_accessible(chromium, made, scheme, width):
    with chromium.page(made.paths["comparison"], scheme=scheme, width=width) as tab:
        assert findings(tab) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.said == [] and tab.asked == []


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "width"), VIEWS)
@pytest.mark.parametrize("path", [*REPORTS, "sweep", "hostile"], ids=lambda p: getattr(p, "stem", p))
def test_every_page_is_accessible(chromium, made, path, scheme, width):
    with chromium.page(made.paths[path] if isinstance(path, str) else path, scheme=scheme, width=width) as tab:
        assert findings(tab) == []


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.stem)
def test_a_published_page_is_silent_and_alone(chromium, path):
    with chromium.page(path, width=400) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        unspoken = "svgs => svgs.filter(s => s.getAttribute('role') !== 'img' || !s.getAttribute('aria-label')).length"
        assert tab.eval_on_selector_all("figure svg", unspoken) == 0
        bare = "figures => figures.filter(f => !/\\d/.test(f.querySelector('tbody')?.textContent)).length"
        assert tab.eval_on_selector_all("figure", bare) == 0
    assert tab.said == [] and tab.asked == []


def test_a_link_restores_the_view_and_clicks_change_it(chromium, made):
    with chromium.page(made.paths["sweep"], "#table&layers=final.asc&trials.find=uniform&layers.find=%3") as tab:
        final = [int(text.split()[0]) for text in column(tab, "layers-table", 6)]
        assert final == sorted(made.trace.final_ranks)
        assert len(column(tab, "trials-table", 0)) == 4
        tab.click("#layers-table [data-key=params] button")
        sizes = [int(text.replace(",", "")) for text in column(tab, "layers-table", 7)]
        assert sizes == sorted(sizes, reverse=True)
        assert tab.get_attribute("#layers-table [data-key=params]", "aria-sort") == "descending"
        tab.fill("[data-for=layers-table] input", "layer.3 query")
        assert column(tab, "layers-table", 0) == ["bert.encoder.layer.3.attention.self.query"]
        state = tab.evaluate("location.hash").split("&")
        assert state[0] == "#table" and {"layers=params.desc", "trials.find=uniform"} <= set(state)
        tab.click("nav a[href='#map']")
        tab.wait_for_url("**#map&*layers=params.desc*")  # the section changed, the view stayed
    assert tab.said == []


def test_the_map_moves_through_training_time(chromium, made):
    past = Facts(made.trace).history
    with chromium.page(made.paths["sweep"]) as tab:
        assert ranks_on(tab) == dict(enumerate(past.ranks[-1]))
        slider = tab.get_by_role("slider")
        slider.press("Home")
        assert ranks_on(tab) == dict(enumerate(past.ranks[0])) and "432 ranks" in tab.inner_text(".time output")
        slider.press("ArrowRight")
        assert ranks_on(tab) == dict(enumerate(past.ranks[1]))
        assert tab.is_hidden(".mean >> nth=0")  # those of the last step
        assert f"step={past.steps[1]}" in tab.evaluate("location.hash")
        tab.reload()
        assert ranks_on(tab) == dict(enumerate(past.ranks[1]))
        slider.press("End")
        assert ranks_on(tab) == dict(enumerate(past.ranks[-1])) and "step" not in tab.evaluate("location.hash")
    assert tab.said == []


def test_values_are_told_under_pointer_and_keyboard(chromium, made):
    layers, final = made.trace.layers, made.trace.final_ranks
    with chromium.page(made.paths["sweep"]) as tab:
        tab.hover("#figure-map [data-cell='8'] text")
        told = tab.inner_text("#figure-map .hint")
        assert told.startswith(f"{layers[8].name}: ") and f"final rank {final[8]}," in told
        tab.focus("#figure-map .scroll")
        tab.keyboard.press("ArrowRight")
        assert layers[14].name in tab.inner_text("#figure-map .hint")  # the next block of the same role
        tab.keyboard.press("ArrowUp")
        assert layers[13].name in tab.inner_text("#figure-map .hint")


def test_points_of_curves_and_scatters_tell_their_values(chromium, made):
    trace = made.trace
    with chromium.page(made.paths["sweep"], java_script_enabled=False) as tab:
        told = {figure: tab.locator(f"#figure-{figure} .tip title").all_text_contents()
                for figure in ("curves", "front", "slices", "effective")}  # fmt: skip
        at = "e => { e.scrollIntoView(); const b = e.getBoundingClientRect(); return document.elementFromPoint(" \
             "b.x + b.width / 2, b.y + b.height / 2).closest('.tip') !== null }"
        assert tab.locator("#figure-front .tip use").first.evaluate(at)  # what is not seen takes the pointer
    last = trace.logs[-1].values["eval_f1"]
    assert f"eval_f1, step 240: {last:.4g}" in told["curves"] and len(told["front"]) == 23
    assert any(text.startswith("trial 1, adaptive: ") for text in told["front"])
    named = {name for text in told["effective"] for name in text.partition(":")[0].split(" and ")[0].split(", ")}
    assert named <= {layer.name for layer in trace.layers} and told["slices"]


def test_tables_and_figures_can_be_saved_and_copied(chromium, made):
    rows = Facts(made.trace).layers
    with chromium.page(made.paths["sweep"], permissions=["clipboard-read", "clipboard-write"]) as tab:
        assert download(tab, "Download table layers as CSV").decode() == exports.table_csv(rows)
        assert json.loads(download(tab, "Download table layers as JSON")) == exports.table_records(rows)
        tab.get_by_role("button", name="Copy table layers as CSV").click()
        assert tab.evaluate("navigator.clipboard.readText()").splitlines() == exports.table_csv(rows).splitlines()
        svg = download(tab, "Download figure map as SVG")
        assert b"var(" not in svg and len(ElementTree.fromstring(svg).findall(".//{*}text")) >= 36
        assert download(tab, "Download figure map as PNG").startswith(b"\x89PNG")
        numbers = list(csv.reader(io.StringIO(download(tab, "Download the numbers of figure ranks as CSV").decode())))
        assert numbers[0] == ["layer", "final rank", "uniform", "initial rank"] and len(numbers) == 37
    assert tab.said == [] and tab.asked == []


def test_names_do_nothing(chromium, made):
    rows = Facts(odd.hostile()).layers
    with chromium.page(made.paths["hostile"]) as tab:
        tab.click("#layers-table [data-key=name] button")
        tab.hover("#figure-map [data-cell='2'] text")
        assert odd.HOSTILE[2] in tab.inner_text("#figure-map .hint")
        saved = csv.DictReader(io.StringIO(download(tab, "Download table layers as CSV").decode()))
        written = csv.DictReader(io.StringIO(exports.table_csv(rows)))
        assert [row["name"] for row in saved] == [row["name"] for row in written]
        assert tab.locator("script").count() == 2 and tab.locator("img").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280  # one of the names has 300 letters
    assert tab.said == [] and tab.asked == []


def test_without_scripts_everything_can_be_read(chromium, made):
    with chromium.page(made.paths["sweep"], java_script_enabled=False) as tab:
        text = tab.inner_text("#layers-table")
        assert all(layer.name in text for layer in made.trace.layers)
        assert tab.locator("button:visible, input:visible").count() == 0  # nothing that would not work


def test_the_checks_can_fail(chromium, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<link rel="icon" href="data:,"><script>console.error("boom")</script><img src="http://127.0.0.1:9/x.png">'
    )
    with chromium.page(page) as tab:
        found = findings(tab)
    assert any(rule.startswith("image-alt") for rule in found)
    assert "boom" in tab.said and tab.asked == ["http://127.0.0.1:9/x.png"]


@pytest.mark.long
def test_500_blocks_are_small_and_quick(chromium, tmp_path):
    trace = odd.llama(500)
    start = time.perf_counter()
    page = write_report(trace, tmp_path / "large.html")
    assert time.perf_counter() - start < 20 and page.stat().st_size < 5e6
    with chromium.page(page) as tab:
        sort = (
            "() => { const start = performance.now(); document.querySelector('#layers-table [data-key=params] button')"
            ".click(); document.body.offsetHeight; return performance.now() - start; }"
        )
        assert tab.evaluate(sort) < 250
        sizes = [int(text.replace(",", "")) for text in column(tab, "layers-table", 7)]
        assert len(sizes) == 400 and sizes == sorted(sizes, reverse=True)
        tab.click("text=Show all")
        assert len(column(tab, "layers-table", 0)) == 3500
        start = time.perf_counter()
        tab.get_by_role("slider").press("Home")
        assert time.perf_counter() - start < 2 and set(ranks_on(tab).values()) == {16}
    assert tab.said == [] and tab.asked == []
