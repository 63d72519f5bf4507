"""wandb for real: an offline run, whose file is read back."""

from __future__ import annotations

import json

import pytest
import wandb

from rankalloc.errors import RankallocError
from rankalloc.experiments.runner import train
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


def items(things):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in things}


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
