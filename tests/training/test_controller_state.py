"""A controller's state: an interrupted run goes on bit for bit, and only with the settings it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.storage.tensors import read_header
from tests.support.models import assert_same, make_mlp, tensors_of
from tests.support.training import BUDGET, STEPS, begin_mlp, train_mlp


@pytest.mark.parametrize("cut", [1, 7, 14, 17])
@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize(
    "budget", [BUDGET, ra.RankBudget(params=230, every=3), ra.RankBudget(fraction=0.4, min_rank=1)]
)
def test_an_interrupted_run_goes_on_bit_for_bit(cut, shrink, budget, tmp_path):
    model, adapters, controller, optimizer = begin_mlp(budget, shrink=shrink)
    train_mlp(model, controller, optimizer, STEPS)
    whole = controller.finish()

    model_a, _, controller_a, optimizer_a = begin_mlp(budget, shrink=shrink)
    train_mlp(model_a, controller_a, optimizer_a, cut)
    torch.save(
        {"model": model_a.state_dict(), "optimizer": optimizer_a.state_dict(), "ranks": controller_a.state_dict()},
        tmp_path / "state.pt",
    )
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model_b = make_mlp()
    torch.manual_seed(99)
    adapters_b = ra.attach(model_b, rank=4)
    model_b.load_state_dict(saved["model"])
    controller_b = ra.RankController(adapters_b, budget, STEPS, "adalora", shrink=shrink)
    controller_b.load_state_dict(saved["ranks"])
    optimizer_b = torch.optim.AdamW(adapters_b.parameters(), lr=1e-2)
    optimizer_b.load_state_dict(saved["optimizer"])
    train_mlp(model_b, controller_b, optimizer_b, STEPS)
    resumed = controller_b.finish()
    assert_same(tensors_of(model), tensors_of(model_b))
    assert resumed.allocations == whole.allocations and resumed.scores == whole.scores
    assert resumed.budget == whole.budget and resumed.layers == whole.layers
    assert resumed.adapter_params_initial == whole.adapter_params_initial


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": ra.RankBudget(ranks=6, every=2)}, "target was 5 and now is 6"),
        ({"budget": ra.RankBudget(ranks=5, every=3)}, "every was 2 and now is 3"),
        ({"steps": 30}, "total_steps was 20 and now is 30"),
        ({"method": "uniform"}, "began with method 'adalora'"),
        ({"beta1": 0.5}, "beta1"),
        ({"orthogonal": 0.0}, "orthogonal"),
        ({"attach": {"alpha": 100}}, "scaling"),
        ({"attach": {"target_modules": ["0", "2"]}, "budget": ra.RankBudget(ranks=5, every=2)}, "3 layers"),
    ],
)
def test_a_run_goes_on_only_with_the_settings_it_began_with(change, words):
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, 7)
    state = controller.state_dict()
    other_model, _, other, _ = begin_mlp(**change)
    own = {k: v for k, v in model.state_dict().items() if k in other_model.state_dict()}
    other_model.load_state_dict(own, strict=False)
    with pytest.raises(RankallocError) as caught:
        other.load_state_dict(state)
    assert words in str(caught.value) and "cannot resume" in str(caught.value)
    assert other.step == 0


def test_a_state_without_its_weights_is_refused():
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, 7)
    _, _, other, _ = begin_mlp()
    with pytest.raises(RankallocError, match="not those the rank state was saved with"):
        other.load_state_dict(controller.state_dict())


@pytest.mark.parametrize("damage", ["version", "tensor", "json"])
def test_a_damaged_state_is_refused(damage):
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, 7)
    state = controller.state_dict()
    if damage == "version":
        state["meta"] = json.dumps({**json.loads(state["meta"]), "version": 99})
    elif damage == "tensor":
        state["tensors"].pop("sensitivity.0.P")
    else:
        state["meta"] = "{"
    fresh = ra.RankController(adapters, BUDGET, STEPS, "adalora")
    with pytest.raises(RankallocError):
        fresh.load_state_dict(state)
    assert fresh.step == 0


OF_RANKS = Path(__file__).parent / "data" / "fraction_of_ranks.safetensors"
"""The weights and the state of step 7 of a run with fraction=0.4 of its ranks, written before a fraction was one of the
parameters."""


def test_a_run_whose_fraction_was_one_of_ranks_goes_on_with_it():
    tensors, header = load_file(OF_RANKS), read_header(OF_RANKS)
    model, adapters, controller, optimizer = begin_mlp(ra.RankBudget(fraction=0.4, min_rank=1, warmup=0.1))
    assert controller.schedule.unit == "params"
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    scores = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    saved = {"tensors": scores, "meta": header.metadata["rankalloc"]}
    controller.load_state_dict(saved)
    train_mlp(model, controller, optimizer, STEPS)
    trace = controller.finish()
    assert (trace.budget.unit, trace.budget.target, trace.budget.given) == ("ranks", 4, {"fraction": 0.4})
    assert sum(adapters.ranks().values()) == 4 and min(adapters.ranks().values()) >= 1
    other, _, resumed, _ = begin_mlp(ra.RankBudget(fraction=0.5, min_rank=1, warmup=0.1))
    other.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    with pytest.raises(RankallocError, match="target was 4 and now is 6"):
        resumed.load_state_dict(saved)
