"""An interrupted Trainer run goes on bit for bit, wherever it was cut."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import rankalloc as ra
from rankalloc.errors import AdapterFileError, RankallocError
from rankalloc.training.checkpoints import STATE_NAME
from tests.support.models import assert_same, make_bert, make_gpt2, tensors_of, token_data, token_ids
from tests.support.training import make_trainer

BUDGET = ra.RankBudget(ranks=20, every=2)
SETTINGS = {"save_strategy": "steps", "save_steps": 1, "steps": 20}


def begin(budget=BUDGET, dropout=0.1, make=None, attach=None, seed=1, **options):
    model = make() if make else make_bert(dropout=dropout)
    torch.manual_seed(seed)
    adapters = ra.attach(model, **{"rank": 4, "dropout": dropout, **(attach or {})})
    return model, adapters, ra.RankCallback(adapters, budget, **{"method": "adalora", **options})


def outcome(model, callback):
    trace = callback.trace
    return tensors_of(model), trace.allocations, trace.scores, trace.singular_values, [
        (log.step, log.values["loss"]) for log in trace.logs if "loss" in log.values
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with a checkpoint after every step: (folder, its outcome)."""
    folder = tmp_path_factory.mktemp("whole")
    model, adapters, callback = begin()
    make_trainer(model, folder, [callback], **SETTINGS).train()
    assert callback.controller.schedule.freeze_step == 14 and sum(adapters.ranks().values()) == 20
    return folder, outcome(model, callback)


def assert_equal_outcome(got, expected):
    assert_same(got[0], expected[0])
    assert got[1:] == expected[1:]


@pytest.mark.parametrize("cut", [1, 7, 14, 17])
def test_before_while_and_after_ranks_are_chosen(whole, cut, tmp_path):
    model, adapters, callback = begin(seed=77)
    shutil.copytree(whole[0] / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    trainer = make_trainer(model, tmp_path, [callback], steps=20)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert_equal_outcome(outcome(model, callback), whole[1])


def test_the_latest_checkpoint_by_itself(whole, tmp_path):
    for cut in (5, 9):
        shutil.copytree(whole[0] / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    model, _, callback = begin(seed=77)
    trainer = make_trainer(model, tmp_path, [callback], steps=20)
    trainer.train(resume_from_checkpoint=True)
    assert_equal_outcome(outcome(model, callback), whole[1])


class OwnLoop(Trainer):
    """A Trainer whose training loop has another name than transformers'."""

    _inner_training_loop = types.FunctionType(
        Trainer._inner_training_loop.__code__.replace(co_name="loop"), Trainer._inner_training_loop.__globals__,
        argdefs=Trainer._inner_training_loop.__defaults__,
    )


def test_a_checkpoint_that_was_moved(whole, tmp_path):
    moved = tmp_path / "elsewhere" / "my-checkpoint"
    shutil.copytree(whole[0] / "checkpoint-9", moved)
    # another run's checkpoint of the same step lies where a resumed run's usually does
    shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "out" / "checkpoint-9")
    for trainer_class, options in ((Trainer, {}), (OwnLoop, {"resume_from": moved})):
        model, _, callback = begin(seed=77, **options)
        trainer = make_trainer(model, tmp_path / "out", [callback], steps=20, trainer_class=trainer_class)
        trainer.train(resume_from_checkpoint=str(moved))
        assert_equal_outcome(outcome(model, callback), whole[1])
    shutil.rmtree(tmp_path / "out")
    model, _, callback = begin(seed=77)
    trainer = make_trainer(model, tmp_path / "out", [callback], steps=20, trainer_class=OwnLoop)
    with pytest.raises(AdapterFileError, match="resume_from="):
        trainer.train(resume_from_checkpoint=str(moved))


@pytest.mark.parametrize(
    ("budget", "cut"),
    [
        (ra.RankBudget(params=1500, every=2), 16), (ra.RankBudget(fraction=0.4, every=3, min_rank=1), 15),
        (ra.RankBudget(bytes=6000, every=2, multiple_of=2), 18), (ra.RankBudget(ranks=0, every=2), 15),
    ],
    ids=["params", "fraction with a floor", "bytes in blocks", "nothing left"],
)
def test_other_budgets_after_the_freeze(budget, cut, tmp_path):
    model, adapters, callback = begin(budget)
    make_trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=cut).train()
    expected = outcome(model, callback)
    assert all(a.rank == a.live_rank for a in adapters)
    model, _, callback = begin(budget, seed=77)
    make_trainer(model, tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert_equal_outcome(outcome(model, callback), expected)


@pytest.mark.parametrize(
    ("options", "cut"), [({"shrink": False}, 16), ({"orthogonal": 0.3, "beta1": 0.9}, 7)],
    ids=["held at zero", "options"],
)
def test_options_come_along(options, cut, tmp_path):
    model, _, callback = begin(**options)
    make_trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=cut).train()
    expected = outcome(model, callback)
    model, _, callback = begin(seed=77, **options)
    make_trainer(model, tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert_equal_outcome(outcome(model, callback), expected)


def test_gpt2_with_tied_embeddings(tmp_path, cut=16):
    data = [{"input_ids": i, "labels": i.clone()} for i in token_ids(5, 64)]
    budget = ra.RankBudget(ranks=11, every=2)
    model, _, callback = begin(budget, dropout=0.0, make=make_gpt2)
    make_trainer(model, tmp_path, [callback], data=data, save_strategy="steps", save_steps=cut).train()
    expected = outcome(model, callback)
    model, _, callback = begin(budget, dropout=0.0, make=make_gpt2, seed=77)
    trainer = make_trainer(model, tmp_path, [callback], data=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert_equal_outcome(outcome(model, callback), expected)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"budget": ra.RankBudget(ranks=21, every=2)}, {}, "target was 20 and now is 21"),
        ({"budget": ra.RankBudget(ranks=20, every=4)}, {}, "every was 2 and now is 4"),
        ({}, {"steps": 30}, "total_steps was 20 and now is 30) from step 9: ranks are final from step 14 on"),
        ({}, {"steps": 12}, "total_steps was 20 and now is 12) from step 9"),
        ({}, {"steps": 6}, "9 steps have been trained, and this run is to end after 6"),
        ({"method": "uniform"}, {}, "began with method 'adalora'"),
        ({"beta2": 0.5}, {}, "beta2"),
        ({"attach": {"alpha": 3}}, {}, "scaling"),
    ],
    ids=["budget", "interval", "longer", "shorter", "past the end", "method", "option", "alpha"],
)
def test_other_settings_are_refused(whole, change, settings, words, tmp_path):
    model, _, callback = begin(**change)
    shutil.copytree(whole[0] / "checkpoint-9", tmp_path / "checkpoint-9")
    trainer = make_trainer(model, tmp_path, [callback], **{"steps": 20, **settings})
    with pytest.raises(RankallocError) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert words in str(caught.value) and "cannot resume" in str(caught.value) and "\n" not in str(caught.value)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_the_checkpoint_of_the_last_step_nothing_is_trained_or_saved(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-20", tmp_path / "checkpoint-20")
    before = contents(tmp_path / "checkpoint-20")
    for _ in range(2):
        model, _, callback = begin(seed=77)
        trainer = make_trainer(model, tmp_path, [callback], **SETTINGS, eval_strategy="steps", eval_steps=1,
                               eval_dataset=token_data(8))
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 20 == callback.trace.steps_done
        assert_equal_outcome(outcome(model, callback), whole[1])
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "trace.json"}
        assert contents(tmp_path / "checkpoint-20") == before


def test_nor_at_the_end_of_the_epoch_that_the_last_step_was_inside(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-20", tmp_path / "checkpoint-20")
    before = contents(tmp_path / "checkpoint-20")
    model, _, callback = begin(seed=77)
    by_epoch = {f"{what}_strategy": "epoch" for what in ("save", "eval", "logging")}
    trainer = make_trainer(model, tmp_path, [callback], steps=20, **by_epoch, eval_dataset=token_data(8))
    trainer.train(resume_from_checkpoint=True)
    assert contents(tmp_path / "checkpoint-20") == before
    told = json.loads(before[Path("trainer_state.json")])
    assert told["epoch"] % 1 and trainer.state.epoch == told["epoch"] and trainer.state.global_step == 20
    assert [log["step"] for log in trainer.state.log_history[len(told["log_history"]):]] == [20]  # the summary
    assert_equal_outcome(outcome(model, callback), whole[1])


@pytest.mark.parametrize(("cut", "steps"), [(20, 26), (14, 26), (17, 18)], ids=["after the end", "longer", "shorter"])
def test_a_run_whose_ranks_are_final_goes_on_for_another_number_of_steps(whole, cut, steps, tmp_path):
    shutil.copytree(whole[0] / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    model, adapters, callback = begin(seed=77)
    make_trainer(model, tmp_path, [callback], **{**SETTINGS, "steps": steps}).train(resume_from_checkpoint=True)
    trace = callback.trace
    assert trace.steps_done == steps and trace.finished and adapters.ranks() == dict(
        zip(adapters.modules, whole[1][1][-1].ranks, strict=True)
    )
    assert trace.budget.total_steps == 20 and f"resumed at step {cut} to end after {steps}" in trace.alerts[0]
    assert [log.step for log in trace.logs if "loss" in log.values] == list(range(1, steps + 1))
    # and once more, from what the longer run saved
    model, _, callback = begin(seed=78)
    again = make_trainer(model, tmp_path, [callback], **{**SETTINGS, "steps": steps})
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps - (steps > cut + 1)}"))
    assert callback.trace.steps_done == steps and callback.trace.allocations == trace.allocations


def test_ranks_that_were_chosen_before_training_are_final_at_every_step(tmp_path):
    options = {"method": "module-types", "weights": {"query": 2}, "attach": {"init": ra.METHODS["module-types"].init}}
    model, adapters, callback = begin(**options)
    make_trainer(model, tmp_path, [callback], **{**SETTINGS, "steps": 3}).train()
    ranks = adapters.ranks()
    model, adapters, callback = begin(seed=77, **options)
    make_trainer(model, tmp_path, [callback], steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert callback.trace.steps_done == 6 and adapters.ranks() == ranks and sum(ranks.values()) == 20


def missing(state):
    state.unlink()


def truncated(state):
    state.write_bytes(state.read_bytes()[:-100])


def foreign(state):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, state)


def of_another_step(state):
    shutil.copy(state.parent.parent / "other" / STATE_NAME, state)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "no rank state at"), (truncated, "is damaged"), (foreign, "was not written by rankalloc"),
        (of_another_step, "not those the rank state was saved with"),
    ],
)
def test_a_state_that_is_missing_or_damaged_is_refused(whole, damage, words, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-9", tmp_path / "checkpoint-9")
    shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "other")
    damage(tmp_path / "checkpoint-9" / STATE_NAME)
    model, _, callback = begin()
    with pytest.raises(RankallocError) as caught:
        make_trainer(model, tmp_path, [callback], steps=20).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert words in str(caught.value) and "cannot resume" in str(caught.value) and "\n" not in str(caught.value)


def test_state_files_are_the_same_bytes_for_the_same_run(tmp_path):
    """Apart from the clock: everything that decides how the run goes on."""
    from safetensors.torch import load_file

    states = []
    for name in ("a", "b"):
        model, _, callback = begin()
        make_trainer(model, tmp_path / name, [callback], save_strategy="steps", save_steps=7).train()
        states.append(load_file(tmp_path / name / "checkpoint-7" / STATE_NAME))
        assert len(states[-1]) == 2 * 3 * 12
    assert_same(*states)
