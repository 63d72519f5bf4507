"""The written page: whole, safe, the same each time, and readable in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import report_samples as samples

from rankalloc.errors import RankallocError
from rankalloc.report import exhibits, svg, tables
from rankalloc.report.html import write_report
from rankalloc.report.source import read_source
from rankalloc.trace import RankTrace

VOID = {"meta", "link", "input", "br", "img", "use", "path"}
SECTIONS = ["verdict", "alerts", "map", "ranks", "course", "why", "spectra", "cost", "quality", "sweep", "table", "reuse",
            "provenance", "glossary"]  # fmt: skip


class Page(HTMLParser):
    """Ids, addresses, tags and the text of each element that matters here."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.addresses, self.tags, self.sections, self.events = [], [], Counter(), [], []
        self.text, self.svgs = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.events += [name for name in values if name.startswith("on")]
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action", "srcset", "poster", "data")]
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "svg":
            self.svgs.append(values)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each sample's page, drawn once."""
    folder = tmp_path_factory.mktemp("reports")
    trace = samples.run()
    trace.save(folder / "run" / "trace.json")
    sweep = samples.sweep_folder(folder / "sweep")
    paths = {"run": write_report(folder / "run", folder / "out" / "run.html"),
             "sweep": write_report(folder / "sweep", folder / "out" / "sweep.html"),
             "hostile": write_report(samples.hostile(), folder / "out" / "hostile.html")}  # fmt: skip
    pages = {name: Page(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    return SimpleNamespace(folder=folder, paths=paths, pages=pages, trace=trace, sweep=sweep)


@pytest.mark.parametrize("name", ["run", "sweep", "hostile"])
def test_ids_are_unique_and_nothing_is_loaded(made, name):
    page = made.pages[name]
    assert [i for i, n in Counter(page.ids).items() if n > 1] == []
    assert page.addresses and all(a.startswith(("#", "data:")) for a in page.addresses)
    assert all(a[1:] in page.ids for a in page.addresses if a.startswith("#"))
    text = made.paths[name].read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "@import" not in text and not re.search(r"url\((?!#)", text)


def test_sections_are_in_order(made):
    assert made.pages["sweep"].sections == SECTIONS
    assert made.pages["run"].sections == [s for s in SECTIONS if s != "sweep"]


def test_every_figure_speaks_and_gives_its_numbers(made):
    page = made.pages["sweep"]
    assert len(page.svgs) == 11 == page.tags["figure"] == page.tags["figcaption"]
    assert all(s["role"] == "img" and len(s["aria-label"]) > 40 for s in page.svgs)
    text = made.paths["sweep"].read_text(encoding="utf-8")
    for figure in re.findall(r"<figure.*?</figure>", text, flags=re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", figure[figure.index("<details") :], flags=re.S)
        assert len(rows) > 1 and len({row.count("<th") + row.count("<td") for row in rows}) == 1
        assert re.search(r"\d", rows[1])


def test_every_layer_and_its_rank_can_be_read_without_script(made):
    text = re.sub(r"<script>.*</script>", "", made.paths["run"].read_text(encoding="utf-8"), flags=re.S)
    body = text[text.index('id="layers-table"') :]
    for layer, rank in zip(made.trace.layers, made.trace.final_ranks, strict=True):
        row = re.search(rf'<tr><th scope="row" class="name">{re.escape(layer.name)}</th>.*?</tr>', body)[0]
        assert f'<td class="num strong" data-value="{rank}">{rank}</td>' in row


def test_drawn_numbers_are_the_ranks(made):
    text = made.paths["run"].read_text(encoding="utf-8")
    figure = text[text.index('id="figure-map"') : text.index('id="figure-ranks"')]
    drawing = figure[: figure.index("</svg>")]
    ranks = Counter(re.findall(r"var\(--on\d+\)[^>]*>(\d+)</text>", drawing))
    assert ranks == Counter(str(r) for r in made.trace.final_ranks)


def test_names_are_data(made):
    text, page = made.paths["hostile"].read_text(encoding="utf-8"), made.pages["hostile"]
    assert page.tags["script"] == 1 and page.tags["img"] == 0 and page.events == []
    assert page.tags["svg"] == text.count("</svg>") == text.count("<svg class=")
    shown = "".join(page.text)
    for name in samples.HOSTILE:
        assert name.replace("\x07", "\ufffd") in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{ 7 * 7 }}" in shown


def test_downloads_hold_the_table(made):
    page = made.pages["run"]
    found = {a.split(";")[0]: base64.b64decode(a.split(",")[1]).decode() for a in page.addresses if "base64" in a}
    assert found["data:text/csv"] == tables.table_csv(tables.layer_rows(made.trace))
    assert [r["final_rank"] for r in json.loads(found["data:application/json"])] == made.trace.final_ranks


def test_same_bytes_from_the_folder_and_from_the_data_beside_the_page(made):
    again = write_report(made.paths["sweep"].with_suffix(".json"), made.folder / "again" / "sweep.html")
    assert again.read_bytes() == made.paths["sweep"].read_bytes()
    assert again.with_suffix(".json").read_bytes() == made.paths["sweep"].with_suffix(".json").read_bytes()


def test_data_beside_the_page(made):
    data = json.loads(made.paths["sweep"].with_suffix(".json").read_text())
    assert data["sweep"]["best"] == made.sweep.best and RankTrace.model_validate(data["trace"]) == made.trace
    assert data["control"]["method"] == "uniform"
    alone = json.loads(made.paths["run"].with_suffix(".json").read_text())
    assert alone["sweep"] is None and RankTrace.model_validate(alone["trace"]) == made.trace


@pytest.mark.parametrize("sample", ["bare", "one_layer", "all_zero"])
def test_odd_runs_make_a_page(sample, tmp_path):
    trace = getattr(samples, sample)()
    path = write_report(trace, tmp_path / "odd.html", title="An <odd> one")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<h1>An &lt;odd&gt; one</h1>" in text and page.sections == [s for s in SECTIONS if s != "sweep"]
    if sample == "bare":
        assert "No allocation took place" in text and "No evaluation was recorded" in text and "not recorded" in text
    if sample == "all_zero":
        assert "36 layers of 36 ended at rank 0" in text and "cannot be drawn" not in text


def test_a_sweep_in_memory_shows_the_sweep_only(tmp_path):
    bare = {"front": [], "importances": {}, "pair": None, "best": None}
    trials = [t.model_copy(update={"state": "failed", "value": None}) for t in samples.sweep().trials]
    text = write_report(samples.sweep().model_copy(update=bare | {"trials": trials}), tmp_path / "s.html").read_text()
    assert "No trace of the best trial" in text and Page(text).sections == [
        "verdict", "alerts", "sweep", "reuse", "provenance", "glossary"]  # fmt: skip


def test_224_layers_stay_readable(tmp_path):
    trace = samples.llama()
    rows, groups = tables.layer_rows(trace), tables.groups(trace)
    assert [len(g.layers) for g in groups] == [32] * 7
    item = exhibits.rank_map(trace)[0]
    drawn = re.findall(r"var\(--on\d+\)[^>]*>(\d+)</text>", item.svg)
    assert len(drawn) == 224 and Counter(map(int, drawn)) == Counter(r.final_rank for r in rows)
    course = exhibits.course(trace)[0]
    assert len(course.svg) < 1_000_000 and len(course.rows) == 4 + 224


def test_text_on_every_rank_colour_is_readable():
    for mode in svg.palette():
        for k in range(svg.LEVELS):
            assert svg.contrast(mode[f"level{k}"], mode[f"on{k}"]) >= 4.5
        for name in ("ink", "muted", "adaptive", "uniform"):
            assert svg.contrast(mode[name], mode["surface"]) >= 4.5, name
        # Lightness must be monotone, or the scale could not be read without colour.
        light = [svg._luminance(mode[f"level{k}"]) for k in range(svg.LEVELS)]
        assert light in (sorted(light), sorted(light, reverse=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "nothing to report on"), ("{", "no JSON"), ("[1]", "holds a list"), ('{"version": 9}', "version 9"),
     ('{"trace": null, "sweep": null}', "neither"), ('{"trace": {"version": 1}, "sweep": null}', "trace.name|trace.method"),
     ('{"trials": [], "version": 1}', "no valid sweep")],
)  # fmt: skip
def test_bad_sources_say_so_and_write_nothing(content, words, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RankallocError, match=words):
        write_report(path, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists() and not (tmp_path / "out.json").exists()


def test_bad_folders_outputs_and_lists(tmp_path):
    trace = samples.bare()
    with pytest.raises(RankallocError, match=r"no sweep\.json and no trace\.json"):
        write_report(tmp_path, tmp_path / "out.html")
    with pytest.raises(RankallocError, match=r"ending in \.html"):
        write_report(trace, tmp_path / "out.pdf")
    trace.save(tmp_path / "trace.json")
    before = (tmp_path / "trace.json").read_bytes()
    with pytest.raises(RankallocError, match="no report's data"):
        write_report(tmp_path, tmp_path / "trace.html")
    assert (tmp_path / "trace.json").read_bytes() == before and not (tmp_path / "trace.html").exists()
    short = samples.run().model_copy(update={"singular_values": [[1.0]]})
    with pytest.raises(RankallocError, match="singular_values has 1 entries for 36 layers"):
        write_report(short, tmp_path / "out.html")


def test_a_trial_may_not_point_outside_its_sweep(tmp_path):
    samples.bare().save(tmp_path / "elsewhere.json")
    record = samples.sweep()
    record.trial(record.best).trace = "../elsewhere.json"
    record.save(tmp_path / "sweep" / "sweep.json")
    with pytest.raises(RankallocError, match="outside its sweep's folder"):
        read_source(tmp_path / "sweep")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
         "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip


def browse(path, tmp_path, query="", width=1280):
    """(DOM after scripts ran, console lines, addresses requested for the page) from a real browser."""
    log = tmp_path / f"net-{path.stem}.json"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / f'profile-{path.stem}'}", f"--log-net-log={log}",
         f"--window-size={width},900", "--dump-dom", f"file://{os.fspath(path)}{query}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    events = json.loads(log.read_text())
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [e["params"] for e in events["events"] if e["type"] == start and "url" in e.get("params", {})]
    # The browser's own errands (its clock, its updates) come from no page.
    urls = [job["url"] for job in jobs if job.get("initiator") != "not an origin"]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, [u for u in urls if not u.startswith(("data:", "file:"))]


PROBE = """<script>
const table = document.getElementById("layers-table");
const ranks = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[6].dataset.value));
const shared = ranks();
table.querySelector("[data-key=params] button").click();
const sizes = [...table.tBodies[0].rows].map((row) => Number(row.cells[7].dataset.value));
document.documentElement.dataset.probe = JSON.stringify({ shared, sizes, query: location.search,
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
  shown: [...document.getElementById("trials-table").tBodies[0].rows].filter((row) => !row.hidden).length });
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(made, tmp_path):
    text = made.paths["sweep"].read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    dom, console, urls = browse(probed, tmp_path, "?layers=final.asc&trials.find=uniform", width=400)
    assert console == [] and urls == []
    found = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["shared"] == sorted(made.trace.final_ranks)  # the link's own sorting
    assert found["sizes"] == sorted(found["sizes"], reverse=True)  # a click's
    assert "layers=params.desc" in found["query"] and "trials.find=uniform" in found["query"]
    assert found["shown"] == 4 and found["width"] <= 500 and found["overflow"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_hostile_names_do_nothing_in_a_browser(made, tmp_path):
    dom, console, urls = browse(made.paths["hostile"], tmp_path)
    assert console == [] and urls == []
    assert dom.count("<script") == 1 and "<img" not in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_browser_check_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<link rel="icon" href="data:,"><script>console.error("boom")</script><img src="http://127.0.0.1:9/x.png">')
    _, console, urls = browse(page, tmp_path)
    assert any("boom" in line for line in console) and urls == ["http://127.0.0.1:9/x.png"]
