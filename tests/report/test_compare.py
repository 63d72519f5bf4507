"""Two results side by side, with numbers worked out by hand."""

from __future__ import annotations

import json
import re

import pytest

from rankalloc.errors import RankallocError
from rankalloc.report.compare import Comparison
from rankalloc.report.facts import Subject
from rankalloc.report.html import render
from rankalloc.report.side import Side, SideLayer
from rankalloc.report.source import read_source, told_apart
from rankalloc.report.verdict_compare import compared
from rankalloc.report.writing import write_report
from tests.support import report_samples as samples
from tests.support.report_pages import Page, pages


def side(name, *ranks, cost=10, begin=0, losses=None, **changes):
    """A side with layers ``a.0.q``, ``a.1.q`` ... of these ranks."""
    layers = [SideLayer(f"a.{b}.q", b, "q", rank, cost) for b, rank in enumerate(ranks, begin)]
    base = {"fingerprint": "same", "losses": {"report": losses} if losses else {}}
    return Side(name, "run", layers, **(base | changes))


def test_overlap_correlation_and_change():
    pair = Comparison(side("one", 4, 2, 0, 6), side("two", 4, 1, 3, 0))
    assert [row.change for row in pair.layers] == [0, 1, -3, 6]
    assert pair.grid.cells == [[0, 1, -3, 6]] and pair.grid.layers == [[0, 1, 2, 3]]
    assert pair.layer_overlap == pytest.approx(2 / 4)  # the first two, of all four
    assert pair.rank_overlap == pytest.approx((4 + 1 + 0 + 0) / (4 + 2 + 3 + 6))
    # places 3 2 1 4 and 4 2 3 1: squared differences 1, 0, 4, 9, so 1 - 6 * 14 / (4 * 15)
    assert pair.correlation == pytest.approx(1 - 6 * 14 / 60)
    assert Comparison(side("one", 4, 2, 0), side("two", 3, 3, 3)).correlation is None  # one side is constant


def test_layers_of_one_side_only():
    pair = Comparison(side("one", 4, 2), side("two", 2, 5, begin=1))
    assert [(row.name, row.one, row.other) for row in pair.layers] == [
        ("a.0.q", 4, None), ("a.1.q", 2, 2), ("a.2.q", None, 5),
    ]
    assert pair.common == [(2, 2)] and pair.layer_overlap == pytest.approx(1 / 3)
    notes = compared(pair).notes
    assert "1 layer only in one." in notes and "1 layer only in two." in notes
    apart = Comparison(side("one", 4), side("two", 4, begin=7))
    assert apart.common == [] and "no layer in common" in compared(apart).notes[0]


def test_settings_that_differ():
    one, other = {"a": {"b": 1, "c": 2}, "x": None, "same": 3}, {"a": {"b": 1, "c": 5}, "y": [1], "same": 3}
    one |= {"name": "one", "output": "out", "audit": {"trials": 1}, "sweep": {}, "training": {"save_every": 5}}
    pair = Comparison(side("one", 4, config=one), side("two", 4, config=other))
    assert pair.settings == [("a.c", "2", "5"), ("x", "null", "not set"), ("y", "not set", "[1]")]


@pytest.mark.parametrize(
    ("one", "other", "outcome", "begins"),
    [
        ((4, 4), (4, 4), "helped", "At the same size (80 parameters), one did better than two on the report split"),
        ((4, 4), (4, 3), "helped", "At the same size to within one rank (80 against 70 parameters), one did better"),
        ((4, 4), (3, 3), "cannot tell", "Not like with like: one is 33.3 % larger than two (80 against 60"),
        ((3, 3), (4, 4), "helped", "Not like with like: one is 25.0 % smaller than two (60 against 80 parameters)."),
        ((4, 4), (0, 0), "cannot tell", "Not like with like: two keeps no ranks"),
    ],
)
def test_a_verdict_compares_like_with_like_or_says_that_it_does_not(one, other, outcome, begins):
    better, worse = [1.0, 2.0, 3.0, 4.0], [1.5, 2.6, 3.4, 4.5]
    said = compared(Comparison(side("one", *one, losses=better), side("two", *other, losses=worse)))
    assert said.sentence.startswith(begins) and said.outcome == outcome and said.sentence.count("4 examples") == 1


def test_the_interval_is_that_of_a_paired_t_test():
    pair = Comparison(side("one", 4, losses=[1.0, 2.0, 4.0]), side("two", 4, losses=[2.0, 2.0, 2.0]))
    # differences -1, 0, 2: mean 1/3, s = sqrt(7/3), t(0.975, 2) = 4.302653
    half = 4.302653 * (7 / 3) ** 0.5 / 3**0.5
    assert pair.paired.difference == pytest.approx(1 / 3)
    assert (pair.paired.low, pair.paired.high) == pytest.approx((1 / 3 - half, 1 / 3 + half), rel=1e-6)
    assert compared(pair).outcome == "cannot tell" and "cannot tell one from two" in compared(pair).sentence
    same = Comparison(side("one", 4, losses=[1.0, 2.0]), side("two", 4, losses=[1.0, 2.0]))
    assert same.paired.low == same.paired.high == 0


def test_other_data_are_not_paired():
    pair = Comparison(side("one", 4, losses=[1.0, 2.0]), side("two", 4, losses=[2.0, 3.0], fingerprint="other"))
    assert pair.paired is None and "different data" in compared(pair).notes[-1]
    assert "no quality was measured" in compared(pair).sentence


def test_two_of_one_name_are_told_apart():
    assert Comparison(side("a", 1), side("a", 2)).names == ("a (1)", "a (2)")
    assert Comparison(side("a", 1, place="x"), side("a", 2, place="y")).names == ("x", "y")
    assert Comparison(side("a", 1, place="x"), side("b", 2, place="y")).names == ("a", "b")


@pytest.mark.parametrize(
    ("one", "other", "places"),
    [
        ("a", "b", ("a", "b")), ("a/trace.json", "b", ("a", "b")), ("a/run", "b/run", ("a/run", "b/run")),
        ("a", "a", ("", "")), ("x.json", "y/report.json", ("x", "report")),
    ],
)
def test_two_paths_are_told_apart_by_their_ends(tmp_path, one, other, places):
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
    assert told_apart(tmp_path / one, tmp_path / other) == places


def test_a_metric_that_contradicts_the_loss_is_said_and_nothing_is_claimed():
    quality = [{"report": {"f1": value, "loss": 1.0, "own": value}} for value in (0.5, 0.6)]
    better, worse = [1.0, 2.0, 3.0, 4.0], [1.5, 2.6, 3.4, 4.5]
    said = [
        compared(Comparison(side("one", 4, losses=better, quality=first), side("two", 4, losses=worse, quality=second)))
        for first, second in (quality, quality[::-1])
    ]
    assert "but f1 says the opposite, 0.5 for one and 0.6 for two" in said[0].sentence
    assert said[0].outcome == "cannot tell" and "own" not in said[0].sentence  # nobody knows which way that one is
    assert "opposite" not in said[1].sentence and said[1].outcome == "helped"
    assert said[1].notes[-1] == "On the report split f1 is 0.6 for one and 0.5 for two."


def test_one_learning_rate_each_is_said_to_be_untuned():
    def notes(one, other):
        sides = [side(name, 4, losses=[1.0, 2.0 + place], config={"training": {"learning_rate": rate}})
                 for place, (name, rate) in enumerate((("one", one), ("two", other)))]
        return " ".join(compared(Comparison(*sides)).notes)

    assert "(learning rate 0.00125), and methods differ" in notes(1.25e-3, 1.25e-3)
    assert "(learning rates 0.001 and 0.008)" in notes(1e-3, 8e-3) and "one rate" not in notes(None, 1e-3)


def test_the_page_of_a_comparison_and_the_data_beside_it(tmp_path):
    made = pages()
    path = made.paths["comparison"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "What next" in page.text and "next-1" in page.ids
    assert page.twice == [] and page.sections == [
        "verdict", "alerts", "change", "agreement", "maps", "quality", "cost", "settings", "table", "provenance",
    ]
    assert "the &lt;other&gt;: Ranks were still moving at the freeze" in text  # an alert of the second run
    assert "the &lt;other&gt;" in text and "the <other>" not in text
    again = write_report(path.with_suffix(".json"), tmp_path / "comparison.html")
    assert again.read_bytes() == path.read_bytes()


def test_any_two_kinds_can_be_compared(tmp_path):
    """A run beside the cut that was made of it, and a sweep beside a run."""
    run = samples.run(blocks=2, target=72)
    layers = [
        {"name": layer.name, "d_in": layer.d_in, "d_out": layer.d_out, "rank_before": rank, "rank": rank // 2,
         "norm": 1.0, "error": 0.1, "metric_norm": 1.0, "metric_error": 0.1, "relative_error": 0.1}
        for layer, rank in zip(run.layers, run.final_ranks, strict=True)
    ]  # fmt: skip
    cut = {"version": 1, "sources": ["adapter"], "metric": "frobenius", "error": 0.1, "ranks": {}, "layers": layers}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "shrink.json").write_text(json.dumps(cut))
    pair = Subject.of(read_source(run, tmp_path / "small")).comparison
    assert [row.other for row in pair.layers] == [rank // 2 for rank in run.final_ranks]
    assert [row.role for row in pair.layers] == [layer.role for layer in run.layers]
    alone = render(read_source(tmp_path / "small"))
    assert "parameters were kept" in alone and Page(alone).sections == ["cut"]
    best = Subject.of(read_source(pages().folder / "sweep", run)).comparison
    assert best.names == ("punctuation sweep", "punctuation") and len(best.common) == 12


def test_what_has_no_ranks_is_not_compared(tmp_path):
    point = {"budget": {}, "params": 10, "ranks": 2, "error": 0.1, "value": 0.5}
    points = {"points": [point, point | {"params": 5}], "knee": point}
    (tmp_path / "frontier.json").write_text(json.dumps({"metric": "f1", "higher_is_better": True, **points}))
    with pytest.raises(RankallocError, match="a frontier has no ranks by layer.*a run, a sweep, an audit, a cut or"):
        write_report(samples.run(blocks=2, target=72), tmp_path / "out.html", compare=tmp_path)
    assert not (tmp_path / "out.html").exists()
    text = write_report(tmp_path, tmp_path / "curve.html").read_text()
    assert "f1 is 0.5 with 10 parameters" in text and Page(text).sections == ["frontier"]
    (tmp_path / "b").mkdir()
    other = {"metric": "f1", "higher_is_better": True, **points, "points": [point | {"value": 0.25}]}
    (tmp_path / "b" / "frontier.json").write_text(json.dumps(other))
    both = write_report(tmp_path, tmp_path / "both.html", compare=tmp_path / "b")
    text = both.read_text()
    assert "f1 is 0.5 with 10 parameters" in text and "b: f1 is 0.25 with 10 parameters" in text
    assert re.search(r'<th scope="row">b</th><td>10</td><td>2</td><td>0.25</td>', text)
    assert write_report(both.with_suffix(".json"), tmp_path / "again" / "both.html").read_text() == text
    (tmp_path / "b" / "frontier.json").write_text(json.dumps(other | {"metric": "accuracy"}))
    with pytest.raises(RankallocError, match="one frontier measures f1 and the other accuracy"):
        write_report(tmp_path, tmp_path / "both.html", compare=tmp_path / "b")
