"""Runs that TRL's trainers train: conversations by SFTTrainer, preferences by DPOTrainer."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch

from rankalloc.errors import ConfigError, RankallocError
from rankalloc.experiments import trainer
from rankalloc.experiments.config import load_config
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare
from rankalloc.storage.tensors import read_tensors
from rankalloc.trace import RankTrace
from tests.support.language import conversations, preferences, save_language_model, texts
from tests.support.task_files import write_rows

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    save_language_model(folder / "base")
    write_rows(folder / "texts.jsonl", texts(32))
    write_rows(folder / "chat.jsonl", conversations(24))
    write_rows(folder / "pairs.jsonl", preferences(24))
    return folder


def config_of(home, kind, file, *overrides):
    return load_config(None, [
        f"task.kind={kind}", f"task.train={home / file}", f"model.name={home / 'base'}", "adapter.rank=4",
        "budget.every=2", "training.steps=8", "training.batch_size=4", "training.save_every=4",
        "training.learning_rate=1e-2", "training.log_every=2", "data.max_length=24", *overrides,
    ])


def by_hand(home, kind):
    """A prepared task of the contract: features of the training data, evaluated as a causal-lm."""
    from datasets import Dataset

    config = config_of(home, "causal-lm", "texts.jsonl")
    prepared = prepare(config)
    if kind == "sft":
        rows = [
            {**row, "labels": [-100] * (len(row["input_ids"]) // 2) + row["input_ids"][len(row["input_ids"]) // 2:]}
            for row in prepared.splits["train"]
        ]
        return config, replace(prepared, trainer="sft", splits={**prepared.splits, "train": rows})
    return config, replace(prepared, trainer="dpo", rows={"train": Dataset.from_list(preferences(24))})


def digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=["sft", "dpo"])
def run(request, home):
    config, prepared = by_hand(home, request.param)
    seen = []
    trace = train(config, home / request.param, prepared=prepared, progress=lambda *step: seen.append(step))
    return request.param, config, prepared, trace, seen


def test_it_ends_on_its_budget_with_everything_in_its_folder(run, home):
    kind, config, prepared, trace, seen = run
    assert sum(trace.final_ranks) == trace.budget.target and len(set(trace.final_ranks)) > 1
    assert trace.finished and RankTrace.load(home / kind / "trace.json") == trace
    assert [step for step, _, _ in seen] == list(range(1, 9))
    assert {e.split for e in trace.evaluations} == {"tune", "report"}
    losses = [log.values["loss"] for log in trace.logs if "loss" in log.values]
    if kind == "dpo":  # at ΔW = 0 the reference is the model itself
        assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < losses[0]


def test_it_resumes_as_if_it_had_not_stopped(run, home):
    kind, config, prepared, trace, _ = run
    folder = home / f"{kind}-resumed"
    shutil.copytree(home / kind, folder)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "trace.json").unlink()
    again = train(config, folder, prepared=prepared, resume=True)
    assert again.final_ranks == trace.final_ranks
    assert digest(folder) == digest(home / kind)


def test_dpo_is_refused_where_its_reference_would_not_be_the_base(home):
    config, prepared = by_hand(home, "dpo")
    with pytest.raises(ConfigError, match="begins with an update of its own"):
        train(config.replaced({"method": "gora"}), home / "gora", prepared=prepared)
    assert not (home / "gora").exists()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_adapted_output_layer_which_trl_reads_past_is_refused(home, kind):
    config, prepared = by_hand(home, kind)
    with pytest.raises(ConfigError, match="lm_head is the output layer"):
        train(config.replaced({"adapter.target_modules": ["q_proj", "lm_head"]}), home / "head", prepared=prepared)
    assert not (home / "head").exists()


def test_without_trl_one_sentence_says_what_to_install(home, monkeypatch):
    config, prepared = by_hand(home, "sft")
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rankalloc\[trl\]"'):
        train(config, home / "without", prepared=prepared)
    assert not (home / "without").exists()


def test_one_process_with_several_gpus_is_refused_before_anything_is_written(home, monkeypatch):
    config, prepared = by_hand(home, "sft")
    for kind in ("plain", "sft", "dpo"):
        monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
        with pytest.raises(RankallocError, match="CUDA_VISIBLE_DEVICES=0") as caught:
            train(config, home / "gpus", prepared=replace(prepared, trainer=kind))
        assert "torchrun" in str(caught.value) and not (home / "gpus").exists()


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_a_train_set_that_is_streamed_needs_its_steps(home, kind):
    from datasets import Dataset

    config, prepared = by_hand(home, "sft")
    rows = Dataset.from_list(prepared.splits["train"]).to_iterable_dataset()
    prepared = replace(prepared, trainer=kind, splits={**prepared.splits, "train": rows})
    with pytest.raises(ConfigError, match="give training.steps"):
        train(config.replaced({"training.steps": None, "training.epochs": 1}), home / "epochs", prepared=prepared)
    assert not (home / "epochs").exists()
    trace = train(config, home / f"streamed-{kind}", prepared=prepared)
    assert trace.steps_done == 8 and sum(trace.final_ranks) == trace.budget.target
    early = train(config.replaced({"method": "gradient-share"}), home / f"planned-{kind}", prepared=prepared)
    assert early.steps_done == 8


def test_a_base_in_four_bits_is_trained_beside_adapters_in_full_precision(home):
    pytest.importorskip("bitsandbytes")
    config, prepared = by_hand(home, "sft")
    config = config.replaced({"model.load_in_4bit": True})
    four_bit = prepare(config)
    prepared = replace(prepared, build_model=four_bit.build_model)
    model = prepared.build_model()
    assert model.is_loaded_in_4bit and model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    trace = train(config, home / "four", prepared=prepared)
    assert sum(trace.final_ranks) == trace.budget.target
    written = read_tensors(home / "four" / "adapter" / "adapter_model.safetensors")[0]
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    learnt = torch.cat([tensor.flatten() for tensor in written.values()])
    assert not torch.equal(learnt, learnt.bfloat16().float())  # steps that bfloat16 would have lost
