"""The tables in the studies' texts are what their committed results say."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from rankalloc.errors import RankallocError
from studies import default, dylora, planted, shrink, variants
from studies.common.grid import Grid
from studies.dylora.run import missing as dylora_missing
from studies.shrink.analysis import summary, with_error
from studies.variants.run import missing as variants_missing


def folder(study) -> Path:
    return Path(study.__path__[0])


def record(study) -> dict:
    return json.loads((folder(study) / "results.json").read_text(encoding="utf-8"))


def of_steps(study, steps: int) -> list[dict]:
    return [run for run in record(study)["runs"] if run["steps"] == steps]


def variants_table() -> str:
    from studies.variants.analysis import compare, sentences, table
    from studies.variants.arms import ARMS

    rows = compare(of_steps(variants, 96), list(ARMS), 1)
    return table(rows) + "\n\n" + "\n".join(f"- {sentence}" for sentence in sentences(rows))


def dylora_table() -> str:
    from studies.dylora.analysis import compare, complete, table

    return table(compare(complete(of_steps(dylora, 480), 4), 4))


def shrink_table() -> str:
    from studies.shrink.analysis import table

    return table(summary(record(shrink)))


def planted_table() -> str:
    from studies.planted.summary import table

    return table(record(planted))


TABLES = {variants: variants_table, dylora: dylora_table, shrink: shrink_table, planted: planted_table}


@pytest.mark.parametrize("study", TABLES, ids=lambda study: study.__name__)
def test_the_readme_has_the_table_of_the_results(study):
    assert TABLES[study]() in (folder(study) / "README.md").read_text(encoding="utf-8")


def test_the_findings_have_the_comparisons_of_the_results():
    from studies.default.analysis import compare, comparison_table, run_table, sentences

    text = (folder(default) / "findings.md").read_text(encoding="utf-8")
    runs = record(default)["runs"]
    for measure in ("metric", "loss"):
        found = compare(runs, measure, rate_seeds=1)
        shown = [*comparison_table(found).splitlines(), *sentences(found)]
        assert len(shown) > 40 and [line for line in shown if line not in text] == []
    assert run_table(runs, 1) in text


def test_a_finished_study_has_nothing_left_to_run():
    from studies.variants.arms import ARMS

    args = Namespace(arms=list(ARMS), rank=4, steps=96, seeds=5, rate_seeds=1, rates=None)
    assert variants_missing(of_steps(variants, 96), args) == []
    args = Namespace(rank=4, steps=480, seeds=3, rates=None)
    assert dylora_missing(of_steps(dylora, 480), args) == []


def test_an_unfinished_study_runs_rates_first_and_then_the_other_seeds():
    args = Namespace(rank=4, steps=480, seeds=3, rates=None)
    assert {cell.seed for cell in dylora_missing([], args)} == {0}
    runs = [run for run in of_steps(dylora, 480) if run["seed"] == 0]
    assert {cell.seed for cell in dylora_missing(runs, args)} == {1, 2}
    args = Namespace(arms=["LoRA", "auto"], rank=4, steps=96, seeds=5, rate_seeds=1, rates=[4e-3])
    assert {(cell.phase, cell.rate) for cell in variants_missing([], args)} == {("rates", 4e-3)}
    runs = [run for run in of_steps(variants, 96) if run["phase"] == "rates"]
    assert {cell.phase for cell in variants_missing(runs, args)} == {"seeds"}
    assert Grid.fixed(args.rates).wanted({}) == [4e-3]


def test_a_share_of_nothing_is_refused():
    right, nothing = {"counts": [[1, 2, 2]] * 4}, {"counts": [[0, 0, 2]] * 4}
    assert with_error(nothing, right) == (0.0, 0.0, 0.0)
    with pytest.raises(RankallocError, match="--steps"):
        with_error(right, nothing)
