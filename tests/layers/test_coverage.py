"""What becomes of each weight of a model, and the share of linear weights that is adapted."""

from __future__ import annotations

import warnings

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import rankalloc as ra
from rankalloc.cli.output import percent
from rankalloc.layers.coverage import coverage, weights_of
from rankalloc.layers.targets import find_heads, find_targets
from tests.support.architectures import ARCHITECTURES
from tests.support.models import make_bert, make_gpt2, make_llama


def fates_of(model, **options):
    """{name: (fate, whether it counts)} and the coverage, when "all-linear" is adapted."""
    heads = find_heads(model)
    weights = weights_of(model, find_targets(model, "all-linear", heads=heads, **options), heads)
    return {w.name: (w.fate, w.linear) for w in weights}, coverage(weights)


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
def test_all_linear_covers_a_plain_model(make):
    found, share = fates_of(make())
    assert share == 1 and {linear for fate, linear in found.values() if fate == "adapted"} == {True}


def test_heads_embeddings_and_output_heads_do_not_count():
    found, _ = fates_of(make_bert())
    assert found["classifier"] == ("whole", False)
    assert found["bert.embeddings.word_embeddings"] == ("frozen", False)
    tied, _ = fates_of(make_llama())
    assert "lm_head" not in tied and tied["model.embed_tokens"] == ("frozen", False)  # one weight, listed once


def test_what_is_excluded_lowers_the_share():
    found, share = fates_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24)), exclude=["1"])
    assert found == {"0": ("adapted", True), "1": ("frozen", True)} and share == 0.25


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.mixing_weight = nn.Parameter(nn.init.zeros_(nn.Linear(8, 8).weight.detach().clone()))
        self.positions = nn.Parameter(self.mixing_weight.detach().clone())
        self.token = nn.Parameter(self.mixing_weight.detach()[:1].clone())


def test_weights_that_no_adapter_reaches_are_named_with_their_reason():
    found, share = fates_of(Attention())
    assert found["attention.in_proj_weight"] == ("frozen", True) == found["attention.out_proj"] and share == 64 / 320
    weights = {w.name: w for w in weights_of(Attention(), {}, ())}
    assert "packed" in weights["attention.in_proj_weight"].why and "directly" in weights["attention.out_proj"].why
    bare, share = fates_of(Bare())
    assert bare == {"linear": ("adapted", True), "mixing_weight": ("frozen", True), "positions": ("frozen", False)}
    assert share == 0.5


def test_a_parametrized_weight_belongs_to_its_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), parametrizations.spectral_norm(
        nn.Linear(6, 5)), nn.Linear(5, 4))
    found, _ = fates_of(model)
    assert found["0"] == ("frozen", False) and found["2"] == ("adapted", True)
    assert found["1"] == ("adapted", True)


@pytest.mark.parametrize(("name", "words"), [
    ("squeezebert", "only 10 % of this model's linear weights are adapted .*a convolution: adapted if"),
    ("xlnet", "only 44 % .*XLNetRelativeAttention holds it as a parameter of its own"),
])
def test_a_model_of_which_little_is_adapted_is_told(name, words):
    with pytest.warns(UserWarning, match=words):
        ra.attach(ARCHITECTURES[name].build(), rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ra.attach(ARCHITECTURES[name].build(), rank=2, target_modules=["dense" if name[0] == "s" else "layer_1"])
        ra.attach(ARCHITECTURES["convbert"].build(), rank=2)


def test_a_share_is_never_rounded_up_to_all_of_it():
    assert [percent(share) for share in (1.0, 0.99999, 0.9023, 0.0)] == ["100 %", "99.9 %", "90.2 %", "0 %"]
    assert coverage(weights_of(nn.Sequential(nn.Conv2d(3, 4, 3)), {}, ())) is None
    assert coverage(weights_of(nn.Sequential(nn.Conv2d(3, 4, 1)), {}, ())) == 0  # a matrix by another name
