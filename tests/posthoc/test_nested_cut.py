"""A DyLoRA run from its file: each rank is the adapter it was trained to be, and one file gives the whole curve."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.errors import BudgetError, ConfigError
from rankalloc.storage.plain_lora import read
from tests.support.adapter_folders import dense, error_of
from tests.support.models import logits_of, make_mlp
from tests.support.runs import small_config
from tests.support.training import train_mlp

RANK = 5


def trained(method="dylora", budget=None, steps=60, init="lora", scale="lora"):
    model = make_mlp()
    adapters = ra.attach(model, rank=RANK, alpha=7, init=init, scale=scale)
    controller = ra.RankController(adapters, budget or ra.RankBudget(fraction=1.0), steps, method)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=2e-2), steps)
    controller.finish()
    return model, adapters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model, adapters = trained()
    return model, adapters, ra.save(adapters, tmp_path_factory.mktemp("dylora"))


class Judge:
    """Mean square error on the task of the training run; lower is better."""

    fingerprint = "train_mlp"

    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        model = make_mlp()
        ra.load(model, folder)
        x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return F.mse_loss(model(x), x[:, :8].sin() + x[:, 8:].cos()).item()


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize(
    ("budget", "scale"), [(None, "lora"), (ra.RankBudget(ranks=9), "lora"), (ra.RankBudget(ranks=9), "rslora")]
)
def test_a_cut_of_the_file_is_the_adapter_at_that_rank(run, budget, scale, layout, tmp_path):
    """Whatever ranks the freeze left, and however it was scaled and written."""
    model, adapters = run[:2] if budget is None else trained(budget=budget, scale=scale)
    folder = ra.save(adapters, tmp_path / "whole", layout)
    sizes = [a.rank for a in adapters]
    assert budget is None or len(set(sizes)) > 1
    for rank in range(1, RANK + 1):
        spent = sum(min(rank, size) for size in sizes)
        result = ra.shrink(folder, ra.RankBudget(ranks=spent), tmp_path / str(rank), cut="nested", layout=layout)
        assert list(result.ranks.values()) == [min(rank, size) for size in sizes] and result.spent == spent
        again = make_mlp()
        ra.load(again, tmp_path / str(rank))
        with ra.at_rank(adapters, rank):
            torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-6)
        assert error_of(dense(folder), dense(tmp_path / str(rank))) == pytest.approx(result.error, abs=1e-5)
        # and what was cut can be cut on
        if rank > 1:
            ra.shrink(tmp_path / str(rank), ra.RankBudget(ranks=3), tmp_path / "again", cut="nested")
            for name, value in dense(tmp_path / "again").items():
                torch.testing.assert_close(value, dense(tmp_path / "1")[name], rtol=1e-5, atol=1e-6)


def test_the_whole_curve_of_one_run(run, tmp_path):
    judge = Judge()
    curve = ra.frontier(run[2], None, judge, tmp_path, higher_is_better=False, name="mse")
    assert [point.ranks for point in curve.points] == [3, 6, 9, 12, 15] and judge.calls == RANK
    for rank, point in enumerate(curve.points, 1):
        with ra.at_rank(run[1], rank):
            assert point.value == pytest.approx(judge(ra.save(run[1], tmp_path / "at")), rel=1e-5)
            assert point.params == run[1].num_params()
    assert curve.points[0].value > curve.points[-1].value and curve.points[-1].error == 0
    told = json.loads((tmp_path / "frontier.json").read_text())
    assert told["cut"] == "nested" and told["points"][1]["budget"] == {"nested_rank": 2}
    assert (tmp_path / "frontier.svg").stat().st_size > 5000
    calls = judge.calls
    again = ra.frontier(run[2], None, judge, tmp_path, higher_is_better=False)
    assert judge.calls == calls and all(point.cached for point in again.points)
    assert [p.value for p in again.points] == [p.value for p in curve.points]
    # the other cut of the same file: nearer to the whole, another point, and the whole is not evaluated again
    svd = ra.frontier(run[2], [ra.RankBudget(ranks=3)], judge, tmp_path, higher_is_better=False, cut="svd")
    assert svd.cut == "svd" and svd.points[0].error < curve.points[0].error
    assert judge.calls == calls + 1 and svd.points[-1].cached


def test_budgets_become_the_highest_rank_they_have_room_for(run):
    judge = Judge()
    budgets = [ra.RankBudget(ranks=7), ra.RankBudget(ranks=6), ra.RankBudget(fraction=1.0), ra.RankBudget(fraction=0.9)]
    curve = ra.frontier(run[2], budgets, judge, higher_is_better=False)
    assert [point.ranks for point in curve.points] == [6, 12, 15] and judge.calls == 3
    two = ra.shrink(run[2], ra.RankBudget(fraction=1.0, multiple_of=2), cut="nested")
    assert set(two.ranks.values()) == {4}
    params = ra.shrink(run[2], ra.RankBudget(params=2 * 120 - 1), cut="nested")
    assert params.params == 120 and params.spent <= params.asked == 239
    assert set(ra.shrink(run[2], ra.RankBudget(ranks=15, max_rank=5), cut="nested").ranks.values()) == {5}


def test_only_files_that_still_are_say_so(run, tmp_path):
    def says(folder):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return "rankalloc_nested" in file.metadata()

    assert says(run[2])
    ra.shrink(run[2], ra.RankBudget(ranks=6), tmp_path / "svd")
    ra.compose([run[2]], out=tmp_path / "sum")
    plain = ra.save(trained("uniform", ra.RankBudget(ranks=6), 2, "svd")[1], tmp_path / "plain")
    assert not any(says(tmp_path / name) for name in ("svd", "sum", "plain"))
    assert "rankalloc_nested" not in read(run[2]).metadata
    for folder in (tmp_path / "svd", plain):
        with pytest.raises(ConfigError, match="not known to be nested.*method='dylora'.*cut='svd'"):
            ra.frontier(folder, None, Judge(), cut="nested")
    assert ra.frontier(plain, [ra.RankBudget(ranks=3)], Judge()).cut == "svd"


def test_peft_does_not_mind(run):
    from peft import PeftModel

    model = PeftModel.from_pretrained(make_mlp(), run[2])
    torch.testing.assert_close(logits_of(model), logits_of(run[0]), rtol=1e-5, atol=1e-6)


def test_mistakes_are_told_before_anything_is_evaluated(run, tmp_path):
    judge, folder = Judge(), run[2]
    metric = ra.KroneckerMetric({name: torch.rand(x.d_in) for name, x in ra.FinishedAdapter(folder).layers.items()})
    for error, told, call in [
        (ConfigError, "at least one budget", lambda: ra.frontier(folder, [], judge)),
        (ConfigError, "at least one budget", lambda: ra.frontier(folder, None, judge, cut="svd")),
        (ConfigError, "did you mean 'nested'", lambda: ra.frontier(folder, None, judge, cut="nestd")),
        (ConfigError, "nothing to calibrate", lambda: ra.frontier(folder, None, judge, metric=metric)),
        (ConfigError, "nothing to calibrate",
         lambda: ra.shrink(folder, ra.RankBudget(ranks=3), cut="nested", metric=metric)),
        (BudgetError, "room for no nested cut: rank 1 in every layer costs 3",
         lambda: ra.frontier(folder, [ra.RankBudget(ranks=6), ra.RankBudget(ranks=2)], judge)),
        (BudgetError, "above the 15", lambda: ra.shrink(folder, ra.RankBudget(ranks=16), tmp_path / "x", cut="nested")),
        (ConfigError, "another folder", lambda: ra.shrink(folder, ra.RankBudget(ranks=3), folder, cut="nested")),
    ]:
        with pytest.raises(error, match=told):
            call()
    assert judge.calls == 0 and not (tmp_path / "x").exists()


def test_from_the_command_line(tmp_path):
    def call(*words):
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc")

    from rankalloc.experiments.runner import train

    loaded = small_config(tmp_path, "method=dylora", "budget.fraction=1.0", "training.steps=3")
    train(loaded, tmp_path / "run", splits=("tune",))
    config = tmp_path / "small.yaml"
    done = call("frontier", tmp_path / "run", "--task", config, "-o", tmp_path / "curve", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["cut"] == "nested" and len(told["points"]) == 4
    done = call("shrink", tmp_path / "run", "--fraction", "0.5", "--cut", "nested", "-o", tmp_path / "small", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["cut"] == "nested", done.output
    assert ra.FinishedAdapter(tmp_path / "small").config["r"] == 2
    for words, said in [
        (["frontier", tmp_path / "run", "--task", config, "--calibrated"], "nothing to calibrate"),
        (["shrink", tmp_path / "run", "--max-drop", "1%", "--task", config, "--cut", "nested"], "give a budget"),
    ]:
        done = call(*words, "-o", tmp_path / "no")
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr, done.output
        assert not (tmp_path / "no").exists()
