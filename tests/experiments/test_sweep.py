"""Sweeps against real Optuna storage: controls, resuming, a kill in the middle, refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from rankalloc.errors import ConfigError, NothingFeasibleError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.sweeps.goals import pareto_front
from rankalloc.experiments.sweeps.space import (
    CONTROL,
    MATCHED,
    SAMPLED,
    START,
    check_space,
    configured,
    first_points,
    search_space,
)
from rankalloc.experiments.sweeps.sweep import SweepSpaceError, run_sweep
from rankalloc.methods import METHODS
from rankalloc.report import write_report
from rankalloc.report.sweeps import trial_rows
from rankalloc.trace import RankTrace, SweepRecord
from tests.support.runs import small_config, small_yaml


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home)


@pytest.fixture(scope="module")
def whole(config, home):
    seen = []
    record = run_sweep(config, home / "whole", on_trial=lambda *args: seen.append(args))
    return record, seen


def outcome(record):
    return [(t.number, t.role, t.params, t.value, t.ranks) for t in record.trials if t.state == "complete"]


def test_the_first_trial_is_uniform_and_the_second_adaptive_at_the_same_point(whole):
    record, seen = whole
    control, start = record.trial(0), record.trial(1)
    assert (control.role, start.role) == (CONTROL, START)
    assert control.params["method"] == "uniform" and start.params["method"] == "auto"
    assert {**control.params, "method": "", "learning_rate": 0} == {**start.params, "method": "", "learning_rate": 0}
    assert control.params["learning_rate"] == pytest.approx(start.params["learning_rate"] / 2)
    # ranks differ in cost, so that one budget buys other numbers of them; it leaves less than the cheapest
    assert abs(control.adapter_params - start.adapter_params) < 32
    assert [(t.number, done, total) for t, done, total in seen] == [(i, i + 1, 4) for i in range(4)]


def test_the_last_trial_is_uniform_with_the_best_adaptive_trials_parameters(whole):
    record, _ = whole
    matched = record.trial(3)
    adaptive = max((t for t in record.trials if t.params["method"] != "uniform"), key=lambda t: t.value)
    one_rank = 32  # the tiny model's smallest layer is 16 x 16
    sizes = [t.adapter_params for t in record.trials if t.params["method"] == "uniform"]
    assert any(adaptive.adapter_params - one_rank < size <= adaptive.adapter_params for size in sizes)
    assert matched.role in (MATCHED, SAMPLED)


def test_a_finished_sweep_stays_as_it_is(whole, config, home):
    before = {path: path.read_bytes() for path in (home / "whole").rglob("*") if path.is_file()}
    trained = []
    for _ in range(2):
        assert run_sweep(config, home / "whole", on_trial=lambda *trial: trained.append(trial)) == whole[0]
    assert {path: path.read_bytes() for path in (home / "whole").rglob("*") if path.is_file()} == before
    assert not trained


def test_the_record_on_disk_is_the_one_returned_and_best_is_copied(whole, home):
    record, _ = whole
    assert SweepRecord.load(home / "whole" / "sweep.json") == record
    assert record.best == max(record.trials, key=lambda t: (t.value, -t.metrics["loss"], -t.number)).number
    best = RankTrace.load(home / "whole" / "best" / "trace.json")
    assert sum(best.final_ranks) == record.trial(record.best).ranks
    assert (home / "whole" / "best" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_pair_was_seen_on_the_report_split_and_uniform_is_no_larger(whole, home):
    record, _ = whole
    pair = record.pair
    assert record.trial(pair.uniform).adapter_params <= record.trial(pair.adaptive).adapter_params
    assert pair.low <= pair.difference <= pair.high and 0 < pair.p_value <= 1
    for number in (pair.adaptive, pair.uniform):
        assert RankTrace.load(home / "whole" / record.trial(number).trace).evaluation("report")
    others = [t for t in record.trials if t.number not in (pair.adaptive, pair.uniform)]
    assert all(RankTrace.load(home / "whole" / t.trace).evaluation("report") is None for t in others)


@pytest.mark.long
def test_an_interrupted_sweep_ends_as_one_that_was_not(whole, config, home):
    run_sweep(config, home / "parts", trials=2)
    resumed = run_sweep(config, home / "parts", trials=3)
    assert len(resumed.trials) == 3
    finished = run_sweep(config, home / "journal", trials=3, storage=f"journal:{home / 'sweep.log'}")
    assert outcome(finished) == outcome(resumed)
    assert outcome(resumed)[:2] == outcome(whole[0])[:2]


@pytest.mark.long
def test_a_killed_sweep_loses_no_trial(home, config):
    """kill -9 in the middle of a trial: the same trial is trained again, and finished ones stay."""
    yaml = small_yaml(home)
    folder = home / "killed"
    command = [sys.executable, "-m", "rankalloc", "sweep", str(yaml), "--output", str(folder), "--trials", "3",
               "--set", "training.steps=60"]
    surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "trials" / "0001" / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    record = run_sweep(config.replaced({"training.steps": 60}), folder, trials=3)
    assert [(t.number, t.state) for t in record.trials] == [(number, "complete") for number in range(3)]
    assert record.trial(1).role == START


@pytest.mark.long
def test_an_interrupt_in_the_matched_control_changes_nothing(config, home, monkeypatch):
    """Ctrl-C in the middle of a trial: its point, its role and its size come back, and so does the outcome."""
    import rankalloc.experiments.sweeps.trial_runs as sweep

    settings = config.replaced({"sweep.trials": 6, "sweep.search.rank": [3, 4]})
    whole = run_sweep(settings, home / "straight")
    real = sweep.train

    def interrupted(run, folder, **kwargs):
        if folder.name == whole_name:
            raise KeyboardInterrupt
        return real(run, folder, **kwargs)

    for number in (3, 5):
        whole_name = f"{number:04d}"
        monkeypatch.setattr(sweep, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(settings, home / f"cut-{number}")
        monkeypatch.setattr(sweep, "train", real)
        resumed = run_sweep(settings, home / f"cut-{number}")

        def shown(record):
            complete = [t for t in record.trials if t.state == "complete"]
            return sorted((t.role, str(t.params), t.value, t.adapter_params) for t in complete)

        assert shown(resumed) == shown(whole)


def test_another_space_or_other_settings_are_refused_and_named(whole, config, home):
    for change, words in (
        ({"sweep.search.rank": [2]}, "search space.rank"),
        ({"training.steps": 7}, "training.steps was 6 and now is 7"),
        ({"data.limit_train": 20}, "data"),
    ):
        with pytest.raises(SweepSpaceError, match=words):
            run_sweep(config.replaced(change), home / "whole")


def test_trials_whose_fractions_were_of_ranks_are_not_mixed_with_others(whole, config, home):
    shutil.copytree(home / "whole", home / "of ranks")
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{home / 'of ranks' / 'study.db'}")
    mark = "what budget.fraction is a share of"
    study.set_user_attr("identity", {k: v for k, v in study.user_attrs["identity"].items() if k != mark})
    with pytest.raises(SweepSpaceError, match=f'begun with other settings: {mark} was "ranks" and now is "parameters"'):
        run_sweep(config, home / "of ranks", trials=5)
    assert len(study.get_trials()) == len(whole[0].trials)


def test_a_sweep_in_which_nothing_works_says_why(config, home):
    hopeless = config.replaced({"training.learning_rate": 1e18, "sweep.search.learning_rate": 1e18,
                                "training.max_grad_norm": 0.0, "sweep.trials": 2})
    with pytest.raises(NothingFeasibleError, match="learning rate"):
        run_sweep(hopeless, home / "hopeless")
    record = SweepRecord.load(home / "hopeless" / "sweep.json")
    assert [t.state for t in record.trials] == ["failed", "failed"] and record.best is None


def test_an_absolute_budget_is_held_in_every_trial(config, home):
    run = config.replaced({"budget.fraction": None, "budget.params": 1000, "sweep.search.rank": 4})
    assert "budget" not in search_space(run)
    record = run_sweep(run, home / "absolute", trials=2)
    assert all(968 < t.adapter_params <= 1000 for t in record.trials)


def test_a_storage_that_cannot_be_opened_hides_its_password(config, home):
    from rankalloc.errors import RankallocError

    with pytest.raises(RankallocError) as caught:
        run_sweep(config, home / "nowhere", storage="postgresql://me:secret@localhost:1/none")
    assert "secret" not in str(caught.value)


def test_first_points_move_into_the_space():
    config = load_config(None, ["adapter.rank=12", "sweep.search.rank=[4, 8]", "sweep.search.alpha={low: 1, high: 4}"])
    (params, role), *_ = first_points(config)
    assert role == CONTROL and params["rank"] == 8 and params["alpha"] == 4.0
    config = config.replaced({"sweep.control_learning_rates": [3e-3, 2e-3]})
    points = [(params["method"], params["learning_rate"]) for params, _ in first_points(config)]
    assert points == [("uniform", 3e-3), ("auto", config.training.learning_rate), ("uniform", 2e-3)]


def test_options_go_to_the_methods_that_know_them():
    config = load_config(None, ["method=adalora", "method_options.beta1=0.9", "method_options.placement=uniform"])
    check_space(config)
    assert configured(config, {"method": "adalora"}).method_options == {"beta1": 0.9, "placement": "uniform"}
    assert configured(config, {"method": "uniform"}).method_options == {}
    anywhere = config.replaced({"method_options": {"shrink": False}})
    check_space(anywhere)
    assert configured(anywhere, {"method": "uniform"}).method_options == {"shrink": False}
    wrong = config.replaced({"method_options": {"beta3": 0.9}})
    with pytest.raises(ConfigError, match="did you mean 'beta"):
        check_space(wrong)


@pytest.mark.parametrize(
    ("placement", "choice"),
    # the choice itself is tested on records (ground/test_trace.py), so one whole sweep is enough
    [
        ("uniform", "uniform"), pytest.param("random", "control", marks=pytest.mark.long),
        pytest.param("shuffled", "control", marks=pytest.mark.long),
    ],
)
def test_forced_placements_are_no_adaptive_trials(placement, choice, tmp_path):
    """Neither the pair nor the matched control may take a placement for the method's own choice."""
    config = small_config(tmp_path, f"method_options.placement={placement}", "sweep.search.method=[auto, uniform]")
    record = run_sweep(config, tmp_path / "out", trials=3)
    assert {t.params["method"]: record.rank_choice(t) for t in record.trials} == {"auto": choice, "uniform": "uniform"}
    for trial in record.trials:
        run = RankTrace.load(tmp_path / "out" / trial.trace)
        assert run.rank_choice == record.rank_choice(trial) and trial.role != MATCHED
    assert record.pair is None and SweepRecord.load(tmp_path / "out" / "sweep.json") == record
    page = write_report(tmp_path / "out", tmp_path / "page.html").read_text()
    assert "cannot say whether adaptive ranks helped" in page and "Adaptive ranks did" not in page


@pytest.mark.parametrize(
    "name", ["non-uniform", *(pytest.param(name, marks=pytest.mark.long) for name in ("my-uniform", "uniform-ish"))]
)
def test_a_method_is_not_uniform_for_its_name(name, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, name, replace(METHODS["auto"], name=name))
    record = run_sweep(small_config(tmp_path, f"method={name}"), tmp_path / "out", trials=3)
    choices = {t.params["method"]: record.rank_choice(t) for t in record.trials}
    assert choices == {name: "adaptive", "uniform": "uniform"}
    assert record.trial(record.pair.adaptive).params["method"] == name
    assert record.trial(record.pair.uniform).params["method"] == "uniform"
    rows = {row.number: row.choice for row in trial_rows(record)}
    assert rows == {t.number: record.rank_choice(t) for t in record.trials}


def test_a_method_without_placements_ignores_the_sweeps(tmp_path, monkeypatch):
    """Its trials are adaptive although the configuration forces those of other methods to be uniform."""
    monkeypatch.setitem(METHODS, "plain", replace(METHODS["auto"], name="plain", options={}))
    config = small_config(
        tmp_path, "method=plain", "method_options.placement=uniform", "sweep.search.method=[plain, auto]"
    )
    record = run_sweep(config, tmp_path / "out", trials=2)
    choices = {t.params["method"]: record.rank_choice(t) for t in record.trials}
    assert choices == {"plain": "adaptive", "auto": "uniform"}


def test_the_front_holds_what_nothing_beats_in_both():
    def trial(number, size, value):
        return optuna.trial.create_trial(value=value, user_attrs={"adapter_params": size})

    trials = [trial(i, *point) for i, point in enumerate([(10, 0.5), (20, 0.6), (15, 0.4), (20, 0.7), (5, 0.1)])]
    for number, item in enumerate(trials):
        item.number = number
    for direction, front in (("maximize", [4, 0, 3]), ("minimize", [4])):
        assert pareto_front(trials, optuna.create_study(direction=direction)) == front
