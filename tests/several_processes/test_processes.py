"""Two real processes under torchrun end with the same ranks and adapters to the bit, and with those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rankalloc as ra
from rankalloc.storage.fingerprint import KEY
from rankalloc.storage.tensors import read_tensors
from tests.several_processes import script
from tests.support.language import conversations, save_language_model
from tests.support.models import assert_same, logits_of, make_bert, make_gpt2
from tests.support.runs import meets_budget
from tests.support.task_files import write_rows

ROOT = Path(__file__).parents[2]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(name: str, folder: Path, *words: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Two processes of a script of this folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *TWO, "-m", f"tests.several_processes.{name}", str(folder), *words], cwd=ROOT, env=environment,
        timeout=timeout, capture_output=True, text=True,
    )


def write_chat(folder: Path) -> None:
    """What ``rankalloc train`` needs to teach a tiny model."""
    save_language_model(folder / "base")
    write_rows(folder / "chat.jsonl", conversations(24))
    (folder / "run.yaml").write_text(
        "task: {kind: chat, train: chat.jsonl}\nmodel: ./base\nadapter: {rank: 4}\nbudget: {every: 2}\n"
        "training: {steps: 6, batch_size: 4, save_every: 3, learning_rate: 1e-2}\ndata: {max_length: 32}\n"
    )


def both(folder: Path, part: str) -> Path:
    """What the script leaves behind, run by two processes and by this one."""
    write_chat(folder)
    done = start("script", folder, part)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    script.main(folder, part)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return both(tmp_path_factory.mktemp("whole"), "whole")


@pytest.fixture(scope="module")
def further_runs(tmp_path_factory):
    return both(tmp_path_factory.mktemp("further"), "further")


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory):
    return both(tmp_path_factory.mktemp("sharded"), "sharded")


def test_rankalloc_train_under_torchrun_is_one_run(runs):
    """Both processes train it; one writes and prints, and an error is one sentence."""
    one, two = tensors(runs / "command-2-0.pt"), tensors(runs / "command-2-1.pt")
    assert_same(one, two)
    trace = ra.RankTrace.load(runs / "command" / "trace.json")
    assert trace.finished and meets_budget(trace) and trace.budget.target < trace.budget.initial
    assert "2 processes trained together: a step took 2 x 4 = 8 examples" in trace.notes
    assert {path.name for path in (runs / "command").iterdir()} == {
        "adapter", "checkpoint-3", "checkpoint-6", "config.yaml", "report.html", "report.json", "trace.json",
    }
    printed, said = (runs / "stdout").read_text(), (runs / "stderr").read_text()
    assert printed.count("params asked") == 2  # of two commands
    assert said.count("training chat with auto") == 2 and said.count("in 2 processes") == 2
    assert said.count("error: ") == said.count("holds an unfinished run") == 1


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("run", ["auto", "trainer"])
def test_two_processes_end_alike_and_as_one_does(runs, run):
    assert_alike(runs, run)


@pytest.mark.long
@pytest.mark.parametrize("run", ["adalora", "dylora", "task trainer", "peft loop", "peft trainer"])
def test_so_they_do_in_every_other_way(further_runs, run):
    assert_alike(further_runs, run)


@pytest.mark.long
@pytest.mark.parametrize("run", ["bert", "gpt2"])
def test_so_they_do_beside_a_sharded_base(sharded_runs, run):
    """Each process holds its part of a base that FSDP2 runs."""
    assert_alike(sharded_runs, run)


def assert_alike(runs: Path, run: str) -> None:
    one, two, whole = (tensors(runs / f"{run}-{name}.pt") for name in ("2-0", "2-1", "1-0"))
    assert_same(one, two)
    assert one.keys() == whole.keys()
    for name, tensor in updates(one).items():
        torch.testing.assert_close(tensor, updates(whole)[name], rtol=1e-5, atol=1e-5)


def metadata_of(folder: Path) -> dict[str, str]:
    return read_tensors(folder / "adapter_model.safetensors")[1]


def updates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW of each adapter, and what else there is: singular vectors of nearly equal values may turn into each other."""
    names = [name.removesuffix(".lam") for name in state if name.endswith(".lam")]
    products = {name: state[f"{name}.P"] * state[f"{name}.lam"] @ state[f"{name}.Q"] for name in names}
    others = {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}
    ranks = {f"{name}.rank": torch.tensor(len(state[f"{name}.lam"])) for name in names}
    return {**products, **others, **ranks}


@pytest.mark.long
@pytest.mark.parametrize(("name", "make"), [("bert", make_bert), ("gpt2", make_gpt2)])
def test_adapters_beside_a_sharded_base_are_saved_whole(sharded_runs, name, make):
    runs = sharded_runs
    one, whole = (tensors(runs / f"{name}-{run}.pt") for run in ("2-0", "1-0"))
    ranks = [len(tensor) for key, tensor in one.items() if key.endswith(".lam")]
    assert 0 < sum(ranks) < 4 * len(ranks)  # ranks have left memory, and not all alike
    assert len(set(ranks)) > 1
    torch.testing.assert_close(one["norm"], whole["norm"], rtol=1e-4, atol=0)
    files = [metadata_of(runs / f"{name}-{world}") for world in (2, 1)]
    assert [KEY in metadata for metadata in files] == [False, True]  # no process sees enough of the base
    model = make()
    ra.load(model, runs / f"{name}-2")
    torch.testing.assert_close(logits_of(model), one["outputs"], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_what_cannot_end_alike_is_refused_in_every_process(sharded_runs):
    said, other = (json.loads((sharded_runs / f"refusals-{rank}.json").read_text()) for rank in (0, 1))
    assert said == other
    expected = {
        "unaveraged": "different ranks", "whole": "ignored_params", "late": "ignored_params",
        "late_base": "after sharding", "flat": "flattens", "attached_after": "before fully_shard",
        "merged": "in one process",
    }
    assert said.keys() == expected.keys()
    for name, words in expected.items():
        assert words in said[name], said[name]
    assert "DistributedDataParallel" in said["unaveraged"]


@pytest.mark.long
def test_a_killed_process_ends_the_run_with_an_error(tmp_path):
    done = start("dying", tmp_path, timeout=60)
    ended = time.time()
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    marks = [tmp_path / f"step-{rank}" for rank in (0, 1)]
    assert [mark.read_text() for mark in marks] == ["7", "7"]
    assert ended - marks[1].stat().st_mtime < 10
