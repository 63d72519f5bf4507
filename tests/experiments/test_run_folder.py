"""What a folder holds, and that a run which did not finish never leaves a folder that counts as finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankalloc.cli import app
from rankalloc.errors import ConfigError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.run_folder import RunFolder, SweepFolder, content
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare
from rankalloc.trace import RankTrace
from tests.experiments.dying import SAVING
from tests.support.runs import small_config, small_yaml


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home, *SAVING)


@pytest.fixture(scope="module")
def straight(config, home):
    """A run that nothing interrupted."""
    return train(config, home / "straight"), RunFolder(home / "straight")


def digest(run):
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def apart_from_times(trace):
    shown = trace.model_dump(exclude={"created", "environment"})
    return {name: value for name, value in shown.items() if not name.endswith("_seconds") and "seconds_" not in name}


def command_line(home, folder, *words):
    return CliRunner().invoke(app, ["train", str(home / "small.yaml"), "--output", str(folder), *words])


def assert_unfinished(home, run):
    assert not run.trace.exists() and content(run.path) == "an unfinished run"
    refused = command_line(home, run.path)
    assert refused.exit_code == 1 and "holds an unfinished run; continue it with --resume" in refused.stderr


@pytest.mark.parametrize(
    "files, holds",
    [
        ([], "nothing"),
        (["config.yaml", "adapter/adapter_config.json"], "nothing"),
        (["checkpoint-3/trainer_state.json"], "an unfinished run"),
        (["checkpoint-last/trainer_state.json"], "nothing"),
        (["trace.json"], "a finished run"),
        (["checkpoint-3/trainer_state.json", "trace.json"], "a finished run"),
        (["sweep.json"], "a sweep"),
        (["study.db", "config.yaml"], "a sweep"),
    ],
)
def test_what_a_folder_holds(files, holds, tmp_path):
    assert content(tmp_path / "missing") == "nothing"
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert content(tmp_path) == holds
    if files:
        assert content(tmp_path / files[0]) == "a file"


def test_discarding_a_run_leaves_what_is_not_its_own(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = RunFolder(tmp_path / "run")
    for name in ("trace.json", "report.html", "report.json", "notes.txt", "adapter/a", "checkpoint-12/b"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    (run.path / "checkpoint-1").symlink_to(elsewhere)
    run.discard()
    assert {path.name for path in run.path.iterdir()} == {"notes.txt", "checkpoint-1"} and elsewhere.is_dir()
    run.discard()


def test_trials_are_numbered_folders_of_a_sweep(tmp_path):
    assert SweepFolder(tmp_path).trial(7).trace == tmp_path / "trials" / "0007" / "trace.json"


def test_an_evaluation_that_fails_leaves_no_finished_run(home):
    small_yaml(home)
    for split, label in (("train", 0.5), ("tune", 1e300)):  # a square that no float holds
        rows = [{"text": f"film {i} was good", "label": label} for i in range(24)]
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["task.kind=regression", f"task.train={home / 'train.jsonl'}", f"task.tune={home / 'tune.jsonl'}",
            "training.save_every=3"]
    run = RunFolder(home / "diverged")
    with pytest.raises(RankallocError, match="training diverged: the tune loss is inf"):
        train(load_config(home / "small.yaml", sets), run.path)
    assert not run.adapter.exists()
    assert_unfinished(home, run)
    again = command_line(home, run.path, *(word for value in sets for word in ("--set", value)), "--resume")
    assert again.exit_code == 1 and "training diverged" in again.stderr and not run.trace.exists()


def test_an_adapter_that_cannot_be_saved_leaves_no_finished_run(config, home, straight):
    trace, _ = straight
    run = RunFolder(home / "unsaved")
    run.path.mkdir()
    run.adapter.touch()  # a file where the folder should be
    with pytest.raises(RankallocError, match="adapter"):
        train(config, run.path)
    assert_unfinished(home, run)
    run.adapter.unlink()
    assert apart_from_times(train(config, run.path, resume=True)) == apart_from_times(trace)
    assert content(run.path) == "a finished run"


def test_an_earlier_trace_does_not_vouch_for_an_adapter_that_was_not_saved(config, home, straight):
    run = RunFolder(home / "replaced")
    shutil.copytree(straight[1].path, run.path)
    shutil.rmtree(run.adapter)
    run.adapter.touch()
    with pytest.raises(RankallocError, match="adapter"):
        train(config, run.path, resume=True)
    assert_unfinished(home, run)


@pytest.mark.long
@pytest.mark.parametrize("split", ["tune", "report"])
def test_a_process_killed_while_it_evaluates_leaves_a_run_to_resume(split, config, home, straight):
    run = RunFolder(home / f"killed-{split}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.dying", str(home), split, str(run.path)],
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=False,
    )
    assert done.returncode == -9
    assert_unfinished(home, run)
    trace = train(config, run.path, resume=True)
    assert apart_from_times(trace) == apart_from_times(straight[0]) and digest(run) == digest(straight[1])
    assert RankTrace.load(run.trace) == trace and content(run.path) == "a finished run"


@pytest.mark.parametrize(
    "settings",
    [
        {"training.gradient_accumulation_steps": 2},
        {"training.steps": None, "training.epochs": 0.5},
        {"training.batch_size": 8},  # six steps are one whole epoch
    ],
)
def test_resuming_from_the_last_checkpoint_takes_no_further_step(settings, config, home):
    run = RunFolder(home / "resumed")
    run.discard()
    settings = config.replaced(settings)
    trace = train(settings, run.path)
    before = digest(run)
    run.trace.unlink()
    resumed = train(settings, run.path, resume=True)
    assert trace.steps_done == 6 and apart_from_times(resumed) == apart_from_times(trace) and digest(run) == before


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")
        if path.is_file()
    }


def sets(*values):
    return [word for value in values for word in ("--set", value)]


def test_resuming_a_finished_run_says_so_and_changes_nothing(home, straight):
    run = RunFolder(home / "finished")
    small_yaml(home)
    shutil.copytree(straight[1].path, run.path)  # as if the process had been killed before it wrote the report
    first = command_line(home, run.path, *sets(*SAVING), "--resume")
    assert first.exit_code == 0 and run.report.is_file(), first.stderr
    before = contents(run.path)
    for words in ([], ["--json"], []):
        again = command_line(home, run.path, *sets(*SAVING), "--resume", *words)
        assert again.exit_code == 0 and "holds a finished run of 6 steps: nothing to resume" in again.stderr
        assert "others than these" not in again.stderr and "step 7" not in again.stderr
        assert json.loads(again.stdout)["steps"] == 6 if words else again.stdout == first.stdout
        assert contents(run.path) == before
    other = command_line(home, run.path, *sets(*SAVING, "training.learning_rate=1"), "--resume")
    assert other.exit_code == 0 and "others than these, and --overwrite trains it again" in other.stderr
    assert contents(run.path) == before


def test_a_finished_run_can_be_made_longer(config, home, straight):
    run = RunFolder(home / "longer")
    shutil.copytree(straight[1].path, run.path)
    trace = train(config.replaced({"training.steps": 9}), run.path, resume=True)
    assert trace.steps_done == 9 == RankTrace.load(run.trace).steps_done and digest(run) != digest(straight[1])
    assert trace.final_ranks == straight[0].final_ranks and "resumed at step 6 to end after 9" in trace.alerts[0]
    with pytest.raises(RankallocError, match="9 steps have been trained, and this run is to end after 8"):
        train(config.replaced({"training.steps": 8}), run.path, resume=True)
    assert RankTrace.load(run.trace) == trace


def test_a_run_that_had_ended_without_its_evaluation_is_evaluated(config, home, straight):
    run = RunFolder(home / "unevaluated")
    shutil.copytree(straight[1].path, run.path)
    run.trace.unlink()
    shutil.rmtree(run.adapter)
    assert content(run.path) == "an unfinished run"
    resumed = train(config, run.path, resume=True)
    assert apart_from_times(resumed) == apart_from_times(straight[0]) and digest(run) == digest(straight[1])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("missing", "optimizer.pt"), ("truncated", "rankalloc_state.safetensors"),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (
            ("truncated", "optimizer.pt"), ("missing", "rng_state.pth"), ("missing", "rankalloc_state.safetensors"),
            ("truncated", "model.safetensors"), ("truncated", "rng_state.pth"), ("missing", "model.safetensors"),
        )),
    ],
)
def test_a_run_goes_on_from_the_last_checkpoint_that_is_whole(name, damage, config, home, straight):
    run = RunFolder(home / "damaged")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(straight[1].path, run.path)
    run.trace.unlink()
    spoil(run.path / "checkpoint-6" / name, damage)
    done = command_line(home, run.path, *sets(*SAVING), "--resume")
    what = f"{name} is {damage if damage == 'missing' else 'damaged or truncated'}"
    assert done.exit_code == 0, done.stderr
    said = f"checkpoint-6 was not whole, as {what}: the run went on from checkpoint-3, before it"
    assert said in RankTrace.load(run.trace).notes and said[:40] in done.stdout
    assert RankTrace.load(run.trace).allocations == straight[0].allocations and digest(run) == digest(straight[1])


def test_where_no_checkpoint_is_whole_the_file_is_named(config, home, straight):
    run = RunFolder(home / "damaged")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(straight[1].path, run.path)
    run.trace.unlink()
    spoil(run.path / "checkpoint-3" / "scheduler.pt", "missing")
    spoil(run.path / "checkpoint-6" / "optimizer.pt", "truncated")
    before = contents(run.path)
    refused = command_line(home, run.path, *sets(*SAVING), "--resume")
    assert refused.exit_code == 1 and "optimizer.pt is damaged or truncated" in refused.stderr
    assert "no earlier checkpoint that is whole, so begin again" in refused.stderr
    assert "Traceback" not in refused.stderr and contents(run.path) == before


def spoil(file, damage):
    content_of = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content_of[:-50])


def test_a_run_without_checkpoints_says_why_it_cannot_be_resumed(config, home):
    prepared = prepare(config)

    def full_disk(*_):
        raise OSError("no space left on device")

    run = RunFolder(home / "no-checkpoints")
    plain = config.replaced({"training.save_every": None})
    with pytest.raises(OSError, match="no space"):
        train(plain, run.path, prepared=dataclasses.replace(prepared, metrics_of=full_disk))
    assert content(run.path) == "nothing"
    with pytest.raises(ConfigError, match="nothing to resume: .*save_every"):
        train(plain, run.path, resume=True)
    assert train(plain, run.path).finished and content(run.path) == "a finished run"


@pytest.mark.parametrize("name", ["save_trace", "method", "fresh", "total_steps", "bogus"])
def test_options_that_no_method_has_are_refused_in_one_sentence(name, home):
    small_yaml(home)
    done = command_line(home, home / "refused", "--set", f"method_options.{name}=1")
    assert done.exit_code == 2 and f"unknown option of method 'auto': '{name}'" in done.stderr
    assert not (home / "refused").exists()
