"""``rankalloc train`` on the data that people have: conversations, preferences, a Parquet folder, a stream."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rankalloc.cli import app
from tests.support.language import conversations, preferences, save_language_model
from tests.support.task_files import write_rows

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = "adapter: {rank: 4}\nbudget: {every: 1}\ntraining: {steps: 3, batch_size: 2}\ndata: {max_length: 32}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("chat")
    save_language_model(folder / "base")
    write_rows(folder / "chat.jsonl", conversations(10))
    write_rows(folder / "pairs.jsonl", preferences(24))
    (folder / "parquet").mkdir()
    Dataset.from_list(conversations(12)).to_parquet(folder / "parquet" / "train-00000.parquet")
    for name, task in {
        "chat": "{kind: chat, train: chat.jsonl}", "preference": "{kind: preference, train: pairs.jsonl}",
        "parquet": "{kind: chat, train: parquet}",
        "stream": "{kind: chat, train: parquet, streaming: true, tune: chat.jsonl, report: chat.jsonl}",
    }.items():
        (folder / f"{name}.yaml").write_text(f"task: {task}\nmodel: {{name: ./base}}\n{TRAINING}")
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc")


@pytest.mark.parametrize(
    "name", ["chat", "stream", *(pytest.param(name, marks=pytest.mark.long) for name in ("preference", "parquet"))]
)
def test_one_command_trains(home, name):
    done = run("train", home / f"{name}.yaml", "--output", home / "runs" / name, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0 <= told["budget"]["asked"] - told["budget"]["reached"] < 96 and told["steps"] == 3
    assert told["budget"]["reached"] == told["stored"]["numbers"]
    assert {path.name for path in (home / "runs" / name).iterdir()} == {
        "adapter", "config.yaml", "report.html", "report.json", "trace.json",
    }


def test_a_dry_run_says_that_a_set_is_streamed_and_that_it_needs_steps(home):
    done = run("train", home / "stream.yaml", "--dry-run", "--output", home / "dry")
    assert "the train set is streamed, and shuffled among the next 1000" in done.stdout  # what the run's notes will say
    assert done.exit_code == 0 and "streamed train, 10 tune" in done.stdout
    assert json.loads(run("train", home / "stream.yaml", "--dry-run", "--json").stdout)["examples"]["train"] is None
    done = run("train", home / "stream.yaml", "--output", home / "dry", "--set", "training={epochs: 1}")
    assert done.exit_code == 2 and done.stderr.count("error") == 1 and "give training.steps" in done.stderr
    assert not (home / "dry").exists()


def test_a_sweep_in_several_processes_is_refused(home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("sweep", home / "chat.yaml", "--output", home / "sweep")
    assert done.exit_code == 2 and "start it without torchrun" in done.stderr and not (home / "sweep").exists()


@pytest.mark.long
def test_sweeps_compare_on_conversations_and_preferences(home):
    for name in ("chat", "preference"):
        done = run("sweep", home / f"{name}.yaml", "--output", home / f"{name} sweep", "--trials", 4, "--json")
        assert done.exit_code == 0, done.stderr
        assert (json.loads(done.stdout)["pair"] is None) == (name == "chat")  # whose report split is one example
        done = run(
            "frontier", home / f"{name} sweep" / "best" / "adapter", "--task", home / f"{name}.yaml", "-o",
            home / f"{name} curve",
        )
        assert done.exit_code == 0, done.stderr
