"""The Trainer's checkpoints hold an adapter and what training changed, never the base; runs go on from them."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, BertForTokenClassification

import rankalloc as ra
from rankalloc.storage.trained_state import is_trained_state
from tests.support.models import assert_same, logits_of, make_bert, make_llama, tensors_of, token_data, token_ids
from tests.support.peft_models import peft_of
from tests.support.saved import CLOSE
from tests.support.training import make_trainer

peft = pytest.importorskip("peft")
SAVING = {"save_strategy": "steps", "save_steps": 6, "steps": 12}
LOGS = ("transformers.trainer", "transformers.modeling_utils")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_bert(dropout=0.1).save_pretrained(folder)
    return folder


def bert(base):
    return AutoModelForTokenClassification.from_pretrained(base)


def llama(base):
    return make_llama()


def causal():
    return [{"input_ids": i, "labels": i.clone()} for i in token_ids(5, 64)]


KINDS = {
    "plain LoRA": (bert, {"init": "lora"}, None), "chosen ranks": (bert, {"dropout": 0.1}, "auto"),
    "kept until the freeze": (bert, {}, "adalora"), "vera": (bert, {"init": "vera"}, None),
    "tied head trained": (llama, {"modules_to_save": ["lm_head"]}, None),
    "tied head adapted": (llama, {"target_modules": ["lm_head", "q_proj"]}, "auto"),
}


def begin(base, kind, seed=1):
    make, options, method = KINDS[kind]
    model = make(base)
    torch.manual_seed(seed)
    adapters = ra.attach(model, rank=4, **options)  # without dropout, layers share the products of one input
    fraction = ra.RankBudget(fraction=0.4, every=2)
    return model, adapters, [ra.RankCallback(adapters, fraction, method)] if method else []


def data_for(kind):
    return {"data": causal()} if KINDS[kind][0] is llama else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_no_base_and_resuming_from_it_equals_not_stopping(base, kind, tmp_path, caplog):
    base_names = set(KINDS[kind][0](base).state_dict())
    model, adapters, callbacks = begin(base, kind)
    make_trainer(model, tmp_path, callbacks, **data_for(kind), **SAVING).train()
    expected = tensors_of(model)

    checkpoint = tmp_path / "checkpoint-6"
    assert not (checkpoint / "config.json").exists()
    held = load_file(checkpoint / "model.safetensors")
    heads = tuple(f"{name}." for name in adapters.heads)
    tied = {"model.embed_tokens.weight"} if "lm_head." in heads else set()
    assert {name for name in held if name in base_names and not name.startswith(heads)} == tied
    assert not any("base_layer" in name for name in held) and any(name.endswith(".P") for name in held)

    model, _, callbacks = begin(base, kind, seed=77)
    trainer = make_trainer(model, tmp_path, callbacks, **data_for(kind), steps=12, log_level="warning")
    for name in LOGS:
        logging.getLogger(name).addHandler(caplog.handler)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name in LOGS:
        logging.getLogger(name).removeHandler(caplog.handler)
    assert_same(tensors_of(model), expected)
    assert not [record for record in caplog.records if "missing" in record.message or "unexpected" in record.message]


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    """(a checkpoint from before the freeze, the logits that the model had there)."""
    folder = tmp_path_factory.mktemp("run")
    model, _, callbacks = begin(base, "kept until the freeze")
    make_trainer(model, folder, callbacks, **SAVING).train()
    model, _, _ = begin(base, "kept until the freeze", seed=77)
    model.load_state_dict(load_file(folder / "checkpoint-6" / "model.safetensors"))  # complete, says the strict check
    return folder / "checkpoint-6", logits_of(model)


@pytest.mark.parametrize(
    "load",
    [
        lambda base, folder: peft.PeftModel.from_pretrained(bert(base), folder),
        lambda base, folder: AutoModelForTokenClassification.from_pretrained(folder),
        lambda base, folder: BertForTokenClassification.from_pretrained(folder),
        lambda base, folder: peft.AutoPeftModelForTokenClassification.from_pretrained(folder),
        lambda base, folder: ra.load(model := bert(base), folder) and model,
    ],
    ids=["PeftModel", "AutoModel", "the class", "AutoPeftModel", "ra.load"],
)
def test_a_checkpoint_is_an_adapter_to_everyone(base, checkpoint, load):
    folder, ours = checkpoint
    assert (ours - logits_of(bert(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load(base, folder)), ours, **CLOSE)


def test_what_is_missing_besides_the_base_is_still_reported(base, checkpoint):
    model, _, _ = begin(base, "kept until the freeze")
    state = load_file(checkpoint[0] / "model.safetensors")
    for name in (next(n for n in state if n.endswith(".lam")), "classifier.bias"):
        assert name in model.load_state_dict({k: v for k, v in state.items() if k != name}, strict=False).missing_keys
    some = {**state, "bert.embeddings.LayerNorm.bias": torch.zeros(32)}  # of the base, and not all of it
    assert "bert.embeddings.LayerNorm.weight" in model.load_state_dict(some, strict=False).missing_keys


def make_old(folder, base):
    """Turn a checkpoint into what 0.1 wrote: the whole model, under the names of the module tree."""
    model, _, _ = begin(base, "kept until the freeze", seed=77)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"):
        (folder / name).unlink()
    type(model).save_pretrained(model, folder)
    assert (folder / "config.json").exists()


def test_checkpoints_of_the_first_version_resume_and_are_replaced(base, tmp_path):
    saving = {**SAVING, "save_steps": 4}
    model, _, callbacks = begin(base, "kept until the freeze")
    make_trainer(model, tmp_path, callbacks, **saving).train()
    expected = tensors_of(model)
    for step in (4, 8):
        make_old(tmp_path / f"checkpoint-{step}", base)
    model, _, callbacks = begin(base, "kept until the freeze", seed=77)
    make_trainer(model, tmp_path, callbacks, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(tensors_of(model), expected)
    assert not (tmp_path / "checkpoint-8" / "config.json").exists()
    assert is_trained_state(tmp_path / "checkpoint-8" / "model.safetensors")


def test_the_best_checkpoint_of_a_run_without_a_callback(base, tmp_path):
    from tests.training.test_callback import Scored

    model, _, _ = begin(base, "plain LoRA")
    trainer = make_trainer(
        model, tmp_path, trainer_class=Scored, eval_dataset=token_data(16), eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=4, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=False, steps=12,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    other, _, _ = begin(base, "plain LoRA", seed=77)
    other.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert_same(tensors_of(model), tensors_of(other))


class Plain(torch.nn.Module):
    """A model of one's own that the Trainer can train: it has no save_pretrained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = torch.nn.Embedding(50, 16), torch.nn.BatchNorm1d(16)
        self.inside = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 5))

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.inside(self.norm(self.embed(input_ids).flatten(0, 1))).view(*input_ids.shape, 5)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.inside], ids=["the model", "a part of it"])
def test_a_model_without_save_pretrained(part, tmp_path):
    def begin_plain(seed):
        model = Plain()
        torch.manual_seed(seed)
        adapters = ra.attach(part(model), rank=4, target_modules=["0", "2"])
        return model, ra.RankCallback(adapters, ra.RankBudget(ranks=5, every=2), "adalora")

    model, callback = begin_plain(1)
    make_trainer(model, tmp_path, [callback], **SAVING).train()
    held = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert not any("base_layer" in name for name in held) and ("embed.weight" in held) == (part(model) is not model)
    assert "norm.running_mean" in held
    expected = tensors_of(model)
    model, callback = begin_plain(77)
    make_trainer(model, tmp_path, [callback], steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(tensors_of(model), expected)


class Around(torch.nn.Module):
    """A module of one's own around a PeftModel, as the Trainer takes it: no save_pretrained."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.inside(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def make_around():
    return Around(peft_of(make_bert(), 4, 8, target_modules=["query", "value"]))


AROUND = ra.RankBudget(ranks=7, every=2)


@pytest.mark.parametrize("step", [6, 9, 12], ids=["while ranks are chosen", "after the freeze", "at the end"])
def test_a_module_around_a_peft_model_stays_whole_and_resumes(step, around, tmp_path):
    folder, expected = around
    file = folder / f"checkpoint-{step}" / "model.safetensors"
    assert not is_trained_state(file) and any("base_layer" in name for name in load_file(file))
    model = make_around()
    trainer = make_trainer(model, tmp_path, [ra.RankCallback(budget=AROUND)], steps=12)
    trainer.train(resume_from_checkpoint=str(file.parent))
    assert_same(tensors_of(model), expected)


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """(folder, trained weights) of a run of a module around a PeftModel, with some ranks chosen by step 6."""
    folder, model = tmp_path_factory.mktemp("around"), make_around()
    callback = ra.RankCallback(budget=AROUND)
    make_trainer(model, folder, [callback], steps=12, save_strategy="steps", save_steps=3).train()
    assert 6 < callback.controller.schedule.freeze_step <= 9
    return folder, tensors_of(model)


def test_a_whole_transformers_model_around_an_adapted_part_stays_whole(base, tmp_path):
    def begin_part(seed):
        model = bert(base)
        torch.manual_seed(seed)
        return model, [ra.RankCallback(ra.attach(model.bert, rank=4), ra.RankBudget(fraction=0.4, every=2))]

    model, callbacks = begin_part(1)
    make_trainer(model, tmp_path, callbacks, **SAVING).train()
    expected = tensors_of(model)
    assert not is_trained_state(tmp_path / "checkpoint-6" / "model.safetensors")
    model, callbacks = begin_part(77)
    make_trainer(model, tmp_path, callbacks, steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(tensors_of(model), expected)


def test_a_final_folder_is_an_adapter_alone(base, tmp_path):
    model, _, callbacks = begin(base, "chosen ranks")
    trainer = make_trainer(model, tmp_path, callbacks, steps=12)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), **CLOSE)
