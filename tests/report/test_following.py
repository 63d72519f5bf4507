"""What a page says to do next: commands that can be copied and that the command line knows."""

from __future__ import annotations

import shlex

import pytest
import typer

from rankalloc.cli import app
from rankalloc.report.alerts import alerts
from rankalloc.report.compare import Comparison
from rankalloc.report.facts import Subject
from rankalloc.report.following import after_comparison, after_run, after_sweep, steps_of
from rankalloc.report.kinds import Source
from rankalloc.report.sweeps import to_come
from tests.support import report_samples as samples

from .test_compare import side

CONFIG = {"name": "mine", "output": None, "budget": {"fraction": 0.5, "ranks": None}, "seed": 2}


def lines(steps):
    """The commands, each of which must name a command, options and arguments that exist."""
    found = [line for step in steps for line in step.command.splitlines()]
    for line in found:
        name, words = shlex.split(line)[1], shlex.split(line)[2:]
        typer.main.get_command(app).commands[name].make_context(name, words, resilient_parsing=False)
    return found


def test_a_sweep_ends_with_its_adapter_and_an_audit():
    steps = after_sweep(samples.sweep())
    assert lines(steps) == [
        "rankalloc check 'runs/punctuation sweep/best/adapter'",
        "rankalloc audit 'runs/punctuation sweep/best.yaml' --output 'runs/punctuation sweep-audit'",
    ]
    assert "best.yaml. With this page alone, save" in steps[1].lacking


def test_where_uniform_ranks_won_theirs_is_the_adapter_to_use():
    sweep = samples.sweep(0.01, 0.02).model_copy(update={"config": {"output": "out"}})
    assert lines(after_sweep(sweep))[0] == f"rankalloc check out/trials/{sweep.pair.uniform:04d}/adapter"


def test_a_sweep_of_equal_ranks_needs_no_audit():
    sweep = samples.sweep()
    equal = [trial.model_copy(update={"params": {"method": "uniform"}}) for trial in sweep.trials]
    assert len(after_sweep(sweep.model_copy(update={"trials": equal, "pair": None}))) == 1


def test_a_sweep_that_is_not_over_goes_on():
    cut = samples.sweep()  # of 24 trials that the command asks for, each of which was saved when it ended
    cut = cut.model_copy(update={"trials": cut.trials[:7], "pair": None})
    assert lines(after_sweep(cut)) == ["rankalloc sweep punctuation --trials 24"]
    assert after_sweep(cut)[0].advice.endswith("that are left, with the --storage that it had.")
    assert alerts(None, cut)[0].text == "The sweep is not finished: 17 trials still to come."
    there = cut.model_copy(update={"config": {"output": "my out"}, "storage": "study.db"})
    assert lines(after_sweep(there)) == ["rankalloc sweep punctuation --trials 24 --output 'my out'"]
    planned = cut.model_copy(update={"command": None, "config": {"sweep": {"trials": 8}}})
    assert to_come(planned) == 1 and to_come(planned.model_copy(update={"config": {}})) == 0


def test_a_sweep_without_a_best_trial_says_what_to_look_at():
    sweep = samples.sweep().model_copy(update={"best": None, "pair": None})
    beyond = [trial.model_copy(update={"over": ["params"]}) for trial in sweep.trials]
    (step,) = after_sweep(sweep.model_copy(update={"trials": beyond}))
    assert step.command == "" and "beyond a limit" in step.advice
    failed = [trial.model_copy(update={"state": "failed", "value": None}) for trial in sweep.trials[:3]]
    assert lines(after_sweep(sweep.model_copy(update={"trials": failed}))) == [
        "rankalloc train 'runs/punctuation sweep/config.yaml' --output 'runs/punctuation sweep-alone'"
    ]


@pytest.mark.parametrize(
    ("command", "config", "line"),
    [
        ("rankalloc train a.yaml --set seed=1 --output again --resume", {},
         "rankalloc audit a.yaml --set seed=1 --output runs/run-audit"),
        ("rankalloc train a.yaml", CONFIG, "rankalloc audit a.yaml --output runs/mine-audit"),
        (None, CONFIG | {"output": "~/x y"}, "rankalloc audit ~/'x y/config.yaml' --output ~/'x y-audit'"),
        ("rankalloc train --set seed=1 -o runs/one", {},
         "rankalloc audit runs/one/config.yaml --output runs/run-audit"),
        ("rankalloc train --set seed=1", CONFIG, "rankalloc audit runs/mine/config.yaml --output runs/mine-audit"),
        ("python train.py", {}, None), ("rankalloc train --set seed=1", {}, None), ("a 'b", {}, None),
    ],
)  # fmt: skip
def test_a_run_is_audited_by_what_trained_it(command, config, line):
    trace = samples.run(blocks=2, target=72, name="run", command=command, config=config)
    assert [step.command for step in after_run(trace)] == ([] if line is None else [line])


def test_other_runs_have_nothing_to_audit():
    assert after_run(samples.uniform_run()) == []
    assert after_run(samples.run(blocks=2, target=72, finished=False)) == []


def pair(one, other, **changes):
    base = {"quality": {"report": {"f1": 0.5}}, "config": CONFIG, "command": "rankalloc train a.yaml"}
    return Comparison(side("one", *one, **base, choice="adaptive"), side("two", *other, **(base | changes)))


def test_another_size_is_trained_at_the_smaller_one():
    assert lines(after_comparison(pair((4, 4), (2, 2)))) == [
        "rankalloc train a.yaml --set budget.fraction=null --set budget.params=40 --output runs/mine-40"
    ]
    assert lines(after_comparison(pair((2, 2), (4, 4), command=None, config={}))) == []


def test_adaptive_beside_uniform_is_audited_and_two_adaptive_ones_get_another_seed():
    assert lines(after_comparison(pair((4,), (4,), choice="uniform"))) == [
        "rankalloc audit a.yaml --output runs/mine-audit"
    ]
    assert lines(after_comparison(pair((4,), (4,), choice="adaptive"))) == [
        "rankalloc train a.yaml --set seed=3 --output runs/mine-seed-3-1",
        "rankalloc train a.yaml --set seed=3 --output runs/mine-seed-3-2",
        "rankalloc report runs/mine-seed-3-1 --compare runs/mine-seed-3-2",
    ]
    (step,) = after_comparison(pair((4,), (4,), fingerprint="other"))
    assert step.command == "" and step.advice.startswith("Train both on the same data")


def test_what_was_not_measured_is_measured():
    run = samples.run(blocks=2, target=72, config=CONFIG)
    assert lines(after_comparison(pair((4,), (4,), quality={}))) == ["rankalloc frontier ADAPTER --task CONFIG -o OUT"]
    assert lines(after_comparison(pair((4,), (4,), quality={}, trace=run))) == [
        "rankalloc frontier runs/mine --task runs/mine/config.yaml -o runs/mine-frontier"
    ]


def test_beside_an_audit_a_run_is_audited():
    (step,) = after_comparison(pair((4,), (2,), seeds=8))
    assert step.command == "rankalloc audit a.yaml --output runs/mine-audit" and "paired seeds" in step.advice


def test_a_page_of_any_kind_is_asked():
    assert steps_of(Subject.of(Source(None, samples.sweep()))) == after_sweep(samples.sweep())
    assert steps_of(Subject.of(Source(samples.uniform_run()))) == []
