"""The callback in real Trainers: accumulation, clipping, checkpointing, bf16, the best model, and what goes wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import rankalloc as ra
from rankalloc.errors import BudgetError, ConfigError, NotAdaptedError, RankallocError
from rankalloc.training.checkpoints import STATE_NAME, load_state
from tests.support.models import (
    LABELS,
    assert_same,
    logits_of,
    make_bert,
    make_gpt2,
    make_llama,
    tensors_of,
    token_data,
    token_ids,
)
from tests.support.runs import meets_budget
from tests.support.training import make_trainer

BUDGET = ra.RankBudget(ranks=20, every=2)


def begin(budget=BUDGET, model=None, rank=4, **options):
    model = make_bert() if model is None else model
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=rank)
    return model, adapters, ra.RankCallback(adapters, budget, **{"method": "adalora", **options})


def run(folder, budget=BUDGET, options=None, make=make_bert, **settings):
    model, adapters, callback = begin(budget, make(), **(options or {}))
    make_trainer(model, folder, [callback], **settings).train()
    return model, adapters, callback


def test_a_trainer_run_ends_on_the_budget_with_its_trace(tmp_path):
    model, adapters, callback = run(tmp_path)
    trace = ra.RankTrace.load(tmp_path / "trace.json")
    assert sum(adapters.ranks().values()) == 20 == sum(trace.final_ranks)
    assert {a.rank for a in adapters} != {4} and trace.finished and trace.steps_done == 20
    assert [a.step for a in trace.allocations] == [3, 5, 7, 9, 11, 13, 14]
    assert trace.seed == 11 and trace.heads == {"classifier": 33 * LABELS}
    assert trace.allocations == callback.trace.allocations
    losses = [log.values["loss"] for log in trace.logs if "loss" in log.values]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])


def causal(vocab_rows=64):
    return [{"input_ids": i, "labels": i.clone()} for i in token_ids(5, vocab_rows)]


@pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=["conv1d", "tied embeddings"])
def test_causal_models(make, tmp_path):
    _, adapters, callback = run(tmp_path, ra.RankBudget(fraction=0.4, every=2), make=make, data=causal())
    assert meets_budget(callback.trace) and adapters.num_params() <= int(0.4 * callback.trace.adapter_params_initial)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    folders = []
    for name in ("a", "b"):
        _, adapters, _ = run(tmp_path / name, options={"orthogonal": 0.2})
        folders.append(ra.save(adapters, tmp_path / name / "adapter"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_accumulation_leaves_the_allocations_as_they_are(tmp_path):
    """Eight examples a step in 1, 2 or 4 pieces: the same gradients, so the same choices.

    In double precision, so that the order of summation decides no near tie.
    """
    data, seen = token_data(), []
    for size, pieces in ((8, 1), (4, 2), (2, 4)):
        model, adapters, callback = begin(orthogonal=0.5)
        model.double()
        make_trainer(
            model, tmp_path / str(size), [callback], data=data, per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
        ).train()
        seen.append(([a.ranks for a in callback.trace.allocations], callback.trace.scores))
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert len(set(seen[0][0][-1])) > 1
    for _, scores in seen[1:]:
        for kept, reference in zip(scores.kept, seen[0][1].kept, strict=True):
            assert kept == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True}, {"max_grad_norm": 0.1}, {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"}, {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"compute_loss_func": lambda out, labels, num_items_in_batch=None: torch.nn.functional.cross_entropy(
            out["logits"].flatten(0, 1), labels.flatten())},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items() if k != "compute_loss_func") or "own loss",
)
def test_settings_a_trainer_has(settings, tmp_path):
    model, adapters, callback = run(tmp_path, **settings)
    assert sum(adapters.ranks().values()) == 20 and not callback.trace.alerts and not callback.trace.nonfinite_steps
    assert {a.live_rank == a.rank for a in adapters} == {True}
    assert all(torch.isfinite(p).all() for p in adapters.parameters())
    assert any(len(set(s)) > 1 for s in callback.trace.scores.kept if s)


def test_checkpointed_activations_change_no_choice(tmp_path):
    plain = run(tmp_path / "a")[2].trace
    saving = run(tmp_path / "b", gradient_checkpointing=True)[2].trace
    assert [a.ranks for a in plain.allocations] == [a.ranks for a in saving.allocations]


def test_torchs_adafactor(tmp_path):
    model, adapters, callback = begin()
    optimizer = torch.optim.Adafactor(adapters.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    make_trainer(model, tmp_path, [callback], optimizers=(optimizer, schedule)).train()
    assert sum(a.rank for a in adapters) == 20


def test_shapes_stay_if_asked(tmp_path):
    kept = run(tmp_path / "a", options={"shrink": False}, max_grad_norm=0.0)
    gone = run(tmp_path / "b", max_grad_norm=0.0)
    assert {a.rank for a in kept[1]} == {4} and kept[1].ranks() == gone[1].ranks()
    torch.testing.assert_close(logits_of(kept[0]), logits_of(gone[0]), rtol=1e-4, atol=1e-5)


# --- the best model --------------------------------------------------------------------------------------------


class Scored(Trainer):
    """Evaluations that get worse with every step, so the earliest checkpoint that may win does."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def test_only_checkpoints_that_meet_the_budget_compete_for_the_best(tmp_path):
    model, adapters, callback = begin()
    trainer = make_trainer(
        model, tmp_path, [callback], trainer_class=Scored, eval_dataset=token_data(16), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    assert callback.controller.schedule.freeze_step == 14
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-14")
    assert sum(adapters.ranks().values()) == 20 == sum(a.rank for a in adapters)
    other, fresh, _ = begin()
    other.load_state_dict(load_file(tmp_path / "checkpoint-14" / "model.safetensors"))
    assert_same(tensors_of(model), tensors_of(other))


@pytest.mark.parametrize("method", ["adalora", "auto", "singular-value", "first-order", "elalora"])
def test_early_stopping_before_the_freeze_still_meets_the_budget_and_says_so(method, tmp_path):
    model, adapters, callback = begin(method=method)
    make_trainer(
        model, tmp_path, [callback, EarlyStoppingCallback(2)], trainer_class=Scored, eval_dataset=token_data(16),
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    ).train()
    trace = ra.RankTrace.load(tmp_path / "trace.json")
    assert trace.steps_done == 6 and "training ended after step 6, before the freeze" in trace.alerts[-1]
    assert sum(adapters.ranks().values()) == 20 == sum(a.rank for a in adapters) == sum(trace.final_ranks)
    # the best weights are those of step 2, cut by the scores that they had there
    assert "the best checkpoint, of step 2" in trace.alerts[0]
    other, others, _ = begin(method=method)
    other.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    alone = ra.RankController(others, BUDGET, 20, method, seed=11, fresh=False)
    load_state(alone, tmp_path / "checkpoint-2" / STATE_NAME)
    alone.finish(optimizer=torch.optim.SGD(others.parameters(), lr=0.0))
    assert_same(tensors_of(model), tensors_of(other))
    assert len(set(adapters.ranks().values())) > 1


def test_a_best_checkpoint_from_before_the_freeze_does_not_survive_a_resume(tmp_path):
    settings = {
        "trainer_class": Scored, "eval_dataset": token_data(16), "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    model, adapters, callback = begin()
    make_trainer(model, tmp_path, [callback], **settings).train()
    model, adapters, callback = begin()
    trainer = make_trainer(model, tmp_path, [callback], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-14")
    assert sum(a.rank for a in adapters) == 20


# --- what goes wrong -------------------------------------------------------------------------------------------


class Deaf(Trainer):
    """A Trainer whose own loop forgets the optimizer's hooks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        handler = self.callback_handler
        handler.on_pre_optimizer_step = handler.on_optimizer_step = lambda args, state, control: control


def test_a_trainer_that_never_calls_the_hooks_is_an_error_at_the_end(tmp_path):
    model, adapters, callback = begin()
    with pytest.raises(NotAdaptedError, match="never were"):
        make_trainer(model, tmp_path, [callback], trainer_class=Deaf, steps=3).train()
    for act in (lambda: ra.save(adapters, tmp_path / "a"), lambda: ra.merge(adapters), lambda: callback.trace.name):
        with pytest.raises(NotAdaptedError):
            act()


def test_a_callback_that_no_trainer_got_is_an_error_when_the_adapters_are_used(tmp_path):
    model, adapters, callback = begin()
    make_trainer(model, tmp_path, steps=2).train()
    for act in (lambda: ra.save(adapters, tmp_path / "a"), lambda: ra.merge(adapters), lambda: callback.trace):
        with pytest.raises(NotAdaptedError, match="callbacks="):
            act()
    assert not (tmp_path / "a").exists()


def test_an_optimizer_from_before_attach_is_an_error_at_the_first_step(tmp_path):
    model = make_bert()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = ra.RankCallback(ra.attach(model, rank=4), BUDGET)
    schedule = torch.optim.lr_scheduler.ConstantLR(early, 1.0)
    with pytest.raises(NotAdaptedError, match="after rankalloc.attach"):
        make_trainer(model, tmp_path, [callback], optimizers=(early, schedule)).train()
    assert callback.controller.step == 0


class Sketching(torch.optim.SGD):
    """An optimizer whose state has a shape of its own."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sketch"] = torch.zeros(3, 3)
        return super().step(closure)


def test_an_optimizer_whose_state_cannot_shrink_is_told_at_the_first_step(tmp_path):
    model, adapters, callback = begin()
    optimizer = Sketching(adapters.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    with pytest.raises(RankallocError, match="Sketching keeps sketch"):
        make_trainer(model, tmp_path, [callback], optimizers=(optimizer, schedule)).train()
    assert callback.controller.step == 0


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (BudgetError, {"budget": ra.RankBudget(ranks=49)}, "above the 48"),
        (ConfigError, {"method": "adaLora"}, "did you mean 'adalora'"),
        (ConfigError, {"beta": 0.5}, "unknown option"),
        (ConfigError, {"beta1": 2}, "beta1"),
    ],
)
def test_bad_settings_are_told_before_training(error, options, words):
    with pytest.raises(error, match=words):
        begin(**options)


def test_a_gradient_that_is_not_finite_is_counted_and_training_goes_on(tmp_path):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.zero_()
                model.classifier.weight.grad[0, 0] = float("inf")

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                model.classifier.weight.data.nan_to_num_(0.0, 0.0, 0.0)

    model, adapters, callback = begin()
    make_trainer(model, tmp_path, [Poison(), callback], optim="sgd").train()
    assert callback.trace.nonfinite_steps == [5]
    assert json.loads((tmp_path / "trace.json").read_text())["nonfinite_steps"] == [5]
    assert sum(adapters.ranks().values()) == 20


def test_training_again_with_the_same_callback_keeps_the_budget(tmp_path):
    model, adapters, callback = begin(ra.RankBudget(params=1500, every=2))
    trainer = make_trainer(model, tmp_path, [callback])
    trainer.train()
    ranks = adapters.ranks()
    trainer.train()
    assert adapters.ranks() == ranks


