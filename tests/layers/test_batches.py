"""Running a model on batches: on its device, in evaluation mode, and back whatever happens."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

from rankalloc.layers.batches import IGNORED, evaluating, on_device


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_tensors_move_wherever_they_lie_and_the_rest_stays():
    x = torch.ones(2)
    batch = UserDict(x=x, pair=(x, [x, None]), text="word", inner={"n": 3})
    moved = on_device(batch, torch.device("meta"))
    assert moved["x"].device.type == moved["pair"][0].device.type == moved["pair"][1][0].device.type == "meta"
    assert moved["pair"][1][1] is None and moved["text"] == "word" and moved["inner"] == {"n": 3}
    assert on_device(x, torch.device("cpu")) is x


def test_the_ignored_label_is_torchs():
    assert nn.CrossEntropyLoss().ignore_index == IGNORED
