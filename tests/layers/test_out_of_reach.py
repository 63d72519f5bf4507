"""Layers that an adapter would not reach: found, left out by default and said, refused when they are named."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.layers.out_of_reach import out_of_reach
from tests.support.architectures import ARCHITECTURES


class Reads(nn.Module):
    """Reads a weight and never calls its layer; reads another's type and calls it."""

    def __init__(self):
        super().__init__()
        self.mixed, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(F.linear(x, self.mixed.weight).to(self.called.weight.dtype))


class Both(Reads):
    """One way to compute reads the weight, another calls the layer."""

    def forward(self, x):
        return self.mixed(x) if x.dim() > 2 else super().forward(x)


def names_in(model):
    found = out_of_reach(model)
    return {name: found[id(module)] for name, module in model.named_modules() if id(module) in found}


def test_a_layer_that_is_read_and_never_called_is_found_in_the_source():
    assert names_in(Reads()) == {"mixed": "Reads reads this weight directly and would never call an adapter"}
    assert names_in(Both()) == {}
    with pytest.warns(UserWarning, match="mixed is not adapted: Reads reads this weight directly"):
        assert list(ra.attach(Reads(), rank=2).modules) == ["called"]
    with pytest.raises(ra.RankallocError, match="cannot adapt mixed: Reads reads"):
        ra.attach(Reads(), rank=2, target_modules=["mixed"])
    assert not ra.attach(Reads(), rank=2, exclude_modules=["mixed"]).notes


@pytest.mark.parametrize(("name", "left_out"), [
    ("wavlm", {"q_proj", "k_proj", "v_proj", "out_proj"}), ("mamba", {"dt_proj", "out_proj", "conv1d"}),
    ("mamba2", {"out_proj", "conv1d"}), ("jamba", {"dt_proj", "conv1d"}), ("gemma3n", {"correction_coefs"}),
    ("deberta_v2", {"rel_embeddings"}), ("llama", set()), ("t5", set()), ("bloom", set()),
])
def test_what_models_read_directly(name, left_out):
    assert {found.rpartition(".")[2] for found in names_in(ARCHITECTURES[name].build())} == left_out


def test_what_peft_refuses_is_said_with_its_reason():
    with pytest.warns(UserWarning, match="mixer.out_proj and 1 more are not adapted: PEFT refuses .* type mamba2"):
        adapters = ra.attach(ARCHITECTURES["mamba2"].build(), rank=2)
    assert {name.rpartition(".")[2] for name in adapters.modules} == {"in_proj"}


def test_weights_that_a_model_changes_in_evaluation_are_left_out():
    rwkv = ARCHITECTURES["rwkv"]
    assert names_in(rwkv.build()) == {}  # it has fewer blocks than it counts to
    model = dataclasses.replace(rwkv, options={**rwkv.options, "rescale_every": 1}).build()
    assert set(names_in(model)) == {"rwkv.blocks.1.attention.output", "rwkv.blocks.1.feed_forward.value"}


def test_a_class_without_source_is_taken_as_it_is():
    made: dict = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x @ self.linear.weight", made)
    model = made["Hidden"]()
    model.linear = nn.Linear(8, 8)
    assert names_in(model) == {}
