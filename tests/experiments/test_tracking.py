"""wandb for real: an offline run, whose file is read back."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec

import pytest
import wandb

from rankalloc.errors import ConfigError, RankallocError
from rankalloc.experiments import tracking, trainer
from rankalloc.experiments.runner import train
from rankalloc.experiments.sweeps.sweep import run_sweep
from rankalloc.trace import RankTrace
from tests.support.runs import small_config

BLOCK, HEADER = 32768, 7


def records(path):
    """The protobuf records of a .wandb file: LevelDB's log format, after seven bytes of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # a block's tail too short for a header is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture(autouse=True)
def fresh_wandb():
    """wandb reads its environment once a process."""
    wandb.teardown()
    yield
    wandb.teardown()


OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def items(things):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in things}


@pytest.mark.long
def test_an_offline_run_holds_curves_ranks_and_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(tmp_path, "tracking=wandb")
    trace = train(config, tmp_path / "run")
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    history: list[dict] = []
    summary: dict = {}
    settings: dict = {}
    for record in records(path):
        if record.HasField("history"):
            history.append(items(record.history.item))
        elif record.HasField("summary"):
            summary |= items(record.summary.update)
        elif record.HasField("run"):
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}

    asked = [point["budget/asked"] for point in history if "budget/asked" in point]
    assert asked == [allocation.asked for allocation in trace.allocations]
    last = next(point for point in reversed(history) if "budget/asked" in point)
    assert [last[f"rank/{layer.name}"] for layer in trace.layers] == trace.final_ranks
    assert any("train/loss" in point for point in history)
    final = history[-1]
    assert final["tune/loss"] == pytest.approx(trace.evaluation("tune").metrics["loss"])
    page = next((tmp_path / "run" / "wandb").rglob("media/html/report*.html")).read_text()
    assert all(layer.role in page for layer in trace.layers)
    assert settings["adapter"]["rank"] == 4


def test_wandb_without_an_account_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(RankallocError, match="WANDB_MODE=offline"):
        train(small_config(tmp_path, "tracking=wandb"), tmp_path / "run")


def test_off_by_default(tmp_path):
    config = small_config(tmp_path)
    assert config.tracking == "none"
    train(config, tmp_path / "run", splits=())
    assert not (tmp_path / "run" / "wandb").exists()


def read(path):
    """(what the run was called and grouped by, its summary) of a .wandb file."""
    run, summary = None, {}
    for record in records(path):
        if record.HasField("run"):
            run = record.run
        elif record.HasField("summary"):
            summary |= items(record.summary.update)
    return run, summary


def test_a_sweeps_files_hold_every_trials_final_ranks(tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    record = run_sweep(small_config(tmp_path, "tracking=wandb"), tmp_path / "sweep", trials=2)
    for trial in record.trials:
        folder = tmp_path / "sweep" / "trials" / f"{trial.number:04d}"
        trace = RankTrace.load(folder / "trace.json")
        (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        run, summary = read(path)
        assert run.run_group == "small" and run.display_name == f"small-{trial.number}"
        assert summary["ranks"] == {layer.name: r for layer, r in zip(trace.layers, trace.final_ranks, strict=True)}
        assert summary["adapter_params"] == trial.adapter_params and not trace.notes


@pytest.mark.long
def test_a_network_that_fails_leaves_the_sweep_whole_and_its_files_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_PATIENCE", 2)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    record = run_sweep(small_config(tmp_path, "tracking=wandb"), tmp_path / "sweep", trials=2)
    assert [trial.state for trial in record.trials] == ["complete"] * 2
    for trial in record.trials:
        folder = tmp_path / "sweep" / "trials" / f"{trial.number:04d}"
        (note,) = [note for note in RankTrace.load(folder / "trace.json").notes if "wandb" in note]
        assert "could not be reached" in note and "wandb sync" in note
        assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.long
def test_a_disk_that_is_full_leaves_the_sweep_whole(tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        (full / "filler").write_bytes(b"0" * 16_000)
        for name, value in {**OFFLINE, "WANDB_DIR": str(full), "WANDB_DATA_DIR": str(full)}.items():
            monkeypatch.setenv(name, value)
        real = tracking.WandbCallback._begun
        monkeypatch.setattr(
            tracking.WandbCallback, "_begun",
            lambda self, **options: (setattr(self, "folder", full), real(self, **options))[1],
        )
        record = run_sweep(small_config(tmp_path, "tracking=wandb"), tmp_path / "sweep", trials=2)
        assert [trial.state for trial in record.trials] == ["complete"] * 2 and record.best is not None
    finally:
        wandb.teardown()
        subprocess.run(["umount", "-l", str(full)], check=False)


def test_the_trainer_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_config(tmp_path, "tracking=tensorboard"), tmp_path / "run", splits=())
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert len(events.Scalars("train/loss")) >= 2


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(name, tmp_path):
    if any(find_spec(package) for package in trainer._INTEGRATIONS[name]):
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        train(small_config(tmp_path, f"tracking={name}"), tmp_path / "run")
