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
from rankalloc.experiments.judging import TaskEvaluator
from rankalloc.experiments.runner import evaluate_saved, train
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.storage.tensors import read_tensors
from rankalloc.trace import RankTrace
from tests.support.language import conversations, preferences, save_language_model, texts
from tests.support.runs import meets_budget
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
        "training.learning_rate=1e-2", "training.log_every=2", "data.max_length=32", *overrides,
    ])


def prepared_of(home, kind):
    """The configuration and the task of conversations ("sft") or preferences ("dpo")."""
    named, file = {"sft": ("chat", "chat.jsonl"), "dpo": ("preference", "pairs.jsonl")}[kind]
    config = config_of(home, named, file)
    prepared = prepare(config)
    assert prepared.trainer == kind
    return config, prepared


def digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=["sft", "dpo"])
def run(request, home):
    config, prepared = prepared_of(home, request.param)
    seen = []
    trace = train(config, home / request.param, prepared=prepared, progress=lambda *step: seen.append(step))
    return request.param, config, prepared, trace, seen


def test_it_ends_on_its_budget_with_everything_in_its_folder(run, home):
    kind, config, prepared, trace, seen = run
    assert meets_budget(trace) and len(set(trace.final_ranks)) > 1
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
    config, prepared = prepared_of(home, "dpo")
    with pytest.raises(ConfigError, match="begins with an update of its own"):
        train(config.replaced({"method": "gora"}), home / "gora", prepared=prepared)
    assert not (home / "gora").exists()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_adapted_output_layer_which_trl_reads_past_is_refused(home, kind):
    config, prepared = prepared_of(home, kind)
    with pytest.raises(ConfigError, match="lm_head is the output layer"):
        train(config.replaced({"adapter.target_modules": ["q_proj", "lm_head"]}), home / "head", prepared=prepared)
    assert not (home / "head").exists()


def test_the_output_layer_can_be_trained_whole(home):
    config, prepared = prepared_of(home, "sft")
    trace = train(config.replaced({"adapter.modules_to_save": ["lm_head"]}), home / "whole", prepared=prepared)
    assert list(trace.heads) == ["lm_head"]
    written = read_tensors(home / "whole" / "adapter" / "adapter_model.safetensors")[0]
    before = prepared.build_model().lm_head.weight
    (learnt,) = (tensor for name, tensor in written.items() if "lm_head" in name)
    assert (learnt - before).abs().max() > 1e-3


def test_without_trl_one_sentence_says_what_to_install(home, monkeypatch):
    config, prepared = prepared_of(home, "sft")
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rankalloc\[trl\]"'):
        train(config, home / "without", prepared=prepared)
    assert not (home / "without").exists()


def test_one_process_with_several_gpus_is_refused_before_anything_is_written(home, monkeypatch):
    config, prepared = prepared_of(home, "sft")
    for kind in ("plain", "sft", "dpo"):
        monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
        with pytest.raises(RankallocError, match="CUDA_VISIBLE_DEVICES=0") as caught:
            train(config, home / "gpus", prepared=replace(prepared, trainer=kind))
        assert "torchrun" in str(caught.value) and not (home / "gpus").exists()


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_a_train_set_that_is_streamed_needs_its_steps(home, kind):
    config = config_of(home, *{"plain": ("causal-lm", "texts.jsonl"), "sft": ("chat", "chat.jsonl")}[kind])
    config = config.replaced({"task.streaming": True, "task.tune": config.task.train, "task.report": config.task.train})
    prepared = prepare(config)
    assert prepared.streaming and prepared.trainer == kind
    with pytest.raises(ConfigError, match="give training.steps"):
        train(config.replaced({"training.steps": None, "training.epochs": 1}), home / "epochs", prepared=prepared)
    assert not (home / "epochs").exists()
    trace = train(config, home / f"streamed-{kind}", prepared=prepared)
    assert trace.steps_done == 8 and meets_budget(trace)
    early = train(config.replaced({"method": "gradient-share"}), home / f"planned-{kind}", prepared=prepared)
    assert early.steps_done == 8


def test_a_stream_resumed_after_several_passes_goes_on_where_it_was(home):
    """Ten rows and eight steps of four: three passes. The last checkpoint is broken, and the one before is taken."""
    write_rows(home / "few.jsonl", conversations(10))
    few = str(home / "few.jsonl")
    config = config_of(home, "chat", "few.jsonl", "training.save_every=2")
    config = config.replaced({"task.streaming": True, "task.tune": few, "task.report": few})
    whole, resumed = home / "stream-whole", home / "stream-resumed"
    train(config, whole, prepared=prepare(config))
    shutil.copytree(whole, resumed)
    (resumed / "trace.json").unlink()
    (resumed / "checkpoint-8" / "optimizer.pt").write_bytes(b"half")
    trace = train(config, resumed, prepared=prepare(config), resume=True)
    assert any(note.startswith("checkpoint-8 was not whole, as optimizer.pt is damaged") for note in trace.notes)
    assert digest(resumed) == digest(whole)


def test_passes_over_a_stream_hold_all_rows_each_in_an_order_of_its_own(home):
    config = config_of(home, "chat", "chat.jsonl", f"task.tune={home / 'chat.jsonl'}")
    config = config.replaced({"task.streaming": True, "task.report": config.task.train})
    rows = iter(prepare(config).splits["train"])
    passes = [[tuple(next(rows)["input_ids"]) for _ in range(24)] for _ in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert len({tuple(order) for order in passes}) == 3


def test_a_base_in_four_bits_is_trained_beside_adapters_in_full_precision(home):
    pytest.importorskip("bitsandbytes")
    config, prepared = prepared_of(home, "sft")
    config = config.replaced({"model.load_in_4bit": True})
    four_bit = prepare(config)
    prepared = replace(prepared, build_model=four_bit.build_model)
    model = prepared.build_model()
    assert model.is_loaded_in_4bit and model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    evaluated = prepared.build_model()
    packed = {name: tensor.clone() for name, tensor in evaluated.state_dict().items()}
    evaluate(prepared, evaluated, "tune", 4)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in evaluated.state_dict().items())
    trace = train(config, home / "four", prepared=prepared)
    assert meets_budget(trace)
    written = read_tensors(home / "four" / "adapter" / "adapter_model.safetensors")[0]
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    learnt = torch.cat([tensor.flatten() for tensor in written.values()])
    assert not torch.equal(learnt, learnt.bfloat16().float())  # steps that bfloat16 would have lost


@pytest.mark.parametrize("step", [5, pytest.param(6, marks=pytest.mark.long)])
def test_a_streamed_run_resumes_as_if_it_had_not_stopped(home, step):
    """Saved amid an epoch, or at its end."""
    given = str(home / "chat.jsonl")
    config = config_of(home, "chat", "chat.jsonl", f"training.save_every={step}").replaced({
        "task.streaming": True, "task.tune": given, "task.report": given,
    })
    folder = home / f"stream-{step}"
    whole = train(config, folder, prepared=prepare(config))
    expected = digest(folder)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "trace.json").unlink()
    again = train(config, folder, prepared=prepare(config), resume=True)
    assert again.final_ranks == whole.final_ranks and digest(folder) == expected


def test_what_sft_learns_is_what_the_task_says(home):
    """The first step's loss, over all examples, is the base's own by the task's labels."""
    config = config_of(home, "chat", "chat.jsonl", "training.steps=1", "training.batch_size=24", "budget.fraction=1")
    prepared = prepare(config)
    before = evaluate(prepared, prepared.build_model(), "train", 8).metrics["loss"]
    trace = train(config, home / "one step", prepared=prepared, splits=())
    assert trace.logs[0].values["loss"] == pytest.approx(before, rel=1e-5)


def test_adapters_of_both_kinds_are_judged_and_calibrated(run, home):
    kind, config, prepared, trace, _ = run
    judge = TaskEvaluator(prepared, "tune", 8)
    again = judge(home / kind / "adapter")
    assert again == pytest.approx(trace.evaluation("tune").metrics[prepared.metric], rel=1e-4)
    assert len(list(judge.batches(2))) == 2
    saved = evaluate_saved(config, prepared, home / kind / "adapter", "report").metrics
    assert saved["loss"] == pytest.approx(trace.evaluation("report").metrics["loss"], rel=1e-4)
