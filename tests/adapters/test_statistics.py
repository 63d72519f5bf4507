"""Layers whose running statistics follow the training data: trained whole and saved, so that the file is enough."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.layers.statistics import with_running_statistics


class Normalised(nn.Module):
    """A linear layer, a normalisation of what it gives, and a head."""

    def __init__(self, norm, *places):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.classifier = nn.Linear(16, 16), norm, nn.Linear(16, 3)
        self.places = places

    def forward(self, x):
        hidden = self.norm(self.linear(x).unflatten(-1, (-1, *self.places)) if self.places else self.linear(x))
        return self.classifier(hidden.flatten(1))


MODELS = {
    "batch": lambda: Normalised(nn.BatchNorm1d(16)),
    "batch of images": lambda: Normalised(nn.BatchNorm2d(4, affine=False), 2, 2),
    "instance": lambda: Normalised(nn.InstanceNorm1d(4, track_running_stats=True), 4),
}


def trained(model, **options):
    adapters = ra.attach(model, rank=4, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    model.train()
    for step in range(4):
        x = 3 + torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapters


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_statistics_travel_with_the_adapter(kind, tmp_path):
    model = MODELS[kind]()
    before = copy.deepcopy(model.norm.running_mean)
    adapters = trained(model)
    assert not torch.equal(model.norm.running_mean, before) and set(adapters.heads) == {"classifier", "norm"}
    assert "are kept by norm: such a layer is trained whole and saved with the adapter" in adapters.notes[0]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    expected = model.eval()(x)
    ra.save(adapters, tmp_path)
    again = MODELS[kind]().eval()
    ra.load(again, tmp_path)
    torch.testing.assert_close(again.eval()(x), expected)
    read = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path)
    torch.testing.assert_close(read.eval()(x), expected)


def test_who_chooses_what_is_saved_is_told():
    with pytest.warns(UserWarning, match="no file will hold them: name such layers in modules_to_save"):
        adapters = ra.attach(MODELS["batch"](), rank=4, modules_to_save=["classifier"])
    assert set(adapters.heads) == {"classifier"}


def test_nothing_is_said_where_no_statistics_change():
    no_statistics = nn.BatchNorm1d(16, track_running_stats=False)
    quiet = [nn.LayerNorm(16), nn.GroupNorm(2, 16), nn.InstanceNorm1d(4), no_statistics]
    for norm in quiet:
        assert not with_running_statistics(Normalised(norm)) and not ra.attach(Normalised(norm), rank=4).notes
    inside = nn.Sequential()
    inside.classifier = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not with_running_statistics(inside, ["classifier"])
