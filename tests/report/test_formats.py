"""The short forms of a report and its figures for papers."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from rankalloc.errors import RankallocError
from rankalloc.report import exhibits, paper, svg
from rankalloc.report.facts import Facts, Subject
from rankalloc.report.kinds import Source
from rankalloc.report.markdown import code, plain, render_markdown
from rankalloc.report.paper import write_figures
from rankalloc.report.source import read_source
from rankalloc.report.summary import summary
from rankalloc.report.writing import write_report
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples
from tests.support.report_pages import pages

KEYS = {
    "schema", "version", "kind", "name", "created", "verdict", "next", "alerts", "budget", "adapter_params", "quality",
    "cost", "layers", "trials", "parts", "comparison",
}


def subjects():
    run = Source(odd.one_layer())
    return {
        "run": run, "sweep": Source(None, samples.sweep()),
        "comparison": Source(odd.one_layer(), other=Source(odd.one_layer())),
    }


@pytest.mark.parametrize("kind", ["run", "sweep", "comparison"])
def test_a_script_finds_the_same_keys_in_every_kind(kind):
    found = summary(Subject.of(subjects()[kind]))
    assert set(found) == KEYS and (found["schema"], found["version"], found["kind"]) == ("rankalloc.report", 1, kind)
    assert found["verdict"]["outcome"] in ("helped", "hurt", "cannot tell")
    json.dumps(found, allow_nan=False)


def test_the_summary_of_a_run_holds_its_ranks_and_quality():
    trace = samples.run(blocks=2, target=72)
    found = summary(Subject.of(Source(trace)))
    assert [(x["name"], x["final_rank"]) for x in found["layers"]] == [
        (layer.name, rank) for layer, rank in zip(trace.layers, trace.final_ranks, strict=True)
    ]
    assert found["budget"] == {
        "unit": "ranks", "target": 72, "reached": 72, "initial": 144, "state": "exact", "uniform_rank": 6.0,
    }
    report = found["quality"][1]
    assert report["split"] == "report" and report["metrics"]["f1"] == 0.508 and report["standard_error"] > 0


def test_the_summary_of_a_comparison():
    found = summary(Subject.of(read_source(pages().paths["comparison"].with_suffix(".json"))))["comparison"]
    assert found["names"] == ["punctuation", "the <other>"] and len(found["layers"]) == 18
    assert all(x["change"] == x["first"] - x["second"] for x in found["layers"])
    assert 0 < found["rank_overlap"] < 1 and -1 <= found["rank_correlation"] <= 1 and found["paired"]["examples"] == 400


def test_markdown_has_verdict_table_and_folded_ranks():
    trace = samples.run(blocks=2, target=72)
    text = render_markdown(Subject.of(Source(trace)))
    assert text.startswith("## punctuation\n\n**The budget was met exactly (72 of 72 ranks)")
    folded = text[text.index("<details>") : text.index("</details>")]
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (\d+) \|", folded, re.M)
    assert [(name, int(rank)) for name, _, rank in rows] == [
        (layer.name, rank) for layer, rank in zip(trace.layers, trace.final_ranks, strict=True)
    ]
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables) == {3, 5} and "\n\n\n" not in text  # two columns and four


def test_names_do_nothing_in_markdown():
    text = render_markdown(Subject.of(Source(odd.hostile())))
    outside = re.sub(r"(`+).*?\1", "", text)
    assert "<script>" not in outside and "<img" not in outside and "<b>" not in outside
    assert plain("a|b*c <x> [l](u) @me") == "a\\|b\\*c &lt;x&gt; \\[l\\](u) @\u200bme"
    assert code("a`b|c") == "``a`b\\|c``" and code("`") == "`` ` ``"


@pytest.mark.parametrize(
    ("output", "form", "words"),
    [
        ("x.pdf", None, "ending in .html, .md or .json, not to .*x.pdf"),
        ("x.html", "md", "ends in .html, and the format is md"),
        ("x.txt", "md", "written to a file ending in .md"),
        ("x.html", "pdf", "no format 'pdf'; a report is written as html, md, json"),
    ],
)
def test_formats_that_do_not_fit_are_one_sentence(tmp_path, output, form, words):
    with pytest.raises(RankallocError, match=words):
        write_report(odd.one_layer(), tmp_path / output, format=form)
    assert list(tmp_path.iterdir()) == []


def test_a_summary_is_written_again_but_over_nothing_else(tmp_path):
    path = write_report(odd.one_layer(), tmp_path / "x.json")
    first = path.read_bytes()
    assert write_report(odd.one_layer(), path).read_bytes() == first
    odd.one_layer().save(path)
    with pytest.raises(RankallocError, match="is there and is no report"):
        write_report(odd.one_layer(), path)


def test_figures_fit_their_columns_and_have_the_same_bytes_each_time(tmp_path):
    shown = exhibits.rank_map(Facts(odd.one_layer()))
    paths = write_figures(shown, tmp_path / "a")
    assert sorted(p.name for p in paths) == [
        f"map-{end}.{form}" for end in ("double", "single") for form in ("pdf", "png", "svg")
    ]
    for path in write_figures(shown, tmp_path / "b"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    for end, inches in (("single", 3.25), ("double", 6.75)):
        pdf = (tmp_path / "a" / f"map-{end}.pdf").read_bytes()
        assert f"/MediaBox [ 0 0 {72 * inches:g} ".encode() in pdf and b"CreationDate" not in pdf
        assert b"/CIDFontType2" in pdf and b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
        assert Image.open(tmp_path / "a" / f"map-{end}.png").width == 300 * inches
        drawn = (tmp_path / "a" / f"map-{end}.svg").read_text()
        assert f'width="{72 * inches:g}pt"' in drawn and "<text" not in drawn and "#0a00" not in drawn


@pytest.mark.parametrize("end", list(paper.COLUMNS))
def test_text_on_paper_has_eight_to_nine_points(end):
    run = Facts(samples.run(blocks=2, target=72))
    for item in [*exhibits.rank_map(run), *exhibits.final_ranks(run), *exhibits.course(run), *exhibits.why(run)]:
        with svg.drawing(paper.COLUMNS[end]):
            figure = item.draw()
            sizes = {text.get_fontsize() for text in figure.findobj(lambda one: hasattr(one, "get_fontsize"))
                     if text.get_text()}  # fmt: skip
        assert sizes and min(sizes) >= 8 and max(sizes) <= 9, item.key


def test_no_figures_is_one_sentence(tmp_path):
    with pytest.raises(RankallocError, match="no figures"):
        write_figures([], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
