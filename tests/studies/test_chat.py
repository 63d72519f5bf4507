"""studies/chat: every arm ends at the size of its budget, and equal ranks are tuned as the others are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from studies import chat
from studies.chat import arms
from studies.chat.analysis import advantage, report
from studies.chat.arms import ATTACH, DRIVEN, EVERY_OTHER, LOWER, PATTERNS, UNIFORM, UPPER
from studies.chat.parts import PARTS
from studies.chat.run import main
from studies.common.part import Cell


def tiny() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    ))  # fmt: skip


def cell(place: str, arm: str, rate: float = 4e-3, seed: int = 0, phase: str = "rates") -> Cell:
    return Cell(place, phase, place, arm, rate, PARTS[place].steps, seed)


@pytest.mark.parametrize(
    "place, arm", [("two", UNIFORM), ("half", EVERY_OTHER), ("half", UPPER), ("half", LOWER)]
)
def test_equal_ranks_spend_the_budget_exactly(place, arm):
    model = tiny()
    budget = arms.budget_of(cell(place, arm), model).params
    trained, callbacks = arms.adapted(cell(place, arm), model)
    assert callbacks == []
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == budget


@pytest.mark.parametrize("place", PARTS)
@pytest.mark.parametrize("arm", [ATTACH, DRIVEN])
def test_chosen_ranks_begin_above_the_budget(place, arm):
    trained, (callback,) = arms.adapted(cell(place, arm), tiny())
    peak = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert peak > callback.budget.params * 3.5 and arms.MEAN_RANK[place] > 0


def made_up(place: str, arm: str, rate: float, seed: int, phase: str, loss: float) -> dict:
    found = {"loss": loss, "accuracy": 0.5, "peak_params": 8, "final_params": 2, "cpu_seconds": 1.0}
    return {**cell(place, arm, rate, seed, phase)._asdict(), **found}


def test_of_several_patterns_the_best_tuned_one_alone_is_judged():
    part = PARTS["half"]
    best = {EVERY_OTHER: 0.5, UPPER: 0.4, LOWER: 0.6, DRIVEN: 0.3, ATTACH: 0.35}
    rates = [
        made_up("half", arm, rate, 0, "rates", best[arm] + abs(math.log2(rate / 8e-3)))
        for arm in part.arms for rate in (4e-3, 8e-3, 1.6e-2)
    ]
    assert part.uniform(rates[:-1]) == UPPER and part.uniform([]) is None
    then = part.missing(rates)
    assert {run.arm for run in then} == {UPPER, DRIVEN, ATTACH} and len(then) == 15
    seeds = [made_up("half", run.arm, run.rate, run.seed, "seeds", best[run.arm] + run.seed / 1e3) for run in then]
    assert part.missing(rates + seeds) == []
    assert advantage(part, rates + seeds, ATTACH)[0] == pytest.approx(-0.05)
    assert advantage(part, rates + seeds, UPPER) is None and "-0.0500" in report(part, rates + seeds)


@pytest.mark.parametrize("name", PARTS)
def test_the_readme_has_the_tables_of_finished_runs(name):
    folder, part = Path(chat.__path__[0]), PARTS[name]
    runs = part.own(json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"])
    assert part.missing(runs) == []
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert [table for table in report(part, runs).split("\n\n") if table not in text] == []
    assert set(PATTERNS) >= {part.uniform(runs)} and replace(part, seeds=6).missing(runs)


def test_the_command_reports_without_running(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["three"])
    assert "there is no part 'three'" in capsys.readouterr().err
    main(["half", "--report", "--output", str(tmp_path / "results.json")])
    assert "| rate |" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
