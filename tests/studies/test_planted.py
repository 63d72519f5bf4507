"""The study of planted ranks: its own code path on runs of twenty steps, its statistics on made-up errors."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import rankalloc as ra
from studies.planted import page as pages
from studies.planted import run as study
from studies.planted.problems import VARIANTS
from studies.planted.summary import rows, table
from studies.planted.training import PROTOCOL, default_method, fit, rate_of
from tests.support.report_pages import Page


def test_two_short_runs_a_table_and_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "set_up", lambda: None)  # it changes the whole process
    output, page = tmp_path / "results.json", tmp_path / "planted.html"
    command = ["--variants", "main", "--architectures", "mlp", "--seeds", "1", "--steps", "20", "--workers", "1",
               "--output", str(output), "--page", str(page), "--methods", "singular-value", "uniform"]
    assert study.main(command) == 0
    printed, record = capsys.readouterr().out, json.loads(output.read_text())
    found = {run["method"]: run for run in record["runs"]}
    assert set(found) == {"singular-value", "uniform"} and not record["failed"]
    for run in record["runs"]:
        assert run["spent"] == run["budget"] == run["planted"] == sum(run["planted_ranks"].values())
        assert run["rate"] == rate_of(run["method"]) and run["steps"] == 20
        assert 0 < run["relative_error"] < 1
    assert max(found["uniform"]["ranks"].values()) - min(found["uniform"]["ranks"].values()) == 1
    assert printed.count("| main | mlp | ") == 2 and f"{found['uniform']['relative_error']:.1e}" in printed
    assert f"{found['uniform']['relative_error']:.1e}" in page.read_text() and "planted" in page.read_text()

    monkeypatch.setitem(ra.METHODS, "no<b>score", replace(ra.METHODS["adalora"], name="no<b>score", score="none"))
    assert study.main([*command, "no<b>score"]) == 1
    again = json.loads(output.read_text())
    assert again["runs"] == record["runs"]  # finished runs are not run again, a failed one leaves them alone
    assert [item["method"] for item in again["failed"]] == ["no<b>score"]
    assert "no&lt;b&gt;score" in page.read_text() and "no<b>score" not in page.read_text()


def made_up(method, seed, error, ranks=(2, 1)):
    planted, found = {"0": 3, "<1>": 0}, dict(zip(("0", "<1>"), ranks, strict=True))
    return {
        "protocol": PROTOCOL, "variant": "main", "architecture": "mlp", "method": method, "seed": seed,
        "rate": rate_of(method), "steps": 20, "planted": 3, "budget": 3, "spent": 3, "planted_ranks": planted,
        "ranks": found, **fit(found, planted), "relative_error": error, "cpu_seconds": 1.0,
    }


def test_a_method_is_held_against_the_default_on_the_same_seeds():
    base, default = [1e-3, 1e-2, 1e-5, 1e-4], default_method()
    errors = {
        default: base, "adalora": [40 * e for e in base], "fisher": [e / 3 for e in base],
        "uniform": [e * f for e, f in zip(base, (2, 0.5, 4, 0.25), strict=True)],
    }
    record = {"failed": [], "runs": [made_up(m, s, e) for m, values in errors.items() for s, e in enumerate(values)]}
    record["runs"].append({**made_up("adalora", 0, 1e-9), "protocol": 1})
    record["runs"].append(made_up("adalora", 7, 1.0))  # a seed the default has not run is not compared
    found = {row.method: row for row in rows(record)}
    assert {name: row.verdict for name, row in found.items()} == {
        default: "–", "adalora": "lower", "fisher": "higher", "uniform": "within the interval"
    }
    assert found["adalora"].ratio == pytest.approx((40, 40, 40)) and found["adalora"].seeds == (0, 1, 2, 3, 7)
    assert found["uniform"].ratio[0] == pytest.approx(1) and found["uniform"].ratio[1] < 1 < found["uniform"].ratio[2]
    assert found["fisher"].misplaced == pytest.approx((1 / 3,) * 4) and set(found["fisher"].exact) == {0.0}
    assert "40 [40, 40] | lower" in table(record)

    text = pages.write_page(record)
    parser = HTMLParser(convert_charrefs=True)
    labels, seen = [], []
    parser.handle_starttag = lambda tag, attrs: labels.append(dict(attrs).get("aria-label")) if tag == "svg" else None
    parser.handle_data = seen.append
    parser.feed(text)
    assert len(labels) == 2 and all(labels)  # errors, and ranks of one seed
    assert "<1>" in seen and "<1>" not in text.replace("&lt;1&gt;", "")
    assert pages.headline(rows(record)) == (
        f"{default} gives 0.0% of layers the planted rank where the spectra are equal and the budget is the planted "
        "total. Over 1 problem its error is lower than that of uniform ranks in 0 of 1 and of AdaLoRA in 1 of 1; a "
        "lower error than its own is shown by fisher in 1."
    )
    assert text.count(pages.headline(rows(record))) == 2 and pages.headline([]) == ""  # for readers, and for the index
    for words in ("higher error: adalora", "lower error: fisher", "no difference shown: uniform"):
        assert words in text
    page = Page(text)
    assert page.twice == [] and {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert "http" not in text.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert pages.write_page(record) == text


@pytest.mark.parametrize("name", ["main", "contents", "findings", "table", "provenance"])
def test_a_variant_may_be_called_like_a_part_of_the_page(monkeypatch, name):
    """Ids made from data are in a namespace apart from the page's own."""
    monkeypatch.setitem(VARIANTS, name, {})
    monkeypatch.setitem(pages.WORDS, name, "A variant.")
    text = pages.write_page({"failed": [], "runs": [{**made_up(default_method(), 0, 1e-3), "variant": name}]})
    parsed = Page(text)
    assert parsed.twice == [] and f"variant-{name}" in parsed.sections
    assert {a[1:] for a in parsed.addresses if a.startswith("#")} <= set(parsed.ids)
