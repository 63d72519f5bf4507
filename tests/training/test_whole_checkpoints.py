"""A checkpoint that cannot give the same bits is refused by the name of the file, and the one before it is offered."""

from __future__ import annotations

import shutil

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import AdapterFileError
from rankalloc.training.checkpoints import STATE_NAME, checkpoints_in, require_whole
from tests.support.models import make_bert
from tests.support.training import make_trainer

FILES = [
    "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json", STATE_NAME,
]
SETTINGS = {"save_strategy": "steps", "save_steps": 4, "steps": 12}


def begin():
    model = make_bert()
    torch.manual_seed(1)
    return model, ra.RankCallback(ra.attach(model, rank=4), ra.RankBudget(ranks=20, every=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, callback = begin()
    make_trainer(model, folder, [callback], **SETTINGS).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A folder with the run's checkpoints, for a test to damage."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def missing(file):
    file.unlink()


def truncated(file):
    file.write_bytes(file.read_bytes()[:-20])


def empty(file):
    file.write_bytes(b"")


def refusal(folder):
    with pytest.raises(AdapterFileError) as caught:
        require_whole(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_whole_checkpoints_are_found_from_the_latest_on(run):
    (run / "checkpoint-last").mkdir(exist_ok=True)
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-12", "checkpoint-8", "checkpoint-4"]
    for folder in checkpoints_in(run):
        require_whole(folder)


@pytest.mark.parametrize("damage", [missing, truncated, empty])
@pytest.mark.parametrize("name", FILES)
def test_each_file_counts(name, damage, copy):
    damage(copy / "checkpoint-12" / name)
    said = refusal(copy / "checkpoint-12")
    assert f"{name} is {'missing' if damage is missing else 'damaged or truncated'}" in said
    assert "checkpoint-8, before it, is whole" in said


def test_what_is_offered_is_whole_itself(copy):
    missing(copy / "checkpoint-12" / "optimizer.pt")
    truncated(copy / "checkpoint-8" / "scheduler.pt")
    assert "checkpoint-4, before it, is whole" in refusal(copy / "checkpoint-12")
    empty(copy / "checkpoint-4" / "trainer_state.json")
    assert "no earlier checkpoint that is whole" in refusal(copy / "checkpoint-12")
    shutil.move(copy / "checkpoint-12", copy / "mine")
    assert "no earlier checkpoint" in refusal(copy / "mine")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_NAME])
def test_a_trainer_that_would_go_on_in_silence_does_not(name, copy):
    missing(copy / "checkpoint-12" / name)
    model, callback = begin()
    trainer = make_trainer(model, copy, [callback], steps=12)
    with pytest.raises(AdapterFileError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert name in str(caught.value) and "checkpoint-8, before it, is whole" in str(caught.value)


def test_checkpoints_of_a_peft_model_are_whole_without_our_weights(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_bert(), peft.LoraConfig(r=4, target_modules=["query", "value"]))
    make_trainer(model, tmp_path, **SETTINGS).train()
    checkpoint = tmp_path / "checkpoint-12"
    assert not (checkpoint / "model.safetensors").exists()
    require_whole(checkpoint, rank_state=False)
    assert f"{STATE_NAME} is missing" in refusal(checkpoint)
    missing(checkpoint / "adapter_model.safetensors")
    assert "adapter_model.safetensors is missing" in refusal(checkpoint)
