"""studies/doors: every arm ends at the same size, and arms are compared on seeds that chose no rate."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from studies import doors
from studies.common.grid import Grid
from studies.common.paired import judged, t_interval
from studies.common.part import Cell
from studies.doors import llama
from studies.doors.analysis import ONE_RATE, at, loss_table, paired, planted_table, report
from studies.doors.arms import ARMS, ATTACH, CHOOSING, DOORS, DRIVEN, EQUAL, PEAK
from studies.doors.parts import PARTS
from studies.doors.run import attempt, main


@pytest.mark.long
def test_every_arm_of_the_language_ends_at_the_size_of_plain_lora(monkeypatch):
    monkeypatch.setattr(llama, "PRETRAINING_STEPS", 2)
    llama._pretrained.cache_clear()
    runs = {arm: attempt(Cell("language", "seeds", "language", arm, 1e-3, 12, 100)) for arm in ARMS}
    llama._pretrained.cache_clear()
    final = {arm: run["final_params"] for arm, run in runs.items()}
    assert final[PEAK] == 4 * final[EQUAL]
    assert all(runs[arm]["peak_params"] >= final[PEAK] for arm in CHOOSING)
    for arm in CHOOSING:
        trained_lam = sum(runs[arm]["ranks"].values()) if arm == ATTACH else 0
        # within the last rank that no longer fits
        assert 0 <= final[EQUAL] - (final[arm] - trained_lam) < 192
    assert all(math.isfinite(run["loss"]) for run in runs.values())


def test_every_door_spends_the_planted_budget():
    # enough steps for one allocation
    runs = [attempt(Cell("planted", "rates", "half mlp", arm, 1e-2, 40, 0)) for arm in DOORS]
    assert {run["spent"] for run in runs} == {runs[0]["planted"] // 2}
    assert all(0 < run["relative_error"] < 1 for run in runs)
    assert len({run["relative_error"] for run in runs}) == 3, "each door has a start of its own"


def made_up(phase: str, arm: str, rate: float, seed: int, loss: float = math.inf, **other) -> dict:
    cell = Cell("language", phase, "language", arm, rate, 240, seed)
    found = {"loss": loss, "peak_params": 8, "final_params": 2, "cpu_seconds": 1.0}
    return {**cell._asdict(), **(found if math.isfinite(loss) else {"message": "diverged"}), **other}


PART = replace(PARTS["language"], grid=Grid((1.0, 2.0, 4.0)), rate_seeds=1, seeds=3, arms=(ATTACH, DRIVEN))
RATES = [made_up("rates", arm, rate, 0, abs(rate - 2.0)) for arm in PART.arms for rate in (1.0, 2.0, 4.0)]
ATTACHED = [made_up("seeds", ATTACH, 2.0, seed, loss) for seed, loss in ((100, 0.5), (101, 0.4), (102, 0.9))]


def test_rates_are_run_first_and_the_seeds_wait_for_them():
    first = PART.missing([])
    assert {cell.phase for cell in first} == {"rates"} and len(first) == 6
    at_the_edge = [made_up("rates", ATTACH, rate, 0, rate) for rate in (1.0, 2.0, 4.0)]
    assert PART.missing(at_the_edge)[0].rate == 0.5
    then = PART.missing(RATES)
    assert [cell.seed for cell in then] == [100, 100, 101, 101, 102, 102] and {cell.rate for cell in then} == {2.0}
    assert [cell.arm for cell in PART.missing(RATES + ATTACHED)] == [DRIVEN] * 3
    assert len(PART.missing([{**run, "steps": 7} for run in RATES])) == 6, "other steps are other runs"


def test_differences_are_paired_and_have_a_t_interval():
    driven = [made_up("seeds", DRIVEN, 2.0, seed, loss) for seed, loss in ((102, 0.8), (100, 0.45), (101, 0.41))]
    other_rate = made_up("seeds", DRIVEN, 4.0, 100, 9.0)
    runs = [*RATES, *ATTACHED, *driven, other_rate]
    mean, low, high, each = paired(PART, runs, "language", DRIVEN)
    assert each == pytest.approx([-0.05, 0.01, -0.1]) and mean == pytest.approx(statistics.fmean(each))
    expected = stats.ttest_1samp(each, 0.0).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert t_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert paired(PART, runs, "language", ATTACH) is None, "the reference itself"
    assert f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" in loss_table(PART, runs)


def test_a_run_that_diverged_is_seen_and_not_left_out_of_a_mean():
    driven = [made_up("seeds", DRIVEN, 2.0, seed, loss) for seed, loss in ((100, 0.4), (101, math.inf), (102, 0.4))]
    runs = [*RATES, *ATTACHED, *driven]
    assert "message" in judged(PART, runs, "language", DRIVEN)[101]
    assert paired(PART, runs, "language", DRIVEN) is None
    assert "| 2 (1 diverged) |" in loss_table(PART, runs)


def test_errors_are_compared_as_factors():
    place = "main mlp"
    part = replace(
        PARTS["planted"], arms=(ATTACH, DRIVEN), places=(place,), grid=Grid.fixed([1.0]), rate_seeds=1
    )
    runs = [
        {**Cell("planted", phase, place, arm, 1.0, part.steps, seed)._asdict(), "relative_error": error * factor,
         "exact": 1.0, "cpu_seconds": 1.0}
        for phase, seed, error in (("rates", 0, 1e-3), ("seeds", 0, 1e-6), ("seeds", 1, 1e-2), ("seeds", 2, 1e-4))
        for arm, factor in ((ATTACH, 1.0), (DRIVEN, 2.0))
    ]  # fmt: skip
    assert paired(part, runs, place, DRIVEN)[:3] == pytest.approx([math.log10(2.0)] * 3)
    assert "| 1.0e-04 | 1.0e-02 | – |" in planted_table(part, runs)
    assert "| 2.0e-04 | 2.0e-02 | 2.00 (2.00 to 2.00) | 2.00 2.00 2.00 |" in planted_table(part, runs)


@pytest.mark.parametrize("name", PARTS)
def test_the_readme_has_the_tables_of_finished_runs(name):
    folder, part = Path(doors.__path__[0]), PARTS[name]
    runs = part.own(json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"])
    assert part.missing(runs) == []
    tables, text = report(part, runs).split("\n\n"), (folder / "README.md").read_text(encoding="utf-8")
    assert len(tables) > 1 and [table for table in tables if table not in text] == []
    if name == "planted":
        assert at(ONE_RATE, part).missing(runs) == []


def test_the_command_knows_its_parts_and_reports_without_running(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tables"])
    assert "there is no part 'tables'" in capsys.readouterr().err
    main(["language", "--report", "--output", str(tmp_path / "results.json")])
    assert "| rate | attach |" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
