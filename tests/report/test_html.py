"""The written page: whole, safe and the same each time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rankalloc.errors import RankallocError
from rankalloc.report import colours, curves, exhibits, exhibits_sweep, exports, grids, svg, sweeps, tables
from rankalloc.report.exhibit import Exhibit
from rankalloc.report.facts import Facts
from rankalloc.report.html import render
from rankalloc.report.sections import SECTIONS as SECTIONS_OF_A_PAGE
from rankalloc.report.sections import Section, of_run
from rankalloc.report.source import Source, read_source
from rankalloc.report.wording import printable
from rankalloc.report.writing import write_report
from rankalloc.trace import RankTrace
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples
from tests.support.report_pages import Page, pages

SECTIONS = [
    "verdict", "alerts", "map", "ranks", "course", "why", "spectra", "cost", "quality", "sweep", "table", "reuse",
    "provenance", "glossary",
]


@pytest.fixture(scope="module")
def made():
    return pages()


@pytest.mark.parametrize("name", ["sweep", "hostile"])
def test_ids_are_unique_and_nothing_is_loaded(made, name):
    page = made.pages[name]
    assert page.twice == []
    assert page.addresses and all(a.startswith(("#", "data:")) for a in page.addresses)
    assert all(a[1:] in page.ids for a in page.addresses if a.startswith("#"))
    text = made.paths[name].read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "@import" not in text and not re.search(r"url\((?!#)", text)


def test_sections_are_in_order(made):
    page = made.pages["sweep"]
    assert page.sections == SECTIONS and "What next" in page.text and {"next-1", "next-2"} <= set(page.ids)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "reports").glob("*.html")), ids=lambda p: p.stem)
def test_a_published_page_has_each_id_once(path):
    assert Page(path.read_text(encoding="utf-8")).twice == []


def test_other_controls_and_given_ranks_have_shapes_of_their_own():
    record = samples.sweep()
    trials = [t.model_copy(update={"params": dict(t.params)}) for t in record.trials]
    trials[2].params["placement"], trials[3].params["method"] = "random", "manual"
    made = exhibits_sweep.sweep(record, sweeps.trial_rows(record))
    mixed = record.model_copy(update={"trials": trials})
    drawn = exhibits_sweep.sweep(mixed, sweeps.trial_rows(mixed))
    assert "triangles" not in made[0].caption and "diamonds" not in made[0].caption
    assert "triangles other controls, diamonds given ranks" in drawn[0].caption
    assert {row[0]: row[1] for row in drawn[0].rows}.items() >= {"2": "control", "3": "given"}.items()
    for item in drawn[0], drawn[2]:
        assert {"adaptive", "uniform", "control", "given"} <= set(re.findall(r">(\w+)</text>", item.svg))


def test_a_page_works_out_each_fact_once(monkeypatch):
    calls = Counter()

    def counting(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    for module, names in (
        (tables, ("history", "uniform_rank", "spectra", "layer_rows", "score_table")), (grids, ("groups", "grid")),
        (curves, ("curves",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    monkeypatch.setattr(sweeps, "trial_rows", counting("trial_rows", sweeps.trial_rows))
    render(Source(odd.one_layer(), samples.sweep()))
    assert len(calls) == 9 and set(calls.values()) == {1}


def test_each_file_is_read_once(made, monkeypatch):
    opened, read_text = Counter(), Path.read_text

    def counted(path, *args, **kwargs):
        opened[path.name, path.parent.name] += 1
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    for source in (made.folder / "sweep", made.paths["sweep"].with_suffix(".json"), made.folder / "sweep/sweep.json"):
        opened.clear()
        read_source(source)
        assert opened and set(opened.values()) == {1}


def test_a_section_is_one_function_and_one_line(monkeypatch):
    def depth(run):
        rows = [[str(b), "1"] for b in range(3)]

        def draw():
            figure = svg.canvas(1.0)
            figure.add_subplot().plot([0, 1, 2], [1, 1, 1], color=colours.INK)
            return figure

        return [Exhibit("depth", "Depth", draw, "By <depth>.", ["block", "layers"], rows)]

    added = Section("depth", "By depth", "figures.html.j2", of_run(depth))
    monkeypatch.setattr("rankalloc.report.sections.SECTIONS", (*SECTIONS_OF_A_PAGE, added))
    page = Page(text := render(Source(odd.one_layer())))
    assert page.sections[-1] == "depth" and page.twice == [] and '<a href="#depth">By depth</a>' in text
    assert f"<strong>Figure {page.tags['figure']}. Depth.</strong> By &lt;depth&gt;." in text


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
    text = re.sub(r"<script>.*</script>", "", made.paths["sweep"].read_text(encoding="utf-8"), flags=re.S)
    body = text[text.index('id="layers-table"') :]
    for layer, rank in zip(made.trace.layers, made.trace.final_ranks, strict=True):
        row = re.search(rf'<tr><th scope="row">{re.escape(layer.name)}</th>.*?</tr>', body)[0]
        assert re.findall(r"<td>(.*?)</td>", row)[5] == str(rank)


def test_drawn_numbers_are_the_ranks(made):
    text = made.paths["sweep"].read_text(encoding="utf-8")
    figure = text[text.index('id="figure-map"') : text.index('id="figure-ranks"')]
    drawing = figure[: figure.index("</svg>")]
    ranks = Counter(re.findall(r"var\(--on\d+\)[^>]*>(\d+)</text>", drawing))
    assert ranks == Counter(str(r) for r in made.trace.final_ranks)


def test_names_are_data(made):
    text, page = made.paths["hostile"].read_text(encoding="utf-8"), made.pages["hostile"]
    assert page.tags["script"] == 2 and page.tags["img"] == 0 and page.events == []
    assert page.tags["svg"] == text.count("</svg>") == text.count("<svg class=")
    shown = "".join(page.text)
    for name in odd.HOSTILE:
        assert printable(name) in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{ 7 * 7 }}" in shown


def test_the_script_has_the_table_and_every_step(made):
    """One block, whose names cannot end it: a browser reads it up to the first end tag."""
    for name in ("sweep", "hostile"):
        text = made.paths[name].read_text(encoding="utf-8")
        block = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)[1]
        assert "<" not in block and text.count('type="application/json"') == 1
        found = json.loads(block)
        run = Facts(made.trace if name == "sweep" else read_source(made.paths[name].with_suffix(".json")).trace)
        table, frames = found["tables"]["layers"], found["frames"]["layers"]
        assert [dict(zip(table["columns"], x, strict=True)) for x in table["rows"]] == exports.table_records(run.layers)
        assert frames["steps"] == run.history.steps and frames["ranks"] == run.history.ranks


def test_the_data_beside_a_page_is_all_it_needs(made):
    assert read_source(made.paths["sweep"].with_suffix(".json")) == read_source(made.folder / "sweep")


def test_same_bytes_in_another_process(tmp_path):
    """Hash order differs between processes, so one process drawing twice would prove little."""
    first = write_report(odd.one_layer(), tmp_path / "a" / "one.html")
    code = "import sys; from rankalloc.report.writing import write_report; write_report(sys.argv[1], sys.argv[2])"
    second = tmp_path / "b" / "one.html"
    command = [sys.executable, "-c", code, str(first.with_suffix(".json")), str(second)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "77"}, cwd=Path(__file__).parents[2])
    assert second.read_bytes() == first.read_bytes()
    assert second.with_suffix(".json").read_bytes() == first.with_suffix(".json").read_bytes()
    assert Page(first.read_text(encoding="utf-8")).sections == [s for s in SECTIONS if s != "sweep"]


def test_data_beside_the_page(made):
    data = json.loads(made.paths["sweep"].with_suffix(".json").read_text())
    assert data["sweep"]["best"] == made.sweep.best and RankTrace.model_validate(data["trace"]) == made.trace
    assert data["control"]["method"] == "uniform"


@pytest.mark.parametrize("sample", ["bare", "all_zero"])
def test_odd_runs_make_a_page(sample, tmp_path):
    trace = getattr(odd, sample)()
    path = write_report(trace, tmp_path / "odd.html", title="An <odd> one")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.twice == []
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
        "verdict",
        "alerts",
        "sweep",
        "reuse",
        "provenance",
        "glossary",
    ]


def test_224_layers_stay_readable(tmp_path):
    trace = odd.llama()
    facts = Facts(trace)
    assert [len(g.layers) for g in facts.groups] == [32] * 7
    item = exhibits.rank_map(facts)[0]
    drawn = re.findall(r"var\(--on\d+\)[^>]*>(\d+)</text>", item.svg)
    assert len(drawn) == 224 and Counter(map(int, drawn)) == Counter(r.final_rank for r in facts.layers)
    course = exhibits.course(facts)[0]
    assert len(course.svg) < 1_000_000 and len(course.rows) == 4 + 224


def test_text_on_every_rank_colour_is_readable():
    for mode in colours.palette():
        for k in range(colours.LEVELS):
            assert colours.contrast(mode[f"level{k}"], mode[f"on{k}"]) >= 4.5
        for name in ("ink", "muted", "adaptive", "uniform"):
            assert colours.contrast(mode[name], mode["surface"]) >= 4.5, name
        # Lightness must be monotone, or the scale could not be read without colour.
        light = [colours.contrast(mode[f"level{k}"], "#000000") for k in range(colours.LEVELS)]
        assert light in (sorted(light), sorted(light, reverse=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "nothing to report on"),
        ("{", "no JSON"),
        ("[1]", "holds a list"),
        ('{"version": 9}', "version 9"),
        ('{"trace": null, "sweep": null}', "neither"),
        ('{"trace": {"version": 1}, "sweep": null}', "'trace' in .* is no valid trace: method"),
        ('{"trials": [], "version": 1}', "no valid sweep"),
    ],
)
def test_bad_sources_say_so_and_write_nothing(content, words, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RankallocError, match=words):
        write_report(path, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists() and not (tmp_path / "out.json").exists()


def test_bad_folders_outputs_and_lists(tmp_path):
    trace = odd.bare()
    with pytest.raises(RankallocError, match=r"it has no audit\.json, sweep\.json, trace\.json, shrink"):
        write_report(tmp_path, tmp_path / "out.html")
    with pytest.raises(RankallocError, match=r"ending in \.html, \.md or \.json"):
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
    odd.bare().save(tmp_path / "elsewhere.json")
    record = samples.sweep()
    record.trial(record.best).trace = "../elsewhere.json"
    record.save(tmp_path / "sweep" / "sweep.json")
    with pytest.raises(RankallocError, match="outside its sweep's folder"):
        read_source(tmp_path / "sweep")
