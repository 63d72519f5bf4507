"""A rank state that is refused has changed nothing, and one of layers that were scaled otherwise is refused."""

from __future__ import annotations

import json

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.training import resuming
from tests.support.models import make_bert
from tests.support.peft_models import peft_mlp, peft_of
from tests.support.training import STEPS, make_trainer, train_mlp


def without_a_tensor(tensors, meta):
    del tensors[next(reversed(tensors))]


def with_a_tensor_of_another_shape(tensors, meta):
    tensors[next(reversed(tensors))] = torch.zeros(1, 1)


def with_a_mask_too_few(tensors, meta):
    meta["kept"].pop()


def with_a_mask_of_another_rank(tensors, meta):
    meta["kept"][-1].append(True)


def driven():
    """A controller over a PeftModel's layers whose masks are not all true, after a few steps."""
    model = peft_mlp()
    adapters = ra.adopt(model)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5, every=2), STEPS, "first-order", shrink="freeze")
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 9)
    return adapters, controller


@pytest.mark.parametrize("load", [resuming.restore, resuming.adopt_scores])
@pytest.mark.parametrize(
    "damage", [without_a_tensor, with_a_tensor_of_another_shape, with_a_mask_too_few, with_a_mask_of_another_rank]
)
def test_a_state_that_is_refused_has_changed_nothing(damage, load):
    adapters, controller = driven()
    saved = controller.state_dict()
    tensors, meta = dict(saved["tensors"]), json.loads(saved["meta"])
    assert not all(all(mask) for mask in meta["kept"])
    damage(tensors, meta)
    for adapter in adapters:
        adapter.kept = torch.ones(adapter.rank, dtype=torch.bool)
    state = controller.state
    before = dict(vars(state)), state.trace.model_dump()
    with pytest.raises(RankallocError, match="^cannot resume: the rank state [^\n]*$"):
        load(state, {"tensors": tensors, "meta": json.dumps(meta)})
    assert all(adapter.kept.all() for adapter in adapters)
    assert (vars(state), state.trace.model_dump()) == before


def test_another_scaling_of_single_layers_is_refused():
    _, controller = driven()
    saved = controller.state_dict()
    for factor, changed in ((2.0, [0]), (0.5, [2]), (3.0, [1, 2])):
        adapters, again = driven()
        for index in changed:
            list(adapters)[index].scaling *= factor
        name, more = list(adapters.modules)[changed[0]], r" \(and of 2 layers in all\);" if changed[1:] else ";"
        words = f"scaling of {name} was 1 and now is {factor:g}{more}[^\n]*alpha_pattern"
        with pytest.raises(RankallocError, match=words):
            again.load_state_dict(saved)
    meta = json.loads(saved["meta"])
    del meta["scalings"]  # as 0.1 wrote it
    again.load_state_dict({**saved, "meta": json.dumps(meta)})
    assert again.step == 9


def test_an_alpha_pattern_that_was_changed_is_told_when_a_trainer_resumes(tmp_path):
    def trainer_with(**pattern):
        model = peft_of(make_bert(), 4, 8, target_modules=["query", "value"], **pattern)
        return make_trainer(model, tmp_path, [ra.RankCallback(budget=ra.RankBudget(ranks=7))], **settings)

    settings = {"save_strategy": "steps", "save_steps": 3, "steps": 6}
    trainer_with(alpha_pattern={"query": 16}).train()
    again = trainer_with(alpha_pattern={"value": 16})
    with pytest.raises(RankallocError, match="scaling of bert.*query was 4 and now is 2.*of 4 layers"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
