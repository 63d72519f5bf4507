"""The two registries behind "can this layer be adapted?": one entry each is all that a new kind or scheme takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import TargetError
from rankalloc.layers.adaptable import full_weight, is_quantized, kind_of, shape_of, supported, why_not
from rankalloc.layers.kinds import LAYER_KINDS, Kind
from rankalloc.layers.quantized import SCHEMES, Scheme, plain_linear, scheme_of


class Doubled(nn.Module):
    """A layer that nothing here knows: y = 2 W x, W kept transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return 2 * x @ self.weight


class DoubledKind(Kind[Doubled]):
    name = "doubled"
    titles = ("Doubled",)

    def matches(self, module):
        return isinstance(module, Doubled)

    def why_not(self, module):
        return "a Doubled of zeros has nothing to double" if self.matches(module) and not module.weight.any() else None

    def matrix(self, weight):
        return weight.T

    def stored(self, matrix, weight):
        return matrix.T

    def update(self, base, x, q, p):
        return 2 * F.linear(F.linear(x, q), p)


class Halved(nn.Linear):
    """A linear layer whose weight is stored at half its size, in bytes."""

    def __init__(self) -> None:
        super().__init__(4, 6, bias=False)
        self.weight = nn.Parameter(torch.arange(24, dtype=torch.int8).reshape(6, 4), requires_grad=False)

    def forward(self, x):
        return F.linear(x, 2 * self.weight.float())


class HalvedScheme(Scheme):
    name = "halved"
    title = "this test's Halved"

    def matches(self, module):
        return isinstance(module, Halved)

    def dequantized(self, module):
        return 2 * module.weight.float()


def test_a_new_kind_of_layer_is_one_entry(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(Doubled())
    assert kind_of(model[0]) is None and "Doubled is not one of the layers" in why_not(model[0])
    monkeypatch.setitem(LAYER_KINDS, "doubled", DoubledKind())
    assert kind_of(model[0]) == "doubled" and shape_of(model[0]) == (5, 3) and supported().endswith(" and Doubled")
    adapters = ra.attach(model, rank=2, target_modules=["0"])
    nn.init.normal_(adapters.modules["0"].lam)
    x = torch.randn(4, 5)
    before = model(x)
    merged = ra.merge(adapters)
    torch.testing.assert_close(merged(x), before)
    merged[0].weight.data.zero_()
    with pytest.raises(TargetError, match="a Doubled of zeros has nothing to double"):
        ra.attach(merged, rank=2, target_modules=["0"])


def test_a_new_way_to_pack_a_weight_is_one_entry(monkeypatch):
    layer = Halved()
    assert is_quantized(layer) and kind_of(layer) is None and "in a way that is not known" in why_not(layer)
    monkeypatch.setitem(SCHEMES, "halved", HalvedScheme())
    assert scheme_of(layer) == "halved" and kind_of(layer) == "linear" and shape_of(layer) == (4, 6)
    x = torch.randn(3, 4)
    torch.testing.assert_close(F.linear(x, full_weight(layer)), layer(x))
    torch.testing.assert_close(plain_linear(layer)(x), layer(x))


@pytest.mark.parametrize("base", [nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d])
def test_a_derived_layer_that_computes_something_else_is_refused(base):
    class Other(base):
        def forward(self, x):
            return 2 * super().forward(x)

    arguments = (4, 4, 1) if issubclass(base, (nn.Conv1d, nn.Conv2d)) else (4, 4)
    assert kind_of(base(*arguments)) is not None
    assert why_not(Other(*arguments)) == "Other computes its output differently from the layer it is derived from"


def test_a_derived_layer_that_computes_the_same_is_adapted():
    class Same(nn.Conv2d):
        pass

    assert kind_of(Same(2, 2, 1)) == "convolution"
