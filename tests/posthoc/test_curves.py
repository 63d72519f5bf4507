"""Curves over budgets: bisection, the cache, the knee; and the three commands as a user types them."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.errors import BudgetError, ConfigError, RankallocError
from rankalloc.files import sha256_of, write_json
from rankalloc.posthoc.frontier import knee_of
from rankalloc.posthoc.points import Point, Points
from tests.support.adapter_folders import dense, error_of, random_layers, write_peft
from tests.support.runs import small_config


@pytest.fixture
def folder(tmp_path):
    return write_peft(tmp_path / "adapter", random_layers(5, count=5, largest=30, top=8))


class Judge:
    """Worth falls with the true error of what was written; counts how often it is asked."""

    def __init__(self, folder, fingerprint="judge"):
        self.whole, self.calls, self.fingerprint = dense(folder), 0, fingerprint

    def __call__(self, folder):
        self.calls += 1
        return 1 - error_of(self.whole, dense(folder))


def test_the_smallest_budget_that_keeps_the_metric(folder, tmp_path):
    judge = Judge(folder)
    result = ra.smallest(folder, judge, 0.2, tmp_path / "small")
    assert 1 - result.error >= 0.8 and judge(tmp_path / "small") >= 0.8 - 1e-5
    total = result.params_before
    step_below = ra.shrink(folder, ra.RankBudget(params=result.asked - total // 64 - 1))
    assert 1 - step_below.error < 0.8
    assert 4 <= len(result.extra["points"]) <= 9
    told = json.loads((tmp_path / "small" / "shrink.json").read_text())
    assert told["max_drop"] == 0.2 and told["points"] == result.extra["points"]


def test_what_was_evaluated_is_not_evaluated_again_unless_it_is_something_else(folder, tmp_path):
    judge = Judge(folder)
    first = ra.smallest(folder, judge, 0.2, tmp_path / "small")
    calls = judge.calls
    again = ra.smallest(folder, judge, 0.2, tmp_path / "small")
    assert judge.calls == calls and again.ranks == first.ranks
    ra.smallest(folder, Judge(folder, "another task"), 0.2, tmp_path / "small")
    other = write_peft(tmp_path / "other", random_layers(6, count=5))
    theirs = Judge(other)
    ra.smallest(other, theirs, 0.2, tmp_path / "small")
    assert theirs.calls > 3
    weighed = Judge(folder)
    layers = ra.FinishedAdapter(folder).layers
    metric = ra.KroneckerMetric({name: torch.rand(layer.d_in) for name, layer in layers.items()})
    ra.smallest(folder, weighed, 0.2, tmp_path / "small", metric=metric)
    assert weighed.calls > 3
    (tmp_path / "small" / "points.json").write_text("{")
    ra.smallest(folder, judge, 0.2, tmp_path / "small")
    assert judge.calls == 2 * calls


def test_a_metric_that_should_be_low(folder, tmp_path):
    judge = Judge(folder)
    result = ra.smallest(folder, lambda f: 2 - judge(f), 0.2, tmp_path / "low", higher_is_better=False)
    assert 1 + result.error <= 1.2 + 1e-9 and result.params < result.params_before
    # nothing may be lost: the whole adapter's ranks stay
    assert ra.smallest(folder, judge, 0.0, tmp_path / "all").error == pytest.approx(0, abs=1e-6)


def test_a_frontier_is_evaluated_drawn_and_kept(folder, tmp_path):
    judge = Judge(folder)
    budgets = [ra.RankBudget(fraction=f) for f in (0.8, 0.2, 0.5)]
    curve = ra.frontier(folder, budgets, judge, tmp_path / "out", name="kept")
    assert [p.params for p in curve.points] == sorted(p.params for p in curve.points) and len(curve.points) == 4
    assert curve.points[-1].value == pytest.approx(1) and judge.calls == 4
    for point in curve.points:
        assert point.value == pytest.approx(1 - point.error, abs=1e-5)
    assert curve.knee in curve.points
    told = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert told["points"][0]["params"] == curve.points[0].params
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 5000
    svg = (tmp_path / "out" / "frontier.svg").read_bytes()
    assert ra.frontier(folder, budgets, judge, tmp_path / "out", name="kept").points[0].cached and judge.calls == 4
    assert (tmp_path / "out" / "frontier.svg").read_bytes() == svg


def test_points_of_fractions_of_ranks_are_not_taken_for_others(folder, tmp_path):
    """Files of earlier days named a point by its fraction alone, which was one of the ranks."""
    points, budget = Points(folder, Judge(folder), tmp_path), ra.RankBudget(fraction=0.5)
    told = {"fraction": 0.5, "min_rank": 0, "max_rank": None, "multiple_of": 1}
    key = sha256_of(points._about, json.dumps(told, sort_keys=True))
    stale = {"budget": told, "params": 1, "ranks": 1, "error": 0.9, "value": 0.1}
    write_json(tmp_path / "points.json", {key: stale})
    found = Points(folder, Judge(folder), tmp_path).at(budget)
    assert not found.cached and found.params > 1
    assert Points(folder, Judge(folder), tmp_path).at(budget).cached


def test_what_is_wrong_with_an_adapter_is_said_of_its_own_folder(folder):
    def judge(path):
        raise RankallocError(f"{path} is of another base")

    with pytest.raises(RankallocError, match=str(folder)):
        ra.frontier(folder, [ra.RankBudget(ranks=4)], judge)


def test_the_knee():
    def points(*pairs):
        return [Point({}, params, 0, 0.0, value) for params, value in pairs]

    curve = points((0, 0.0), (10, 0.8), (50, 0.9), (100, 1.0))
    assert knee_of(curve) is curve[1]
    assert knee_of(points((0, 2.0), (10, 1.2), (50, 1.1), (100, 1.0)), higher_is_better=False).params == 10
    assert knee_of(points((0, 0.0), (50, 0.2), (100, 1.0))) is not curve[1]
    assert knee_of(points((0, 1.0), (100, 1.0))) is None and knee_of(points((100, 1.0))) is None


def test_mistakes_are_told_before_anything_is_evaluated(folder, tmp_path):
    judge = Judge(folder)
    for kind, call in [
        (ConfigError, lambda: ra.frontier(folder, [], judge)),
        (BudgetError, lambda: ra.frontier(folder, [ra.RankBudget(ranks=1), ra.RankBudget(ranks=999)], judge)),
        (ConfigError, lambda: ra.smallest(folder, judge, 1.5, tmp_path / "x")),
        (ConfigError, lambda: ra.smallest(folder, judge, 0.1, tmp_path / "x", steps=1)),
        (ConfigError, lambda: ra.smallest(folder, judge, 0.1, folder)),
        (RankallocError, lambda: ra.smallest(folder, lambda _: float("nan"), 0.1, tmp_path / "x")),
    ]:
        with pytest.raises(kind):
            call()
    assert judge.calls == 0 and not (tmp_path / "x" / "adapter_config.json").exists()


# --- commands --------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc")


def test_shrink_and_compose_from_the_command_line(folder, tmp_path):
    done = run("shrink", folder, "--fraction", "0.5", "-o", tmp_path / "small", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    whole = told["params"]["before"]
    assert whole // 2 - 100 < told["params"]["after"] == told["params"]["stored"] <= whole // 2
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()
    done = run("shrink", folder, "--params", "300", "--layout", "uniform", "--pad-to", "8", "-o", tmp_path / "padded")
    assert done.exit_code == 0 and "padded: " in done.stdout
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["r"] % 8 == 0
    done = run("compose", folder, tmp_path / "small", "--weights", "1,-0.5", "-o", tmp_path / "sum",
               "--missing", "zero", "--ranks", "6")
    assert done.exit_code == 0 and "alignment" in done.stdout, done.output
    assert sum(a.shape[0] for a in ra.FinishedAdapter(tmp_path / "sum").layers and [
        ra.FinishedAdapter(tmp_path / "sum").factors(n).Q for n in ra.FinishedAdapter(tmp_path / "sum").layers]) == 6


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["shrink", "{a}", "-o", "{o}"], 2, "give a budget"),
        (["shrink", "{a}", "--ranks", "2", "--params", "9", "-o", "{o}"], 2, "exactly one of"),
        (["shrink", "{a}", "--ranks", "9999", "-o", "{o}"], 2, "above the"),
        (["shrink", "{a}", "--max-drop", "1%", "-o", "{o}"], 2, "--task CONFIG"),
        (["shrink", "{a}", "--max-drop", "much", "--task", "punctuation", "-o", "{o}"], 2, "0.5% or 0.005"),
        (["shrink", "{a}", "--ranks", "2", "--max-drop", "1%", "-o", "{o}"], 2, "leave out --ranks"),
        (["shrink", "{a}", "--ranks", "2", "--task", "punctuation", "-o", "{o}"], 2, "--max-drop"),
        (["shrink", "{a}", "--ranks", "2", "--calibrate", "punctation", "-o", "{o}"], 2, "did you mean 'punctuation'"),
        (["shrink", "nowhere", "--ranks", "2", "-o", "{o}"], 1, "no adapter folder"),
        (["shrink", "{a}", "--ranks", "2", "-o", "{a}"], 2, "another folder"),
        (["compose", "{a}", "{a}", "--weights", "1;2", "-o", "{o}"], 2, "between commas"),
        (["compose", "{a}", "{a}", "--weights", "1", "-o", "{o}"], 2, "one finite weight"),
        (["frontier", "{a}", "--task", "punctuation", "--fractions", "2", "-o", "{o}"], 2, "between 0 and 1"),
    ],
)
def test_mistakes_end_in_one_sentence(words, code, told, folder, tmp_path):
    done = run(*[word.format(a=folder, o=tmp_path / "o") for word in words])
    assert done.exit_code == code and told in done.stderr and "Traceback" not in done.stderr, done.output
    assert done.stderr.count("error:") == 1 and not (tmp_path / "o").exists()


def test_commands_that_judge_by_a_task(tmp_path):
    config = small_config(tmp_path)
    from transformers import set_seed

    from rankalloc.experiments.tasks import prepare

    set_seed(config.seed)
    adapters = ra.attach(prepare(config).build_model(), rank=4)
    with torch.no_grad():
        for adapter in adapters:
            adapter.lam.normal_()
    ra.save(adapters, tmp_path / "run" / "adapter")
    done = run("frontier", tmp_path / "run", "--task", tmp_path / "small.yaml", "--fractions", "0.5,0.25",
               "--calibrated", "--batches", "2", "-o", tmp_path / "curve")
    assert done.exit_code == 0 and "parameters" in done.stdout, done.output
    assert len(json.loads((tmp_path / "curve" / "frontier.json").read_text())["points"]) == 3
    done = run("shrink", tmp_path / "run", "--max-drop", "50%", "--calibrate", tmp_path / "small.yaml",
               "--batches", "2", "--inputs-only", "-o", tmp_path / "small", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["metric"] == "inputs" and told["points"] and (tmp_path / "small" / "points.json").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("shrink A --ranks 3 --inputs-only", "--inputs-only is an option of calibration; give --calibrate"),
        ("shrink A --ranks 3 --batches 4", "--batches is an option of calibration"),
        ("frontier A --task punctuation --inputs-only", "give --calibrated too"),
        ("frontier A --task punctuation --split train", "unknown split 'train'"),
        ("compose A A --density 0.3", "--density is for --combination ties"),
        ("compose A A --weights 0,0", "all weights are 0"),
    ],
)
def test_options_without_effect_are_told(folder, tmp_path, command, words):
    arguments = [str(folder) if word == "A" else word for word in command.split()]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and words in " ".join(done.output.split()) and not (tmp_path / "out").exists()
