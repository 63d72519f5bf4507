"""The report's data functions and sentences, checked with numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest

from rankalloc.report import curves, exports, grids, sweeps, tables, wording
from rankalloc.report.facts import Facts
from rankalloc.trace import AllocationRecord, EvaluationRecord, ScoreRecord
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples


@pytest.fixture(scope="module")
def trace():
    return samples.run()


def test_effective_rank():
    assert tables.effective_rank([2.0, 2.0, 2.0]) == pytest.approx(3.0)
    assert tables.effective_rank([5.0]) == pytest.approx(1.0)
    p = [0.75, 0.25]
    assert tables.effective_rank([3.0, 1.0]) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert tables.effective_rank([1.0, 0.0]) == pytest.approx(1.0)
    assert tables.effective_rank([]) is None and tables.effective_rank([0.0]) is None


def test_uniform_rank_spends_the_same():
    assert tables.uniform_rank(odd.two_layers()) == pytest.approx(2.0)
    # 3 · 10 + 1 · 30 = 60 parameters over 40 a rank.
    assert tables.uniform_rank(odd.two_layers("params", target=60)) == pytest.approx(1.5)


def test_layer_rows(trace):
    rows = Facts(trace).layers
    assert len(rows) == 36 and sum(r.final_rank for r in rows) == 216
    assert sum(r.params for r in rows) == trace.adapter_params_final
    for row, sigma in zip(rows, trace.singular_values, strict=True):
        assert row.largest_singular_value == max(sigma)
        assert 1 <= row.effective_rank <= row.final_rank
        assert row.uniform_rank == 6
    capped = Facts(odd.two_layers(ranks=(4, 0))).layers
    assert [r.state for r in capped] == ["cap", "zero"]
    assert not any(r.state for r in Facts(samples.uniform_run()).layers)


def test_rank_map(trace):
    grid = Facts(trace).rank_map
    assert grid.roles == list(samples.ROLES) and grid.columns == list("012345") and not grid.outside
    for layer, rank in zip(trace.layers, trace.final_ranks, strict=True):
        assert grid.cells[grid.roles.index(layer.role)][layer.block] == rank
    assert sum(grid.row_means) / 6 == pytest.approx(6.0) and sum(grid.column_means) / 6 == pytest.approx(6.0)


def test_rank_map_of_two_stacks_and_layers_outside():
    trace = odd.mixed()
    grid = Facts(trace).rank_map
    assert grid.columns == ["0", "1", "2", "3", grids.OUTSIDE]
    assert grid.roles == [
        "encoder.block: q",
        "encoder.block: v",
        "decoder.block: q",
        "decoder.block: v",
        "embeddings.word",
        "pooler.dense",
    ]
    assert grid.cells[4] == [None] * 4 + [trace.final_ranks[0]]
    assert sum(c for row in grid.cells for c in row if c is not None) == sum(trace.final_ranks)


def test_same_name_twice_still_gives_every_layer_a_cell():
    layers = odd.two_layers().layers
    twin = odd.two_layers(layers=[layers[0], layers[0]])
    groups = grids.groups(twin.layers)
    assert sorted(i for g in groups for i in g.layers) == [0, 1]
    assert len({g.label for g in groups}) == 2


def test_history_starts_at_the_initial_state(trace):
    past = tables.history(trace)
    assert past.steps[0] == 0 and past.ranks[0] == [12] * 36 and past.reached[0] == 432
    assert past.asked[-1] == past.reached[-1] == 216
    assert [sum(r) for r in past.ranks] == past.reached


def test_score_table():
    scores = ScoreRecord(score="s", step=30, kept=[[4.0, 2.0], [3.0]], dropped=[[1.0], [0.5, 0.0]])
    table = tables.score_table(odd.two_layers(scores=scores))
    assert (table.lowest_kept, table.highest_dropped, table.margin, table.unplotted) == (2.0, 1.0, 2.0, 1)
    assert tables.score_table(odd.two_layers()) is None
    left = tables.score_table(odd.two_layers(scores=scores.model_copy(update={"left": [[9.0], []]})))
    assert left.dropped == [[1.0, 9.0], [0.5, 0.0]] and (left.left, left.highest_dropped) == (1, 1.0)
    nothing = ScoreRecord(score="s", step=30, kept=[[], []], dropped=[[], []])
    assert tables.score_table(odd.two_layers(scores=nothing)) is None


def test_standard_error():
    record = EvaluationRecord(split="report", examples=4, metrics={"loss": 2.5}, example_losses=[1.0, 2.0, 3.0, 4.0])
    row = tables.evaluation_rows(odd.two_layers(evaluations=[record]))[0]
    assert row.mean_loss == 2.5
    assert row.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    alone = record.model_copy(update={"example_losses": [1.0], "examples": 1})
    assert tables.evaluation_rows(odd.two_layers(evaluations=[alone]))[0].standard_error is None


def test_curves_leave_out_the_schedule(trace):
    panels = curves.curves(trace)
    assert [p.title for p in panels] == ["loss", "f1"]
    assert [name for name, _, _ in panels[0].series] == ["loss", "eval_loss"]
    assert panels[1].series[0][1] == [40, 80, 120, 160, 200, 240]


def test_rank_pattern_is_read_by_peft_as_meant():
    trace = odd.two_layers(ranks=(3, 0))
    pattern = exports.rank_pattern(trace)
    assert pattern == {r"^a\.0\.q": 3} and exports.excluded(trace) == ["a.1.q"]
    key = next(iter(pattern))
    # PEFT's own rule for a key.
    assert re.match(rf"(.*\.)?({key})$", "a.0.q") and not re.match(rf"(.*\.)?({key})$", "aX0.q")


def test_table_csv_round_trip_and_formulas():
    rows = Facts(odd.hostile()).layers
    read = list(csv.DictReader(io.StringIO(exports.table_csv(rows))))
    assert tuple(read[0]) == exports.TABLE_COLUMNS and len(read) == len(rows)
    for row, got in zip(rows, read, strict=True):
        assert got["name"] == ("'" + row.name if row.name.startswith("=") else row.name)
        assert int(got["final_rank"]) == row.final_rank


def test_trials():
    record = samples.sweep()
    rows = sweeps.trial_rows(record)
    assert [r.number for r in rows if r.choice == "uniform"] == [0, 5, 11, 17]
    assert [r.number for r in rows if r.best] == [record.best]
    assert rows[7].state == "failed" and 7 not in [r.number for r in sweeps.front_points(rows)]
    assert {r.number for r in rows if r.front} == set(record.front)
    assert "method" not in rows[3].params and "lr\u00a0=\u00a0" in rows[3].params
    assert [name for name, _ in sweeps.importances(record)] == ["lr", "rank", "alpha", "method"]


def test_slices():
    cuts = {c.name: c for c in sweeps.slices(samples.sweep())}
    assert set(cuts) == {"method", "rank", "lr", "alpha"}
    assert cuts["lr"].log and cuts["lr"].numeric and not cuts["alpha"].log and not cuts["method"].numeric
    assert all(len(c.points) == 23 for c in cuts.values())


def test_uniform_is_read_from_the_role_when_no_method_is_recorded():
    record = samples.sweep()
    trial = record.trials[0].model_copy(update={"params": {}})
    for role, choice in (("uniform control", "uniform"), ("matched control", "uniform"), ("sampled", "adaptive")):
        assert record.rank_choice(trial.model_copy(update={"role": role})) == choice
    assert record.rank_choice(trial.model_copy(update={"params": {"method": "adalora"}})) == "adaptive"


def test_control_is_the_best_uniform_trial_without_a_pair():
    record = samples.sweep().model_copy(update={"pair": None})
    uniform = [t for t in record.trials if t.params.get("method") == "uniform"]
    assert sweeps.control_of(record) == min(uniform, key=lambda t: t.value)
    most = record.model_copy(update={"direction": "maximize"})
    assert sweeps.control_of(most) == max(uniform, key=lambda t: t.value)


def test_wording():
    assert wording.count(41472) == "41,472" and wording.count(None) == "–"
    assert wording.number(-0.00041234) == "−0.0004123" and wording.number(123456.7) == "123,457"
    assert wording.rank(6.0) == "6" and wording.rank(6.42) == "6.4"
    assert (
        wording.duration(0.6123) == "0.612 s"
        and wording.duration(1900) == "31 min 40 s"
        and wording.duration(7260) == "2 h 1 min"
    )
    assert wording.size(663552) == "648.0 KiB" and wording.percent(0.4977) == "49.8 %"
    assert wording.some(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
    assert wording.printable("a\nb\x07\u202e") == "a b\ufffd\ufffd"
    assert wording.moment("2025-03-01T12:00:00+00:00") == "2025-03-01 12:00 UTC" and wording.moment("noon") == "noon"


def test_a_rule_that_begins_below_the_peak_is_drawn_from_where_it_began(trace):
    ranks = [1] * len(trace.layers)
    began = AllocationRecord(step=0, asked=sum(ranks), reached=sum(ranks), ranks=ranks)
    grown = trace.model_copy(update={"allocations": [began, *trace.allocations]})
    course = tables.history(grown)
    assert course.steps[:2] == [0, trace.allocations[0].step] and course.ranks[0] == ranks
    assert {row.initial_rank for row in Facts(grown).layers} == {1}
    assert tables.history(trace).asked[0] == trace.budget.initial
