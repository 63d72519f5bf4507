"""What the studies share: grids of rates, workers, results files, tables and the command line."""

from __future__ import annotations

import math
import mmap
import os
import time

import pytest

from rankalloc.errors import DataError
from studies.common import memory
from studies.common.arguments import parse, study_parser
from studies.common.grid import Grid, best_rate, mean_losses
from studies.common.pool import outcomes
from studies.common.results import Results
from studies.common.table import interval, markdown, p_text


def test_a_grid_begins_with_its_first_rates():
    grid = Grid((1.0, 2.0, 4.0))
    assert grid.wanted({}) == [1.0, 2.0, 4.0]
    assert grid.wanted({2.0: 0.1}) == [1.0, 4.0]


@pytest.mark.parametrize(
    "losses, wanted",
    [((0.5, 0.4, 0.6), []), ((0.3, 0.4, 0.6), [0.5]), ((0.5, 0.4, 0.3), [8.0]), ((math.inf,) * 3, [0.5])],
    ids=["inside", "lower edge", "upper edge", "all diverged"],
)
def test_a_grid_grows_while_its_best_rate_is_at_an_edge(losses, wanted):
    assert Grid((1.0, 2.0, 4.0)).wanted(dict(zip((1.0, 2.0, 4.0), losses, strict=True))) == wanted


@pytest.mark.parametrize("grid", [Grid((1.0, 2.0, 4.0)), Grid((1.4, 2.0, 2.8), factor=2**0.5, digits=2)])
@pytest.mark.parametrize("slope", [1, -1])
def test_a_grid_does_not_grow_for_ever(grid, slope):
    losses: dict[float, float] = {}
    while wanted := grid.wanted(losses):
        losses |= {rate: slope * rate for rate in wanted}
    assert len(losses) == 3 + grid.extensions
    assert best_rate(losses) in (min(losses), max(losses))


def test_a_fixed_grid_never_grows():
    assert Grid.fixed([4.0, 1.0]).wanted({}) == [1.0, 4.0]
    assert Grid.fixed([4.0, 1.0]).wanted({1.0: 0.1, 4.0: 0.2}) == []


def test_a_rate_counts_when_all_its_seeds_are_there():
    losses = mean_losses([(2.0, 0.4), (1.0, 0.3), (2.0, 0.6), (4.0, 0.1), (8.0, 0.1), (8.0, math.inf)], seeds=2)
    assert losses == {2.0: 0.5, 8.0: math.inf}
    assert best_rate(losses) == 2.0 and best_rate({8.0: math.inf}) is None and best_rate({1.0: 0.5, 2.0: 0.5}) == 1.0


def halved(cell: int) -> tuple[int, int]:
    return cell // 2, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_finishes_may_ask_for_more_and_nothing_is_run_twice(workers):
    found: dict[int, int] = {}

    def todo():
        return [16, *(half for half in found.values() if half)]  # never leaves out what has been run

    for cell, (half, process) in outcomes(halved, todo, workers):
        assert cell not in found and (process == os.getpid()) == (workers == 1)
        found[cell] = half
    assert found == {16: 8, 8: 4, 4: 2, 2: 1, 1: 0}


def test_nothing_is_begun_after_the_deadline():
    assert list(outcomes(halved, lambda: [1], deadline=time.monotonic())) == []


def test_finished_runs_are_kept_and_read_again(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path)
    assert results.runs == [] and not path.exists()
    results.add({"seed": 1})
    results.add({"seed": 2})
    again = Results(path, threads=3, failed=[])
    assert again.runs == [{"seed": 1}, {"seed": 2}] and again.record["failed"] == []
    assert again.record["environment"]["threads"] == 1
    before = path.read_bytes()
    Results(path).save()
    assert path.read_bytes() == before, "without a new run the environment stays that of the last one"
    path.write_text("{")
    with pytest.raises(DataError, match="--output"):
        Results(path)


def test_tables():
    text = markdown(("a", "b"), [("1", "x|y"), ("2", "")])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x\\|y |", "| 2 |  |"]
    assert interval(-0.01, 0.02) == "-0.0100 to +0.0200"
    assert (p_text(0.0625), p_text(0.0001)) == ("0.062", "< 0.001")


def test_quick_sets_defaults_and_options_go_first(tmp_path, capsys):
    def read(*words):
        parser = study_parser(tmp_path, "A question?\n\nMore.")
        parser.add_argument("--steps", type=int, default=100)
        return parse(parser, words, steps=3, output=tmp_path / "quick.json")

    assert (read().steps, read().output) == (100, tmp_path / "results.json")
    assert (read("--quick").steps, read("--quick").output) == (3, tmp_path / "quick.json")
    assert read("--quick", "--steps", "7").steps == 7
    for wrong in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            read("--workers", wrong)
        assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_the_peak_of_memory_begins_anew():
    if memory.peak_bytes() is None:
        pytest.skip("this kernel does not report resident memory")
    memory.forget_peak()
    # mapped and not allocated: a process may have been told to keep what it frees
    kept = mmap.mmap(-1, 64 * 2**20)
    kept.write(b"x" * len(kept))
    high = memory.peak_bytes()
    assert high >= memory.resident_bytes() >= len(kept)
    kept.close()
    memory.forget_peak()
    assert memory.peak_bytes() < high - 32 * 2**20
