"""studies/frontier: what is run, and what is made of it."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

import rankalloc as ra
from studies.frontier.analysis import areas_of, report, rows_of
from studies.frontier.annealing import Passing
from studies.frontier.arms import AUTO, CUT, DYLORA, HERE, RANKS, RECOVERED, UNIFORM, Cell, served_by
from studies.frontier.figure import draw
from studies.frontier.run import wanted
from tests.support.training import train_mlp


def made_up(arm, rank, rate, seed, phase, metric):
    kinds = {CUT: metric} | ({RECOVERED: metric + 0.001} if arm == AUTO and phase == "seeds" else {})
    return {**Cell("pos", phase, arm, rank, rate, 160, seed)._asdict(), "seconds": 1.0} | {
        kind: {str(at): {"loss": 1 - value - 0.01 * place, "metric": value + 0.01 * place}
               for place, at in enumerate(RANKS) if at in served_by(arm, rank)}
        for kind, value in kinds.items()
    }  # fmt: skip


def finished():
    runs = []
    for arm, rank, metric in [*((UNIFORM, rank, 0.6) for rank in RANKS), (AUTO, 32, 0.5995), (DYLORA, 32, 0.58)]:
        runs += [made_up(arm, rank, rate, 50, "rates", metric - rate) for rate in (0.01, 0.02)]
        runs += [made_up(arm, rank, 0.01, seed, "seeds", metric + 1e-4 * (seed % 7)) for seed in (100, 101, 102)]
    return runs


def test_lines_are_set_beside_uniform_lora_at_every_budget(tmp_path):
    runs = finished()
    rows = {(row.line, row.rank): row for row in rows_of(runs)}
    assert {rank for line, rank in rows if line == f"{AUTO}, {RECOVERED}"} == set(RANKS)
    assert all(rows[AUTO, rank].level and rows[AUTO, rank].difference == pytest.approx(-0.0005) for rank in RANKS)
    assert not any(rows[DYLORA, rank].no_worse for rank in RANKS)
    areas = {area.line: area for area in areas_of(runs)}
    assert areas[UNIFORM].area == pytest.approx(0.6 + 0.01 * 2.5, abs=1e-3)  # a line over the logarithm of the rank
    assert areas[UNIFORM].steps == 160 * 3 * len(RANKS) and areas[AUTO].steps == 160 * 3
    assert areas[f"{AUTO}, {RECOVERED}"].steps == 160 * 3 + 16 * (len(RANKS) - 1)
    text, drawn, _ = report(runs)
    assert "6 of 6, 6 level" in text and "0 of 6, 0 level" in text
    draw(drawn, tmp_path / "frontier")
    assert (tmp_path / "frontier.png").is_file()


def test_seeds_wait_for_the_rate_of_their_arm():
    args = Namespace(tasks=["pos"], arms=[UNIFORM, AUTO], rates=[0.01, 0.02], steps=160, seeds=2)
    first = list(wanted([], args))
    assert {cell.phase for cell in first} == {"rates"} and len(first) == 2 * (len(RANKS) + 1)
    runs = [run for run in finished() if run["arm"] == AUTO and run["phase"] == "rates"]
    assert {cell.arm for cell in wanted(runs, args) if cell.phase == "seeds"} == {AUTO}


def test_a_run_that_loses_ranks_leaves_an_adapter_of_every_budget(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    adapters = ra.attach(model, rank=4)
    per_rank = sum(adapter.params_per_rank for adapter in adapters)
    budget = ra.RankBudget(params=per_rank, every=2, freeze=0.1, shape="linear")
    controller = ra.RankController(adapters, budget, 20, "singular-value", placement="uniform")
    ranking = Namespace(controller=controller)
    passing = Passing(adapters, ranking, {rank: rank * per_rank for rank in (1, 2, 4)}, tmp_path)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    train_mlp(model, controller, optimizer, 20, before_observe=lambda step: passing.on_optimizer_step(
        None, Namespace(global_step=step - 1), None))
    passing.keep(list(passing.left))
    sizes = {rank: sum(layer.rank for layer in ra.check(tmp_path / str(rank)).layers) for rank in (1, 2, 4)}
    assert sizes[4] == 8 and 4 <= sizes[2] < 8 and sizes[1] >= 2


def test_the_findings_are_those_of_the_results():
    runs = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["runs"]
    text, rows, areas = report(runs)
    assert len(rows) == 6 * len({row.line for row in rows}) and all(row.seeds == 6 for row in rows)
    assert (HERE / "findings.md").read_text(encoding="utf-8") == f"{text}\n"
    kept = json.loads((HERE / "rows.json").read_text(encoding="utf-8"))
    assert kept == {"budgets": [row._asdict() for row in rows], "areas": [area._asdict() for area in areas]}
