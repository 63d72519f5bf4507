"""Training on after a cut: the ranks stay, the loss falls, the same seed gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.errors import ConfigError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.judging import TaskEvaluator
from rankalloc.experiments.recovering import RecoveredEvaluator
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare
from rankalloc.storage.tensors import read_header
from tests.support.language import preferences, save_language_model
from tests.support.runs import small_config
from tests.support.task_files import write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the plain kind, its task, and a quarter of its adapter."""
    home = tmp_path_factory.mktemp("recovering")
    config = small_config(home).replaced({"method": "uniform", "budget.fraction": 1.0, "training.steps": 12})
    prepared = prepare(config)
    train(config, home / "run", prepared=prepared, splits=())
    ra.shrink(home / "run", ra.RankBudget(fraction=0.25), home / "small")
    return home, config, prepared


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_it_trains_at_the_ranks_that_are_left(made):
    home, config, prepared = made
    seen = []
    done = ra.recover(home / "small", config, 8, home / "on", prepared=prepared, learning_rate=1e-2,
                      progress=lambda *step: seen.append(step[0]))
    assert seen == list(range(1, 9)) and done.steps == 8 and done.learning_rate == 1e-2
    assert done.after["loss"] < done.before["loss"]
    ranks = {layer.name: layer.rank for layer in ra.check(home / "small").layers}
    found = ra.check(home / "on")
    assert {layer.name: layer.rank for layer in found.layers} == ranks
    assert found.stored == ra.check(home / "small").stored
    again = ra.recover(home / "small", config, 8, home / "again", prepared=prepared, learning_rate=1e-2)
    assert again == done and digest(home / "again") == digest(home / "on") != digest(home / "small")


def test_the_command_shrinks_and_trains_on(made):
    home, config, _ = made
    (home / "task.yaml").write_text(config.to_yaml())
    words = ["shrink", home / "run", "--fraction", "0.25", "-o", home / "both", "--recover", "3"]
    run = CliRunner().invoke
    done = run(app, [str(word) for word in [*words, "--task", home / "task.yaml", "--pad-to", "8"]])
    assert done.exit_code == 0, done.output
    assert "trained on   3 steps" in done.stdout
    record = json.loads((home / "both" / "shrink.json").read_text())
    shapes = read_header(home / "both" / "adapter_model.safetensors").shapes
    held, params = sum(math.prod(s) for key, s in shapes.items() if "lora_" in key), record["params"]["after"]
    assert f"padded: {held:,} numbers in place of {params:,}, {4 * (held - params):,} bytes more" in done.stdout
    assert record["stored"] == {
        "layout": "uniform", "reader": "", "rank": 8, "numbers": held, "padding": held - params, "bytes": 4 * held,
        "padding_bytes": 4 * (held - params),
    }
    told = record["recovered"]
    assert told["learning_rate"] == pytest.approx(config.training.learning_rate / 4) and told["steps"] == 3
    for odd, said in (
        (words, "--recover needs a task"), ([*words[:6], "--learning-rate", "1"], "give --recover STEPS"),
        ([*words[:6], "--task", home / "task.yaml"], "for --max-drop and --recover"),
    ):
        refused = run(app, [str(word) for word in odd])
        assert refused.exit_code == 2 and said in refused.stderr


def test_a_frontiers_cuts_are_trained_on_as_shrink_does_and_the_whole_adapter_is_not(made):
    home, config, prepared = made
    (home / "task.yaml").write_text(config.to_yaml())
    words = ["frontier", home / "run", "--task", home / "task.yaml", "--fractions", "0.25", "-o", home / "curve"]

    def curve(*more):
        done = CliRunner().invoke(app, [str(word) for word in [*words, *more, "--json"]])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    plain, recovered = curve(), curve("--recover", "6", "--learning-rate", "0.02")
    assert (plain["recovered"], recovered["recovered"]) == (0, 6)
    (cut, whole), (settled, same) = plain["points"], recovered["points"]
    assert same["value"] == whole["value"] and settled["params"] == cut["params"]
    params = ra.RankBudget(params=settled["budget"]["params"])
    ra.shrink(home / "run", params, home / "by hand")
    done = ra.recover(home / "by hand", config, 6, home / "by hand", learning_rate=0.02, prepared=prepared)
    assert settled["value"] == pytest.approx(done.after[prepared.metric], abs=1e-6)
    assert done.after["loss"] < done.before["loss"]
    assert all(point["cached"] for point in curve("--recover", "6", "--learning-rate", "0.02")["points"])
    assert not any(point["cached"] for point in curve("--recover", "5", "--learning-rate", "0.02")["points"])
    text = ra.write_report(home / "curve", home / "curve.md", format="md").read_text()
    assert "every cut was trained on for 5 steps" in text
    before = (home / "curve" / "points.json").read_bytes()
    for more, said in (
        (["--learning-rate", "1"], "give --recover STEPS"), (["--recover", "0"], "at least 1"),
        (["--recover", "2", "--learning-rate", "0"], "above 0, got 0.0"),
        (["--recover", "2", "--learning-rate", "nan"], "got nan"),
    ):
        refused = CliRunner().invoke(app, [str(word) for word in [*words, *more]])
        assert refused.exit_code == 2 and said in refused.stderr and "f1" not in refused.stderr
    assert (home / "curve" / "points.json").read_bytes() == before


def test_preferences_cannot_be_recovered(tmp_path):
    pytest.importorskip("trl")
    base = save_language_model(tmp_path / "base")
    config = load_config(None, [
        "task.kind=preference", f"task.train={write_rows(tmp_path / 'p.jsonl', preferences(24))}", f"model={base}",
        "data.max_length=32",
    ])
    adapters = ra.attach(prepare(config).build_model(), rank=2)
    with pytest.raises(ConfigError, match="DPO compares with the base"):
        ra.recover(ra.save(adapters, tmp_path / "a"), config, 2, tmp_path / "b")
    with pytest.raises(ConfigError, match="DPO compares with the base"):
        RecoveredEvaluator(TaskEvaluator(prepare(config)), config, 2, tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_the_area_under_a_curve_is_its_mean_over_factors():
    from rankalloc.posthoc.frontier import Frontier
    from rankalloc.posthoc.points import Point

    def curve(*pairs):
        return Frontier([Point({}, params, 1, 0.0, value) for params, value in pairs], None, True)

    assert curve((100, 0.5), (200, 0.7), (400, 0.9)).aurac == pytest.approx(0.7)
    assert curve((100, 0.5), (400, 0.9)).aurac == pytest.approx(0.7)
    assert curve((100, 0.4), (200, 0.4), (1600, 0.8)).aurac == pytest.approx((0.4 + 3 * 0.6) / 4)
    assert curve((100, 0.5)).aurac is None and curve((100, 0.5), (100, 0.6)).aurac is None
    assert curve((100, 0.4), (200, 0.6)).to_dict()["aurac"] == pytest.approx(0.5)
