"""Subclasses of layers are adapted when they compute the same formula, and refused when they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.layers.adaptable import kind_of, why_not
from tests.support.architectures import ARCHITECTURES


class Multiplied(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T if self.bias is None else torch.addmm(self.bias, input, self.weight.T)


class Named(nn.Linear):
    """Calls what it is derived from."""

    def forward(self, x):
        return super().forward(x)


class Traced(nn.Linear):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight, self.bias)


class Looked(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Dropped(nn.Linear):
    def forward(self, x):
        return F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training)


class Clipped(nn.Linear):
    def forward(self, x):
        return F.linear(x.clamp(-6, 6), self.weight, self.bias)


class Widened(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias)


class Added(nn.Linear):
    """Another LoRA, whose update is zero as yet."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low = nn.Parameter(torch.zeros(sizes[1], sizes[0]))

    def forward(self, x):
        return F.linear(x, self.weight + self.low, self.bias)


class Stretched(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


@pytest.mark.parametrize("make", [
    lambda: Multiplied(16, 8), lambda: Multiplied(16, 8, bias=False), lambda: Named(16, 8).bfloat16(),
    lambda: Traced(16, 8), lambda: Multiplied(16, 8, device="meta"), lambda: Looked(16, 8), lambda: Looked(16, 8, 0),
])
def test_the_same_formula_in_other_words_is_adapted(make):
    layer = make()
    state = {name: value.clone() for name, value in layer.state_dict().items() if not value.is_meta}
    assert kind_of(layer) in ("linear", "embedding") and getattr(layer, "calls", 0) == 0 and layer.training
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("make", [
    lambda: Scaled(16, 8), lambda: Dropped(16, 8), lambda: Clipped(16, 8), lambda: Widened(16, 8).bfloat16(),
    lambda: Added(16, 8), lambda: Stretched(16, 8),
])
def test_another_formula_is_refused(make):
    layer = make()
    assert kind_of(layer) is None and "computes its output differently" in why_not(layer)
    with pytest.raises(ra.RankallocError, match=r"cannot adapt 0: \w+ computes its output differently"):
        ra.attach(nn.Sequential(layer, nn.Linear(8, 8)), rank=2, target_modules=["0"])


@pytest.mark.parametrize("make", [lambda: Multiplied(16, 8), lambda: Named(16, 8), lambda: Traced(16, 8)])
def test_an_adapter_around_such_a_layer_adds_its_update_and_merges(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(5, 16)
    adapters = ra.attach(model, rank=2)
    nn.init.normal_(adapters.modules["0"].lam)
    layer, delta = adapters.modules["0"].base_layer, adapters.modules["0"].delta_weight()
    torch.testing.assert_close(model[0](x), F.linear(x, layer.weight + delta, layer.bias))
    expected = model(x)
    ra.merge(adapters)
    torch.testing.assert_close(model(x), expected)


def test_falcon_is_adapted_whole():
    adapters = ra.attach(ARCHITECTURES["falcon"].build(), rank=2)
    assert len(adapters) == 8 and not adapters.notes
