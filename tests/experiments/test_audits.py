"""Audits on a tiny model: which arms there are, that all have one size, and that one that was stopped ends alike."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from rankalloc.audit_record import AuditRecord, TriedRate
from rankalloc.budget import LayerShape
from rankalloc.cli import app
from rankalloc.errors import ConfigError, NotWrittenError
from rankalloc.experiments.audit_arms import ARM_NAMES, BY_HAND
from rankalloc.experiments.audits.arms import arms_of
from rankalloc.experiments.audits.audit import audit, conduct, prepared_audit, remaining, work
from rankalloc.experiments.audits.cells import Cell, Result, complete, folder_before, wanted
from rankalloc.experiments.audits.concluding import audit_record, stability
from rankalloc.experiments.audits.hand_patterns import PATTERNS, pattern
from rankalloc.experiments.audits.progress import most_runs, progress_of, running_arms
from rankalloc.experiments.audits.study import changed_plan, join_audit, located, open_audit, results_of
from rankalloc.experiments.audits.tuning import at_edge, next_rates
from rankalloc.experiments.audits.wording import advice_of, no_answer_of, sentence_of
from rankalloc.experiments.config import load_config
from rankalloc.experiments.preemption import Preempted, Stop
from rankalloc.experiments.run_folder import AuditFolder
from rankalloc.experiments.sweeps.slots import queue_again, slot_of
from rankalloc.experiments.sweeps.study import SweepSpaceError, join_study
from rankalloc.experiments.sweeps.worker import RepeatedFailureError
from tests.support.runs import small_config

ARMS = "audit.arms=[twin, cont, peft-adalora]"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("audits")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home, ARMS, "audit.trials=3", "audit.looks=[2]", "audit.margin=0.001")


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def record(config, home, lines):
    return audit(config, home / "whole", on_run=lambda *told: lines.append(told))


def test_every_arm_is_tuned_alike_and_compared_on_seeds_that_tuning_did_not_see(record, config):
    assert [arm.name for arm in record.arms] == ["auto", "uniform", "twin", "cont", "peft-adalora"]
    for arm in record.arms:
        assert arm.skipped is None and len(arm.tried) == 3
        assert len({one.rate for one in arm.tried}) == 3 and arm.rate in {one.rate for one in arm.tried}
        assert len(arm.runs) == record.seeds
        assert config.seed not in {run.seed for run in arm.runs}
    assert len({tuple(run.seed for run in arm.runs) for arm in record.arms}) == 1
    assert {one.arm for one in record.comparisons} == {arm.name for arm in record.arms[1:]}


def test_every_arm_has_the_size_of_the_budget(record):
    cheapest = min(layer.d_in + layer.d_out for layer in record.layers)
    for arm in record.arms[:-1]:  # PEFT's counts layers, not parameters
        for run in arm.runs:
            assert record.params - cheapest < run.params <= record.params, arm.name
            assert run.params == sum((one.d_in + one.d_out) * rank for one, rank in
                                     zip(record.layers, run.ranks, strict=True))
    assert record.arm("cont").runs[0].peak_params > record.params
    assert record.arm("uniform").runs[0].peak_params == record.arm("uniform").runs[0].params


def test_all_arms_take_as_many_steps(record, config):
    assert {run.steps for arm in record.arms for run in arm.runs} == {config.training.steps}


def test_differences_are_those_of_the_runs(record):
    method = record.arms[0].values(record.seeds)
    for one in record.comparisons:
        other = record.arm(one.arm).values(record.seeds)
        assert one.differences == pytest.approx([a - b for a, b in zip(method, other, strict=True)])
        assert one.low is None or one.low <= one.mean <= one.high


def test_the_answer_is_in_words_and_the_record_reads_back(record, home, lines):
    assert record.finished and "tuned uniform LoRA" in record.sentence and record.advice
    assert AuditRecord.load(home / "whole" / "audit.json") == record
    assert len(lines) == len({line for line, _, _ in lines}) == lines[-1][1]
    assert record.steps == 6 * len(lines)


def test_the_same_command_again_makes_no_run(record, config, home):
    again = []
    assert audit(config, home / "whole", on_run=lambda *told: again.append(told)).comparisons == record.comparisons
    assert not again


def test_a_folder_has_the_seed_that_it_holds(record, home):
    for run in record.arms[0].runs:
        assert run.folder == f"runs/auto/seed-{run.seed}"
        assert load_config(home / "whole" / run.folder / "config.yaml").seed == run.seed


def copied(home, name):
    """The finished audit in another folder."""
    shutil.copytree(home / "whole", home / name)
    return home / name


def dry(folder, *more):
    done = CliRunner().invoke(app, ["audit", str(folder / "config.yaml"), "-o", str(folder), "--dry-run", *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_dry_run_says_how_far_the_audit_in_its_folder_is(record, home):
    folder = copied(home, "looked-at")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = dry(folder)
    assert "25 runs of 6 steps, 150 in all" in said and "25 to 25" not in said
    assert "25 runs made, and none is left: it is over" in said and "3 of 3 rates tried, 2 seeds run" in said
    longer = json.loads(dry(folder, "--set", "audit.looks=[2, 3]", "--json"))
    assert longer["so_far"]["done"] == 25 and longer["so_far"]["left"][1] == 5
    assert longer["so_far"]["seconds_left"][1] > 0
    assert any("no longer bounded by 5 %" in alert for alert in longer["alerts"])
    (folder / "audit.json").write_text("{")
    assert "is no JSON (line 1)" in (said := dry(folder)) and "is written anew from audit.db" in said
    assert "would be refused" not in said
    before[folder / "audit.json"] = b"{"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("spoil, more, said", [
    ([], ["--set", "training.steps=7"], "training.steps was 6 and now is 7"),
    ([], ["--set", "name=other"], "holds the audit 'small', and this one is 'other'"),
    (["audit.db"], ["--set", "training.steps=7"], "audit.json is of an audit with other settings: training.steps was"),
    (["audit.db", "audit.json"], [], "audit.json is no JSON (line 1)"),
])  # fmt: skip
def test_another_audit_in_the_folder_is_refused_and_nothing_is_written(record, home, tmp_path, spoil, more, said):
    folder = tmp_path / "taken"
    shutil.copytree(home / "whole", folder)
    for name in spoil:
        (folder / name).unlink() if name == "audit.db" else (folder / name).write_text("{")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = dry(folder, *more)
    assert said in told and "would be refused" in told
    done = CliRunner().invoke(app, ["audit", str(folder / "config.yaml"), "-o", str(folder), *more])
    assert done.exit_code in (1, 2) and done.stderr.count("\n") == 1 and said in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("ending", [pytest.param(KeyboardInterrupt, marks=pytest.mark.long), Preempted])
def test_an_audit_that_goes_on_does_not_keep_its_answer_when_it_is_stopped(record, home, tmp_path, monkeypatch, ending):
    folder = tmp_path / "longer"
    shutil.copytree(home / "whole", folder)
    (folder / "report.html").write_text("an earlier answer")

    def stopped(*_, **__):
        raise ending

    monkeypatch.setattr("rankalloc.experiments.audits.audit.attrs_of", stopped)
    done = CliRunner().invoke(app, ["audit", str(folder / "config.yaml"), "-o", str(folder), "--set",
                                    "audit.looks=[2, 3]"])
    assert done.exit_code in (130, 143) and "to continue: rankalloc audit" in done.stderr
    now = AuditRecord.load(folder / "audit.json")
    assert not now.finished and now.sentence is None and now.command_next is None
    assert now.alerts[0].startswith("the audit is not finished: 25 of at most 30 runs are made; go on with: rankalloc")
    page = (folder / "report.html").read_text()
    assert "an earlier answer" not in page and "the audit is not finished" in page and record.sentence not in page


@pytest.mark.long
def test_an_audit_begun_with_folders_by_place_goes_on_in_them(record, config, home):
    """Until then a folder had the place of its seed in its name: what was queued so is trained and recorded there."""
    found = prepared_audit(config, home / "older", None, None)
    slots = open_audit(found, None)
    cells = wanted(found.arms, {}, found.setting, 2)
    slots.ensure({cell.slot: ({}, {"rate": rate}) for cell, rate in cells.items()})  # as it was queued then
    old, stop = [], Stop()

    def on_trial(trial, done):
        old.append(trial)
        stop.ask()

    with pytest.raises(Preempted):
        work(found, slots, stop, on_trial)
    assert (home / "older" / "runs" / "auto" / folder_before(Cell(0, "tune", 0)) / "trace.json").is_file()
    assert remaining(found, slots) and "folder" not in old[0].user_attrs


def test_a_run_whose_machine_went_keeps_its_rate_and_its_folder(config, home):
    found = prepared_audit(config, home / "lost", None, None)
    slots = open_audit(found, None)
    remaining(found, slots)
    taken = slots.take(10**6)
    slots.study.tell(taken.number, state=TrialState.FAIL)
    queue_again(slots.study, taken, {})  # as storages do that keep signs of life
    again = slots.all()[slot_of(taken)]
    assert again.number != taken.number
    assert {name: again.user_attrs[name] for name in ("rate", "folder")} == {
        name: taken.user_attrs[name] for name in ("rate", "folder")
    }


def test_a_place_that_takes_no_files_is_no_failure_of_an_arm(config, home):
    found = prepared_audit(config, home / "full", None, None)
    (found.folder.run("auto", "tune-0").config / "in the way").mkdir(parents=True)
    with pytest.raises(NotWrittenError, match="could not write"):
        conduct(found, None)
    assert results_of(open_audit(found, None)) == {}


@pytest.mark.parametrize("place, phase, name", [(0, "seed", "auto"), (1, "seed", "uniform"), (1, "tune", "uniform")])
def test_without_the_method_or_uniform_lora_there_is_no_answer_and_the_reason_is_said(config, home, place, phase, name):
    found, results = prepared_audit(config, home / "lost", None, None), {}
    for _ in range(3):
        for cell, rate in wanted(found.arms, results, found.setting, 2).items():
            lost = (cell.arm, cell.phase) == (place, phase) and (cell.index == 1 or phase == "tune")
            message = "training diverged: f1 is nan" if lost else None
            results.setdefault(cell, Result({"rate": rate, "value": 0.1 * cell.index, "seed": cell.index}, message))
    record = audit_record(found, results, finished=True)
    why = "training failed at every rate" if phase == "tune" else "it failed on seed 1"
    assert no_answer_of(record) == f"{name} cannot be compared: {why}: training diverged: f1 is nan"
    assert record.sentence == f"This audit has no answer: {no_answer_of(record)}" and record.command_next is None


def test_a_short_run_is_an_alert_of_the_audit_and_of_its_dry_run(home):
    hasty = small_config(home, "budget.every=10")
    found = prepared_audit(hasty, home / "hasty", None, None)
    assert any("all ranks are cut at once" in alert for alert in audit_record(found, {}).alerts)
    done = CliRunner().invoke(app, ["audit", str(home / "small.yaml"), "--set", "budget.every=10", "--dry-run", "-o",
                                    str(home / "hasty")])
    assert "all ranks are cut at once" in done.stdout and not (home / "hasty").exists()
    assert not prepared_audit(small_config(home), home / "hasty", None, None).alerts


def test_rates_are_shown_as_they_are(config, home):
    found = prepared_audit(config.replaced({"training.learning_rate": 0.00125}), home / "x", None, None)
    results = {Cell(0, "tune", n): Result({"rate": rate, "value": value}) for n, (rate, value) in
               enumerate([(0.00125, 0.5), (0.000625, 0.1), (0.0025, 0.1)])}
    results |= {Cell(1, "tune", n): Result({"rate": rate, "value": value}) for n, (rate, value) in
                enumerate([(0.00125, 0.5), (0.000625, 0.1), (0.0003125, 0.7)])}
    assert any("uniform (0.0003125)" in alert for alert in audit_record(found, results).alerts)
    assert progress_of(found, results).done == 6


@pytest.mark.long
def test_an_audit_that_was_stopped_ends_as_one_that_was_not(record, config, home):
    found = prepared_audit(config, home / "parts", None, None)
    slots, stop, ended = open_audit(found, None), Stop(), []

    def on_trial(trial, done):
        ended.append(trial)
        if len(ended) == 4:
            stop.ask()

    with pytest.raises(Preempted):
        work(found, slots, stop, on_trial)
    assert len(ended) == 4
    worker, theirs = join_audit(located(None, found), None)  # another machine
    assert theirs.audit == config.audit and len(worker.all()) == len(slots.all())
    resumed = conduct(prepared_audit(config, home / "parts", None, None), None)
    assert [one.differences for one in resumed.comparisons] == [one.differences for one in record.comparisons]


@pytest.mark.long
def test_two_workers_of_which_one_is_killed_and_one_preempted_make_the_same_audit(home):
    folder, yaml = home / "two", home / "small.yaml"
    config = small_config(home, "audit.arms=[twin]", "audit.trials=3", "audit.looks=[2]", "training.steps=60")
    alone = audit(config, home / "alone")
    settings = ["audit.arms=[twin]", "audit.trials=3", "audit.looks=[2]", "training.steps=60"]
    command = [sys.executable, "-m", "rankalloc", "audit", str(yaml), "--jobs", "2", "-o", str(folder)]
    command += [word for one in settings for word in ("--set", one)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    for number in (signal.SIGKILL, signal.SIGTERM):
        deadline = time.monotonic() + 120
        while True:  # a run is being trained
            assert process.poll() is None and time.monotonic() < deadline, "the audit ended before it could be killed"
            busy = [path for path in folder.glob("runs/*/*/config.yaml") if not (path.parent / "trace.json").exists()]
            if busy:
                break
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(found[0]), number)
        time.sleep(1)
    assert process.wait(300) == 0
    record = AuditRecord.load(folder / "audit.json")
    assert [one.differences for one in record.comparisons] == [one.differences for one in alone.comparisons]
    assert [run.ranks for run in record.arms[0].runs] == [run.ranks for run in alone.arms[0].runs]


def test_other_settings_are_refused_and_more_seeds_are_not(record, config, home):
    with pytest.raises(SweepSpaceError, match="training.steps was 6 and now is 7"):
        audit(config.replaced({"training.steps": 7}), home / "whole")
    more = prepared_audit(config.replaced({"audit.looks": [2, 3, 4]}), home / "whole", None, None)
    assert most_runs(more) == 5 * (3 + 4)
    shutil.copytree(home / "whole", home / "more")
    slots = open_audit(dataclasses.replace(more, folder=AuditFolder(home / "more")), None)
    began = changed_plan(slots)  # after an answer: told, since the chance of a wrong claim is another one then
    assert began["looks"] == [2]
    said = audit_record(more, results_of(slots), changed=began).alerts
    assert "no longer bounded by 5 %" in said[0] and not any("5 %" in alert for alert in record.alerts)


def test_the_command_that_follows_works_as_it_is(record, home, monkeypatch):
    monkeypatch.chdir(home)
    words = shlex.split(record.command_next)
    assert words[:2] == ["rankalloc", "train"]
    done = CliRunner().invoke(app, [*words[1:], "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "holds" not in done.output


def test_a_worker_takes_an_audit_by_its_folder(record, home):
    slots, theirs = join_audit(str(home / "whole"), None)
    assert theirs.name == record.name and len(slots.all()) == len(slots.study.trials)
    with pytest.raises(ConfigError, match="no audit at .*give an audit's folder"):
        join_audit(str(home / "model"), None)


def test_a_sweep_does_not_take_up_an_audit(record, config, home):
    with pytest.raises(ConfigError, match="is of rankalloc audit"):
        join_study(located(None, prepared_audit(config, home / "whole", None, None)), None)


@pytest.mark.parametrize("changes, said", [
    (["method=uniform"], "places no ranks of its own"),
    (["method_options.placement=random"], "places no ranks of its own"),
    (["method=manual", "method_options.rank_pattern={query: 1}"], "compares methods that choose ranks"),
    (["method=bottleneck"], "compares methods that choose ranks"),
])  # fmt: skip
def test_what_cannot_be_audited_is_refused(home, changes, said):
    with pytest.raises(ConfigError, match=said):
        prepared_audit(small_config(home, *changes), home / "refused", None, None)


def test_mistakes_in_the_section_are_told(home):
    with pytest.raises(ConfigError, match="unknown arm 'twins'.*'twin'"):
        small_config(home, "audit.arms=[twins]")
    with pytest.raises(ConfigError, match="rising numbers of seeds"):
        small_config(home, "audit.looks=[6, 4]")
    with pytest.raises(ConfigError, match="audit.margin"):
        small_config(home, "audit.margin=0")


def test_arms_that_do_not_apply_say_why(home):
    """Above one rank a layer nothing is written by hand; below, PEFT has no mean rank; at the peak nothing is cut."""
    above = {arm.name: arm for arm in prepared_audit(small_config(home), home / "x", None, None).arms}
    assert set(above) == {"auto", *ARM_NAMES}
    assert all("one rank a layer or more" in above[name].skipped for name in BY_HAND)
    tight = small_config(home, "budget.fraction=0.1")
    below = {arm.name: arm for arm in prepared_audit(tight, home / "x", None, None).arms}
    assert all(below[name].skipped is None for name in BY_HAND) and "mean rank" in below["peft-adalora"].skipped
    shapes = prepared_audit(tight, home / "x", None, None).setting.shapes
    costs = {shape.name: shape.params_per_rank for shape in shapes}
    for name in BY_HAND:  # a run refuses a pattern that does not cost what its budget says
        ranks = below[name].values["method_options"]["rank_pattern"]
        assert below[name].values["budget.params"] == sum(costs[layer] * rank for layer, rank in ranks.items())
    peak = small_config(home, "budget.fraction=1")
    whole = {arm.name: arm for arm in prepared_audit(peak, home / "x", None, None).arms}
    assert "nothing to cut" in whole["post"].skipped and "nothing to cut" in whole["cont"].skipped


SHAPES = [
    LayerShape(f"encoder.layer.{block}.{role}", d_in, d_out, 4)
    for block in range(3) for role, d_in, d_out in (
        ("attention.self.query", 8, 8), ("attention.self.key", 8, 8), ("attention.self.value", 8, 8),
        ("attention.output.dense", 8, 8), ("intermediate.dense", 8, 32), ("output.dense", 32, 8),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("params", [16, 40, 100, 200, 300])
def test_a_pattern_by_hand_spends_the_size(name, params):
    ranks = pattern(name, SHAPES, params)
    spent = sum(shape.params_per_rank * ranks[shape.name] for shape in SHAPES)
    attention = name == "attention"
    own = [shape for shape in SHAPES if name not in BY_HAND[:2] or ("attention" in shape.name) == attention]
    assert params - spent < min(shape.params_per_rank for shape in own)
    assert all(not rank or any(shape.name == layer for shape in own) for layer, rank in ranks.items())


def test_attention_begins_with_query_and_value_in_every_block():
    chosen = {name for name, rank in pattern("attention", SHAPES, 6 * 16).items() if rank}
    assert chosen == {f"encoder.layer.{b}.attention.self.{role}" for b in range(3) for role in ("query", "value")}


def test_last_blocks_are_filled_from_the_end():
    chosen = {name for name, rank in pattern("last-blocks", SHAPES, 4 * 16 + 80).items() if rank}
    assert {name.split(".")[2] for name in chosen} == {"2"} and len(chosen) == 6


def tried(*pairs):
    return [TriedRate(rate=rate, value=value) for rate, value in pairs]


@pytest.mark.parametrize("maximize", [True, False])
def test_rates_go_beyond_an_edge_and_then_between(maximize):
    sign = 1 if maximize else -1

    def best_at(rate):  # a parabola over log rate, best at 0.04
        import math

        return -sign * (math.log(rate / 0.04)) ** 2

    have = []
    while rates := next_rates(have, 0.01, 2.0, 7, maximize):
        have += tried(*((rate, best_at(rate)) for rate in rates))
    assert len(have) == 7
    assert {one.rate for one in have[:3]} == {0.005, 0.01, 0.02}
    assert have[3].rate == pytest.approx(0.04) and have[4].rate == pytest.approx(0.08)
    assert have[5].rate in (pytest.approx(0.04 * 2**0.5), pytest.approx(0.04 / 2**0.5))
    assert not at_edge(have, maximize) and at_edge(have[:4], maximize)


def test_a_rate_at_which_training_failed_is_the_worst_and_ties_go_to_the_lower_one():
    have = [*tried((0.01, 0.5), (0.02, 0.5)), TriedRate(rate=0.005, message="diverged")]
    assert next_rates(have, 0.01, 2.0, 4, True) == [pytest.approx((0.01 * 0.02) ** 0.5)]


def test_an_arm_that_fails_at_every_rate_is_left_out_and_the_others_go_on(config, home):
    found = prepared_audit(config, home / "failing", None, None)
    cont = [arm.name for arm in found.arms].index("cont")
    results = {}
    for _ in range(3):
        for cell, rate in wanted(found.arms, results, found.setting, 2).items():
            message = "training diverged: f1 is nan" if cell.arm == cont else None
            results.setdefault(cell, Result({"rate": rate, "value": 0.1 * cell.arm, "seed": cell.index}, message))
    assert complete(found.arms, results, found.setting, 2)
    record = audit_record(found, results, finished=True)
    assert "training diverged" in record.arm("cont").skipped
    assert record.comparison("cont") is None and record.comparison("twin") is not None


def test_a_method_that_fails_again_and_again_ends_the_audit_with_the_reason(home):
    config = small_config(home, "audit.arms=[twin]", "audit.trials=3", "audit.looks=[2]", "training.learning_rate=1e38",
                          "training.max_grad_norm=1e30")
    with pytest.raises(RepeatedFailureError, match="3 trials in a row failed alike: .*not finite"):
        conduct(prepared_audit(config, home / "diverging", None, None), None)


def answered(record, **claims):
    """The record with other claims."""
    means = {"better": 0.02, "worse": -0.02, "equivalent": 0.0, "undecided": 0.01}
    comparisons = [
        one.model_copy(update={"claim": claims.get(one.arm.replace("-", "_"), "undecided"),
                               "mean": means[claims.get(one.arm.replace("-", "_"), "undecided")]})
        for one in record.comparisons
    ]  # fmt: skip
    return record.model_copy(update={"comparisons": comparisons})


@pytest.mark.parametrize("claims, said, then, arm", [
    ({"uniform": "better", "twin": "better"}, "the placement has a part in it", "method", "auto"),
    ({"uniform": "better", "twin": "equivalent"}, "the parametrisation and not the placement", "other arm", "twin"),
    ({"uniform": "better"}, "is not shown", "method", "auto"),
    ({"uniform": "better", "twin": "worse"}, "equal ranks are the better ones", "other arm", "twin"),
    ({"uniform": "worse"}, "loses 2.0 points", "uniform", "uniform"),
    ({"uniform": "equivalent"}, "are equivalent", "uniform", "uniform"),
    ({}, "no gain of auto", "more seeds", "uniform"),
])  # fmt: skip
def test_each_outcome_has_its_sentence_and_its_advice(record, claims, said, then, arm):
    found = answered(record.model_copy(update={"metric": "accuracy"}), **claims)
    assert said in sentence_of(found)
    assert advice_of(found)[:2] == (then, arm)


def test_stability_of_patterns():
    found = stability([[4, 0, 2], [4, 0, 2]])
    assert found.rank_correlation == pytest.approx(1) and found.jaccard == 1
    assert stability([[3, 0], [0, 3]]).jaccard == 0
    assert stability([[3, 1], [1, 1]]).jaccard == 0.5
    assert stability([[1, 1]]).jaccard is None


def test_the_command_shows_its_plan_and_refuses_other_folders(home):
    small_config(home)  # writes small.yaml
    runner, yaml = CliRunner(), str(home / "small.yaml")
    done = runner.invoke(app, ["audit", yaml, "--dry-run", "--json", "-o", str(home / "planned")])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["looks"] == [4, 6, 8] and [arm["name"] for arm in plan["arms"]][:2] == ["auto", "uniform"]
    assert not (home / "planned").exists()
    (home / "taken").write_text("a file")
    done = runner.invoke(app, ["audit", yaml, "-o", str(home / "taken")])
    assert done.exit_code == 1 and "is a file" in done.output
    done = runner.invoke(app, ["audit"])
    assert done.exit_code == 2 and "--worker URL" in done.output


def test_cells_and_slots_are_one_to_one():
    cells = [Cell(arm, phase, index) for arm in range(12) for phase in ("tune", "seed") for index in range(40)]
    assert len({cell.slot for cell in cells}) == len(cells)
    assert [Cell.of_slot(cell.slot) for cell in cells] == cells


def test_only_arms_that_apply_are_run(config, home):
    found = prepared_audit(config, home / "x", None, None)
    left_out = dataclasses.replace(found, arms=[*found.arms[:2], dataclasses.replace(found.arms[2], skipped="why not")])
    assert len(running_arms(left_out)) == 2
    assert {cell.arm for cell in wanted(left_out.arms, {}, left_out.setting, 2)} == {0, 1}
    assert arms_of(found.setting) == list(found.arms)
