"""What a sweep looks for: limits, the front, seeds, early stopping, finalists on fresh seeds, and what ends it."""

from __future__ import annotations

import csv
import io
import statistics

import optuna
import pytest
import torch
import yaml

import rankalloc as ra
import rankalloc.experiments.sweeps.trial_runs as trials_module
from rankalloc.errors import ConfigError, NothingFeasibleError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.judging import TaskEvaluator
from rankalloc.experiments.runner import train
from rankalloc.experiments.sweeps.pruning import PRUNERS, WithinMethod
from rankalloc.experiments.sweeps.samplers import SAMPLERS
from rankalloc.experiments.sweeps.space import EARLIER, first_points, search_space, suggest, values_at
from rankalloc.experiments.sweeps.sweep import SweepSpaceError, run_sweep
from rankalloc.experiments.sweeps.worker import RepeatedFailureError
from rankalloc.experiments.tasks import prepare
from rankalloc.trace import RankTrace
from tests.support.runs import small_config

LONG = pytest.mark.long  # further members of a kind that the suite has already


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("goals"), "training.steps=4", "sweep.trials=5")


@pytest.fixture(scope="module")
def tested(config, tmp_path_factory):
    """A sweep whose two best trials were trained again, with two seeds each."""
    folder = tmp_path_factory.mktemp("tested")
    settings = config.replaced({"sweep.finalists": 2, "sweep.fresh_seeds": 2, "sweep.limits.params": 10**6})
    return settings, folder, run_sweep(settings, folder)


def test_the_winner_is_the_finalist_with_the_best_mean_over_fresh_seeds(tested):
    settings, folder, record = tested
    again = [trial for trial in record.trials if trial.fresh]
    best_first = sorted(record.trials, key=lambda trial: (-trial.value, trial.metrics["loss"]))
    assert {t.number for t in again} == {t.number for t in best_first[:2]} and all(len(t.fresh) == 2 for t in again)
    assert statistics.fmean(record.trial(record.best).fresh) == max(statistics.fmean(t.fresh) for t in again)
    for trial in again:
        seeds = [RankTrace.load(folder / "trials" / f"{trial.number:04d}-seed-{k}" / "trace.json").seed for k in (1, 2)]
        assert seeds == [1, 2]
    assert len(record.trials) == 5 and record.steps == (5 + 4) * 4


def test_its_files_say_so_and_best_yaml_trains_it_again(tested, tmp_path):
    settings, folder, record = tested
    rows = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert [int(row["best"]) for row in rows].index(1) == record.best and len(rows) == 5
    assert float(rows[record.best]["fresh_mean"]) == statistics.fmean(record.trial(record.best).fresh)
    again = train(load_config(folder / "best.yaml"), tmp_path / "again")
    best = RankTrace.load(folder / "best" / "trace.json")
    assert again.final_ranks == best.final_ranks and again.evaluation("tune").metrics == best.evaluation("tune").metrics


def test_a_finished_sweep_trains_no_seed_twice(tested):
    settings, folder, record = tested
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("trace.json")}
    assert run_sweep(settings, folder) == record
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("trace.json")} == before


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=LONG)])
def test_the_best_trial_keeps_the_limits(config, sampler, tmp_path):
    every = config.replaced({"sweep.sampler": sampler, "sweep.search.budget": [0.3, 1.0], "sweep.trials": 6})
    limited = every.replaced({"sweep.limits.params": 1000})
    record = run_sweep(limited, tmp_path)
    over = [trial for trial in record.trials if trial.over]
    assert over and all(trial.adapter_params > 1000 and trial.over == ["params"] for trial in over)
    assert record.trial(record.best).adapter_params <= 1000
    pair = record.pair
    assert pair is None or record.trial(pair.adaptive).adapter_params <= 1000
    with pytest.raises(SweepSpaceError, match=r"sweep.limits.params was 1000 and now is null"):
        run_sweep(every, tmp_path)


@pytest.mark.parametrize("limits", [
    {"params": 1}, pytest.param({"bytes": 4}, marks=LONG), pytest.param({"step_seconds": 1e-9}, marks=LONG),
])  # fmt: skip
def test_limits_that_nothing_keeps_are_named(config, limits, tmp_path):
    with pytest.raises(NothingFeasibleError, match=f"within sweep.limits .{next(iter(limits))}.: 2 exceed them"):
        run_sweep(config.replaced({"sweep.limits": limits}), tmp_path, trials=2)


@pytest.mark.parametrize(("sampler", "against"), [
    ("tpe", "params"), pytest.param("nsga2", "bytes", marks=LONG), pytest.param("gp", "params", marks=LONG),
])  # fmt: skip
def test_the_front_of_quality_against_size(config, sampler, against, tmp_path):
    settings = config.replaced({"sweep.goal": "pareto", "sweep.sampler": sampler, "sweep.against": against})
    record = run_sweep(settings, tmp_path)
    study = optuna.load_study(study_name=config.name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    size = {"params": "adapter_params", "bytes": "stored_bytes"}[against]
    theirs = {(t.values[0], t.values[1]) for t in study.best_trials}
    assert {(t.value, getattr(t, size)) for t in record.trials if t.number in record.front} == theirs
    assert not any(trial.fresh for trial in record.trials) and record.best in record.front


@pytest.mark.long
def test_a_trials_value_is_the_mean_over_its_seeds(config, tmp_path):
    record = run_sweep(config.replaced({"sweep.seeds": 2}), tmp_path, trials=2)
    for trial in record.trials:
        assert len(trial.values) == 2 and trial.value == statistics.fmean(trial.values) and trial.steps == 8


@LONG
@pytest.mark.parametrize("pruner", PRUNERS)
def test_poor_trials_are_stopped_and_those_for_comparison_never(config, pruner, tmp_path):
    settings = config.replaced({
        "training.steps": 20, "sweep.pruner": pruner, "sweep.trials": 9, "sweep.sampler": "random",
        "method": "auto", "sweep.search.method": "auto", "task.tune_share": 0.4,
        "sweep.search.learning_rate": {"low": 1e-7, "high": 1.0, "log": True},
    })  # fmt: skip
    record = run_sweep(settings, tmp_path)
    pruned = [trial for trial in record.trials if trial.state == "pruned"]
    assert pruned and all(trial.role == "sampled" and trial.steps in (5, 10) for trial in pruned)
    assert all("stopped after step" in trial.message for trial in pruned)
    assert record.trial(record.best).state == "complete" and record.steps < 9 * 20
    assert not list(tmp_path.glob("trials/*/checkpoint-*"))


def test_a_pruner_sees_trials_of_one_method_only():
    seen = []

    class Asked(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            seen.append([one.number for one in study.get_trials(deepcopy=False)])
            return True

    study = optuna.create_study(pruner=WithinMethod(Asked()))
    for number in range(9):
        study.enqueue_trial({"method": "auto" if number % 2 else "uniform"})
        trial = study.ask()
        trial.suggest_categorical("method", ["auto", "uniform"])
        trial.report(1.0, 5)
        assert trial.should_prune() == (number >= 6)  # the fourth of its method is the first with three to compare
    assert seen[-1] == [0, 2, 4, 6, 8] and seen[-2] == [1, 3, 5, 7]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    *(pytest.param(error, marks=LONG) for error in (
        MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    )),
])  # fmt: skip
def test_a_trial_that_does_not_fit_is_infeasible_and_the_sweep_goes_on(config, error, monkeypatch, tmp_path):
    real = trials_module.train

    def short_of_memory(run, folder, **kwargs):
        if folder.name == "0001":
            raise error
        return real(run, folder, **kwargs)

    monkeypatch.setattr(trials_module, "train", short_of_memory)
    record = run_sweep(config, tmp_path, trials=3)
    failed = record.trial(1)
    assert failed.state == "pruned" and failed.message.startswith("out of memory") and failed.over == ["memory"]
    assert [trial.state for trial in record.trials].count("complete") == 2


@pytest.mark.long
def test_three_equal_failures_in_a_row_end_it_and_three_different_ones_do_not(config, monkeypatch, tmp_path):
    said = ["no space", "no space", "no space"]

    def failing(run, folder, **kwargs):
        raise RankallocError(said[int(folder.name) % 3])

    monkeypatch.setattr(trials_module, "train", failing)
    with pytest.raises(RepeatedFailureError, match=r"3 trials in a row failed alike: no space; mend that"):
        run_sweep(config, tmp_path / "alike")
    said = ["one", "two", "three"]
    with pytest.raises(NothingFeasibleError, match="none of 5 trials completed: one; three; two"):
        run_sweep(config, tmp_path / "unlike")


MORE = """
training.weight_decay: {low: 0.0, high: 0.1}
adapter.dropout: [0.0, 0.1]
adapter.target_modules: {choices: [all-linear, [query, value]]}
budget.warmup: {choices: [0.1, 0.3], when: auto}
training.warmup_steps: {low: 0, high: 2}
"""


@pytest.mark.long
def test_any_key_of_a_run_is_searched_some_for_one_method_only(config, tmp_path):
    settings = config.replaced({
        "sweep.search.more": yaml.safe_load(MORE), "sweep.search.alpha_ratio": {"low": 1, "high": 8, "log": True},
    })  # fmt: skip
    record = run_sweep(settings, tmp_path)
    for trial in record.trials:
        assert ("budget.warmup" in trial.params) == (trial.params["method"] == "auto")
        given = RankTrace.load(tmp_path / trial.trace).config
        assert given["adapter"]["alpha"] == pytest.approx(trial.params["alpha_ratio"] * trial.params["rank"])
        assert given["adapter"]["target_modules"] in ("all-linear", ["query", "value"])
        assert isinstance(given["training"]["warmup_steps"], int) and "alpha" not in trial.params
        values = values_at(settings, trial.params)
        assert given["training"]["weight_decay"] == values["training.weight_decay"]
        if trial.role in ("uniform control", "start"):  # at the file's own values
            assert given["adapter"]["dropout"] == given["training"]["warmup_steps"] == 0
            assert given["adapter"]["target_modules"] == "all-linear"
            assert given["budget"]["warmup"] == settings.budget.warmup


@pytest.mark.parametrize(("more", "said"), [
    ({"adapter.rank": [1]}, "adapter.rank: it has a dimension of its own"),
    ({"task": ["x"]}, "cannot search task"),
    ({"adapter.dropout": [0.1, 2]}, "adapter.dropout: should be below 1"),
    ({"training.nix": [1]}, "unknown key 'nix'|no key training.nix"),
    ({"adapter.dropout": {"choices": [0.1], "when": "eva"}}, "is for method 'eva', and the sweep searches"),
])  # fmt: skip
def test_a_dimension_that_no_run_has_is_refused_before_anything(config, more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_sweep(config.replaced({"sweep.search.more": more}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_best_points_of_an_earlier_sweep_are_tried_first(tested, config):
    _, folder, record = tested
    points = first_points(config.replaced({"sweep.start_from": [str(folder)], "sweep.search.rank": [2]}))
    earlier = [params for params, role in points if role == EARLIER]
    best = max(record.trials, key=lambda trial: (trial.value, -trial.number))
    assert {**best.params, "rank": 2} in [params for params, _ in points] and len(earlier) <= 3
    ratios = first_points(config.replaced({
        "sweep.start_from": [str(folder)], "sweep.search.alpha_ratio": {"low": 0.01, "high": 1000},
    }))  # fmt: skip
    wanted = best.params["alpha"] / best.params["rank"]
    assert wanted in [params["alpha_ratio"] for params, _ in ratios]
    for wrong in (folder / "nowhere", folder / "trials.csv"):
        with pytest.raises(ConfigError, match="start_from"):
            first_points(config.replaced({"sweep.start_from": [str(wrong)]}))


def test_uniform_lora_is_tried_at_each_budget_that_is_a_choice(config):
    points = first_points(config.replaced({"sweep.search.budget": [0.25, 0.5, 1.0]}))
    assert {params["budget"] for params, role in points if role == "uniform control"} == {0.25, 0.5, 1.0}


@pytest.mark.long
def test_one_run_answers_a_column_of_budgets_and_direct_runs_check_it(config, tmp_path):
    settings = config.replaced({"sweep.search.budget": [0.25, 0.5, 1.0], "sweep.share_runs": True, "sweep.trials": 3})
    record = run_sweep(settings, tmp_path)
    assert {trial.params["budget"] for trial in record.trials} == {1.0}
    assert [one.budget for one in record.column] == [0.25, 0.5, 1.0]
    judge = TaskEvaluator(prepare(settings), "tune", settings.training.eval_batch_size)
    for one in record.column:
        folder = tmp_path / "trials" / f"{one.trial:04d}"
        whole = RankTrace.load(folder / "trace.json")
        if one.budget == 1.0:
            assert one.shared == one.direct == whole.evaluation("tune").metrics["accuracy"]
            continue
        allowed = int(one.budget * sum((layer.d_in + layer.d_out) * whole.rank for layer in whole.layers))
        shrunk = ra.shrink(folder / "adapter", ra.RankBudget(params=allowed), tmp_path / f"cut-{one.budget}")
        assert judge(tmp_path / f"cut-{one.budget}") == one.shared and shrunk.params <= allowed
        direct = RankTrace.load(tmp_path / "trials" / f"{one.trial:04d}-at-{one.budget:g}" / "trace.json")
        assert direct.evaluation("tune").metrics["accuracy"] == one.direct
        assert direct.adapter_params_final == one.adapter_params <= allowed
    assert run_sweep(settings, tmp_path) == record and record.steps == 3 * 4 + 2 * 4


def test_alpha_is_given_in_one_way():
    for given in ("8", "[8, 16]", "{low: 1, high: 2}"):
        with pytest.raises(ConfigError, match="alpha or alpha_ratio"):
            load_config(None, [f"sweep.search.alpha={given}", "sweep.search.alpha_ratio=2"])


@pytest.mark.parametrize(("given", "said"), [
    ({"sweep.search.budget": 0.5}, "list shares"), ({"sweep.search.budget": [0.5, 0.5]}, "has one: 0.5"),
    ({"sweep.goal": "pareto"}, "goal pareto has a budget in every trial"),
    ({"budget": {"params": 500}}, "needs several budgets"),
])  # fmt: skip
def test_runs_are_shared_only_among_several_budgets(config, given, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_sweep(config.replaced({"sweep.share_runs": True, **given}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_again(config, sampler):
    settings = config.replaced({"sweep.sampler": sampler})
    space, draws = search_space(settings), []
    for _ in range(2):
        study = optuna.create_study(sampler=SAMPLERS[sampler](settings, 3))
        trial = study.ask()
        draws.append(suggest(trial, space))
    assert draws[0] == draws[1]
