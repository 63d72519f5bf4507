"""The examples in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import rankalloc as ra
from rankalloc.methods.allocators import ALLOCATORS
from rankalloc.methods.planners import PLANNERS
from rankalloc.methods.scores import SCORES
from tests.support.models import make_mlp
from tests.support.training import train_mlp

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")


def test_a_score_from_outside_takes_fifteen_lines_and_works():
    score, rule, planner = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len([line for line in score.splitlines() if line.strip()]) <= 15
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    names = {"adapters": adapters}
    try:
        exec(compile(score, "extending.md", "exec"), names)
        train_mlp(model, names["controller"], torch.optim.AdamW(adapters.parameters(), lr=1e-2), 40)
        trace = names["controller"].finish()
        assert sum(adapters.ranks().values()) == 6 and trace.scores.score == "squared"
        exec(compile(rule, "extending.md", "exec"), {})
        from rankalloc.methods.allocators import Demand

        kept = ALLOCATORS["deep-first"]([torch.zeros(3).numpy()] * 3, Demand(4, (1,) * 3, (0,) * 3, (3,) * 3))
        assert [int(mask.sum()) for mask in kept] == [0, 1, 3]
        names["plain_model"] = make_mlp()
        exec(compile(planner, "extending.md", "exec"), names)
        assert sum(names["plan"].values()) == 6 and names["plan"]["2"] >= names["plan"]["4"]
    finally:
        SCORES.pop("squared", None)
        ra.METHODS.pop("squared", None)
        ALLOCATORS.pop("deep-first", None)
        ra.METHODS.pop("weight-norm", None)
        PLANNERS.pop("weight-norm", None)


def test_an_adapter_keeps_out_of_anothers_way(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "composing.md").read_text(encoding="utf-8"), re.S)
    exec(compile(example, "composing.md", "exec"), {})
    angles = [int(angle) for angle in re.findall(r"\d+(?=[,\]])", capsys.readouterr().out)]
    assert len(angles) > 4 and min(angles) > 70


def test_the_average_that_follows_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<!-- tested:.*?-->\n```python\n(.*?)```", (DOCS / "processes.md").read_text("utf-8"), re.S)
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    names = {
        "model": model, "adapters": adapters, "optimizer": torch.optim.AdamW(adapters.parameters(), lr=1e-2),
        "loss": lambda model: model(torch.randn(4, 16)).square().mean(),
    }
    exec(compile(code, "processes.md", "exec"), names)
    assert sum(ra.load(make_mlp(), "ema").ranks().values()) == 6
