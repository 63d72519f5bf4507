"""The callback without adapters: it takes over the LoRA layers of the Trainer's model, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import EarlyStoppingCallback, Trainer

import rankalloc as ra
from rankalloc.errors import ConfigError, NotAdaptedError, RankallocError, TargetError
from tests.support.models import assert_same, logits_of, make_llama, tensors_of, token_ids
from tests.support.peft_models import peft_llama, peft_of
from tests.support.training import make_trainer

BUDGET = ra.RankBudget(ranks=20, every=2)


def causal():
    return [{"input_ids": row, "labels": row.clone()} for row in token_ids(5, 64)]


def trainer_of(folder, model=None, callback=None, extra=(), **settings):
    callback = callback or ra.RankCallback(budget=BUDGET)
    settings = {"save_strategy": "steps", "save_steps": 4, "data": causal(), **settings}
    if "model_init" in settings:
        settings["trainer_class"] = partial(Trainer, model_init=settings.pop("model_init"))
        return make_trainer(None, folder, [callback, *extra], **settings), callback
    return make_trainer(model or peft_llama(), folder, [callback, *extra], **settings), callback


def bases_in(folder):
    """Every tensor in any file of weights that is not LoRA's."""
    found = set()
    for file in folder.rglob("*.safetensors"):
        if file.name != "rankalloc_state.safetensors":
            with safe_open(file, "pt") as opened:
                found |= {key for key in opened.keys() if "lora_" not in key}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, trained model's weights, its logits) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = trainer_of(folder)
    trainer.train()
    trainer.save_model(folder / "final")
    assert sum(callback.adapters.ranks().values()) == 20
    return folder, tensors_of(trainer.model), logits_of(trainer.model)


def test_one_line_ends_on_the_budget_and_the_folder_is_a_plain_peft_adapter(whole):
    folder, _, logits = whole
    assert torch.equal(logits_of(PeftModel.from_pretrained(make_llama(), folder / "final")), logits)
    written = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    trace = ra.RankTrace.load(folder / "trace.json")
    assert sum(trace.final_ranks) == 20 and trace.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert len(trace.singular_values) == 14
    assert bases_in(folder) == set()
    assert (folder / "checkpoint-20" / "adapter_model.safetensors").stat().st_size < (
        folder / "checkpoint-4" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("step", [4, 8, 16])
def test_a_run_resumes_to_the_bit_before_during_and_after_the_schedule(whole, step, tmp_path):
    folder, weights, _ = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer, callback = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same(tensors_of(trainer.model), weights)
    assert callback.trace.final_ranks == ra.RankTrace.load(folder / "trace.json").final_ranks


def test_a_checkpoint_elsewhere_is_found(whole, tmp_path):
    folder, weights, _ = whole
    trainer, _ = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same(tensors_of(trainer.model), weights)


def test_the_best_model_is_one_that_meets_the_budget(tmp_path):
    trainer, callback = trainer_of(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, eval_dataset=causal()[:16],
        metric_for_best_model="loss", greater_is_better=True,  # early checkpoints look best
    )
    trainer.train()
    assert sum(callback.adapters.ranks().values()) == sum(a.rank for a in callback.adapters) == 20


def test_half_precision_adapters_are_trained_in_float32(tmp_path):
    """As TRL does beside a quantised base, after the model is made and before the callback hears of it."""
    model = peft_llama()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    trainer, callback = trainer_of(tmp_path, model, steps=4, save_strategy="no")
    trainer.train()
    assert {p.dtype for p in callback.adapters.parameters()} == {torch.float32}
    ours = ra.attach(make_llama(), rank=4)
    ours.model.bfloat16()
    callback = ra.RankCallback(ours, BUDGET)
    trainer_of(tmp_path, ours.model, callback, steps=4, save_strategy="no")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


class Casting(Trainer):
    """Casts what is trained to bfloat16 while it is made, as TRL does beside a quantised base."""

    def __init__(self, model, *args, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        super().__init__(model, *args, **kwargs)


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("made, adopted, given, trained", [
    (HALF, None, {}, HALF), (FULL, None, {}, FULL), (HALF, FULL, {}, FULL), (FULL, HALF, {}, HALF),
    (HALF, None, {"dtype": FULL}, FULL), (FULL, FULL, {"dtype": None}, HALF), (FULL, FULL, {"dtype": HALF}, HALF),
])
def test_layers_train_as_adopt_was_told_unless_the_callback_is(made, adopted, given, trained, tmp_path):
    model = peft_llama()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(made)
    adapters = ra.adopt(model, dtype=adopted)
    before = [p.detach().clone() for p in adapters.parameters()]
    callback = ra.RankCallback(adapters, BUDGET, **given)
    trainer_of(tmp_path, model, callback, trainer_class=Casting, save_strategy="no")
    assert {p.dtype for p in adapters.parameters()} == {trained}
    if trained == FULL:  # the very numbers, and not what the cast has rounded
        assert all(torch.equal(p, exact.float()) for p, exact in zip(adapters.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", torch.int8, 32])
def test_a_dtype_that_nothing_trains_in_is_refused(dtype):
    with pytest.raises(ConfigError, match="torch.float32"):
        ra.RankCallback(budget=BUDGET, dtype=dtype)


@pytest.mark.parametrize("method", ["auto", "gradient-share"])
def test_a_model_that_the_trainer_makes_anew_is_adopted_anew(method, tmp_path):
    callback = ra.RankCallback(budget=BUDGET, method=method)
    trainer, _ = trainer_of(tmp_path, callback=callback, model_init=lambda: peft_llama(), steps=8, save_strategy="no")
    results = []
    for _ in range(2):
        trainer.train()
        assert sum(callback.adapters.ranks().values()) == 20 and callback.trace.steps_done == 8
        assert any(module is next(iter(callback.adapters)).layer for module in trainer.model.modules())
        results.append(tensors_of(trainer.model))
    assert_same(*results)


def test_one_callback_serves_a_second_trainer_which_resumes(whole, tmp_path):
    folder, weights, _ = whole
    trainer, callback = trainer_of(tmp_path / "first", steps=4, save_strategy="no")
    trainer.train()
    again, _ = trainer_of(tmp_path / "second", callback=callback)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same(tensors_of(again.model), weights)


@pytest.mark.parametrize("make", [
    lambda folder, callback: trainer_of(folder, peft_llama(), callback),  # a second model
    lambda folder, callback: trainer_of(folder, callback=callback, model_init=lambda: peft_llama()),
    lambda folder, callback: trainer_of(folder, ra.attach(make_llama(), rank=4).model, callback),
])
@pytest.mark.parametrize("adapters", [lambda: ra.adopt(peft_llama()), lambda: ra.attach(make_llama(), rank=4)])
def test_adapters_of_another_model_are_refused_before_the_first_step(make, adapters, tmp_path):
    trainer, callback = make(tmp_path, ra.RankCallback(adapters(), BUDGET))
    words = "^the adapters of this RankCallback are not in the Trainer's model[^\n]*$"
    with pytest.raises(NotAdaptedError, match=words):
        trainer.train()
    assert callback.controller is None and not list(tmp_path.iterdir())


def test_a_checkpoint_in_a_model_made_anew_is_refused(tmp_path):
    trainer_of(tmp_path, save_steps=1)[0].train()
    trainer, callback = trainer_of(tmp_path, model_init=lambda: peft_llama())
    with pytest.raises(NotAdaptedError, match=r"Trainer\(model=\.\.\.\) instead of model_init"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # of full ranks


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    late = ra.RankCallback(budget=BUDGET)
    trainer.callback_handler.callbacks = []
    trainer.add_callback(late)
    with pytest.raises(NotAdaptedError, match="callbacks=.*too late.*adopt"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("make, words", [
    (make_llama, "no LoRA layers"), (lambda: ra.attach(make_llama(), rank=2).model, "rankalloc's own adapters"),
    (lambda: peft_llama(use_dora=True), "DoRA"), (lambda: peft_llama(init_lora_weights="pissa"), "pissa"),
])
def test_a_model_that_cannot_be_driven_is_refused_when_the_trainer_is_made(make, words, tmp_path):
    with pytest.raises(TargetError, match=words):
        trainer_of(tmp_path, make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [None, 0.25, {"ranks": 5}])
def test_a_callback_needs_a_budget(budget):
    with pytest.raises(ConfigError, match=r"budget=rankalloc\.RankBudget"):
        ra.RankCallback(budget=budget)


@pytest.mark.parametrize("options, words", [
    ({"method": "autoo"}, "auto"), ({"budget": ra.RankBudget(ranks=57)}, "56"), ({"beta": 2}, "beta"),
    ({"method": "sora"}, "sora"), ({"method": "dylora"}, "attach"), ({"adapter_name": "other"}, "default"),
])
def test_what_cannot_run_is_refused_before_training(options, words, tmp_path):
    with pytest.raises(RankallocError, match=words):
        trainer_of(tmp_path, callback=ra.RankCallback(**{"budget": BUDGET, **options}))


EARLY = ["uniform", "eva", "gora", "fim", "gradient-share", "effective-rank", "module-types"]


@pytest.mark.parametrize("method", [*EARLY[:3], *(pytest.param(m, marks=pytest.mark.long) for m in EARLY[3:])])
def test_methods_that_choose_before_training_plan_for_the_layers_of_a_peft_model(method, tmp_path):
    options = {"weights": {"q_proj": 2.0}} if method == "module-types" else {}
    callback = ra.RankCallback(budget=BUDGET, method=method, **options)
    trainer, _ = trainer_of(tmp_path, callback=callback, steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert sum(callback.adapters.ranks().values()) == sum(a.rank for a in callback.adapters) == 20
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "final")
    assert torch.equal(logits_of(again), logits_of(trainer.model))


@pytest.mark.parametrize("method", ["auto", "singular-value", "first-order"])
def test_a_run_that_stops_early_meets_the_budget_on_its_weights(method, tmp_path):
    trainer, callback = trainer_of(
        tmp_path, callback=ra.RankCallback(budget=BUDGET, method=method), extra=[EarlyStoppingCallback(1)],
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, eval_dataset=causal()[:16],
        metric_for_best_model="loss", greater_is_better=True, steps=40,
    )
    trainer.train()
    assert trainer.state.global_step < 28  # before the freeze
    assert sum(callback.adapters.ranks().values()) == sum(a.rank for a in callback.adapters) == 20


def test_a_model_of_unlike_layers(tmp_path):
    torch.manual_seed(0)
    model = peft_of(make_llama(), 4, 8, target_modules=["embed_tokens", "q_proj", "down_proj"])
    trainer, callback = trainer_of(
        tmp_path, model, ra.RankCallback(budget=ra.RankBudget(params=1000, every=2)), steps=8, save_strategy="no"
    )
    trainer.train()
    assert 1000 - 96 < callback.adapters.num_params() <= 1000
    assert [layer.kind for layer in callback.trace.layers][:2] == ["embedding", "linear"]


def test_a_checkpoint_from_before_a_layer_lost_its_last_rank_brings_it_back(tmp_path):
    """PEFT maps a file's keys by the model's state dict, where layers without a rank are left out."""
    model = peft_of(make_llama(), 4, 8)
    adapters = ra.adopt(model)
    with torch.no_grad():
        for adapter in adapters:
            adapter.P.normal_()
    model.save_pretrained(tmp_path)
    expected = logits_of(model)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=0), total_steps=1)
    model.train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    controller.observe()
    controller.update(optimizer)
    assert sum(adapter.rank for adapter in adapters) == 0
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {adapter.rank for adapter in adapters} == {4} and torch.equal(logits_of(model), expected)
