"""nn.DataParallel is refused in one sentence wherever a run begins; one device, or none, is no reason to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.training.wrappers import wrappers_of
from tests.support.models import make_bert, make_mlp
from tests.support.training import make_trainer, train_mlp

SENTENCE = "DataParallel.*torchrun .*CUDA_VISIBLE_DEVICES=0"


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    """This machine, as if it had two GPUs."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def over_two_devices(model):
    """The wrapper as it is on a machine with two GPUs, but for its replicas, which only exist in a forward pass."""
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    return wrapper


def one_step(adapters, model):
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5), 6)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 1)
    return controller


def test_a_model_that_is_wrapped_is_refused_at_the_first_step():
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    wrapper = over_two_devices(model)
    with pytest.raises(RankallocError, match=SENTENCE):
        one_step(adapters, model)
    assert wrapper.module is model


def test_so_is_one_with_a_wrapped_part():
    model = nn.Sequential(over_two_devices(make_mlp()))
    model[0].device_ids = []
    adapters = ra.attach(model, rank=4)
    model[0].device_ids = [0, 1]
    with pytest.raises(RankallocError, match=SENTENCE):
        one_step(adapters, model[0].module)


def test_the_trainer_is_stopped_before_its_first_step(tmp_path):
    model = make_bert()
    callback = ra.RankCallback(ra.attach(model, rank=4), ra.RankBudget(ranks=20))
    trainer = make_trainer(model, tmp_path, [callback], steps=2)
    wrapper = over_two_devices(model)
    with pytest.raises(RankallocError, match=SENTENCE):
        trainer.train()
    assert callback.controller is None and wrapper.module is model


def test_one_device_is_trained_as_ever():
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = wrapper.device_ids[:1]
    assert one_step(adapters, wrapper).step == 1
    assert wrappers_of([model], nn.DataParallel) == [wrapper] and wrappers_of([make_mlp()], nn.DataParallel) == []
