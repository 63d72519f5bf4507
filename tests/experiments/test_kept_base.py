"""A base that is loaded once gives every run the bits of a fresh load, and notices when it was written to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import set_seed

from rankalloc.experiments.kept_base import KeptBase, with_kept_base
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare
from tests.support.models import assert_same
from tests.support.runs import small_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def weights(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method", ["auto", "eva", *(pytest.param(name, marks=pytest.mark.long) for name in ("uniform", "adalora"))]
)
def test_a_run_on_a_kept_base_has_the_bits_of_one_on_a_fresh_base(method, home):
    config = small_config(home, f"method={method}")
    prepared = prepare(config)
    kept = with_kept_base(prepared, None)
    train(small_config(home, "method=uniform"), home / f"{method}-first", prepared=kept)  # leaves nothing behind
    one, two = (train(config, home / f"{method}-{name}", prepared=task)
                for name, task in (("fresh", prepared), ("kept", kept)))
    assert kept.build_model.loads == 1
    assert weights(home / f"{method}-fresh") == weights(home / f"{method}-kept")
    assert [e.metrics for e in one.evaluations] == [e.metrics for e in two.evaluations]


def test_modules_that_are_trained_whole_are_copied_and_the_rest_is_shared(home):
    prepared = prepare(small_config(home))
    kept = KeptBase(prepared.build_model, ["classifier", "bert.embeddings.LayerNorm"])
    set_seed(3)
    first = kept()
    state = torch.get_rng_state()
    set_seed(3)
    fresh = prepared.build_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first.state_dict(), fresh.state_dict())
    with torch.no_grad():
        first.classifier.weight.add_(1)
        first.bert.embeddings.LayerNorm.weight.add_(1)
    first.config.hidden_size = 7
    first.register_forward_hook(lambda *_: None)
    set_seed(3)
    second = kept()
    assert kept.loads == 1 and second.config.hidden_size == 16 and not second._forward_hooks
    assert_same(second.state_dict(), fresh.state_dict())
    one, two = (model.bert.encoder.layer[0].output.dense.weight for model in (first, second))
    assert one.data_ptr() == two.data_ptr() and one is not two


def test_a_base_that_was_written_to_or_another_seed_is_loaded_anew(home):
    prepared = prepare(small_config(home))
    kept = KeptBase(prepared.build_model, None)
    set_seed(3)
    model = kept()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    set_seed(3)
    assert_same(kept().state_dict(), _fresh(prepared, 3))
    assert kept.loads == 2
    set_seed(4)
    assert_same(kept().state_dict(), _fresh(prepared, 4))
    assert kept.loads == 3
    quantised = dataclasses.replace(prepared, build_model=lambda: _odd(prepared))
    kept = KeptBase(quantised.build_model, None)
    assert kept() is not kept() and kept.loads == 2


def _fresh(prepared, seed):
    set_seed(seed)
    return prepared.build_model().state_dict()


def _odd(prepared):
    """A model with a weight of a class of its own, as quantised ones have."""
    class Packed(torch.nn.Parameter):
        pass

    model = prepared.build_model()
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight = Packed(layer.weight.detach())
    return model
