"""Planners that take gradients: against autograd's, their formulas, and a start that goes downhill."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.layers.adaptable import weight_view
from rankalloc.lowrank import effective_rank
from rankalloc.methods.planners.fim import FIM
from rankalloc.methods.planners.gora import GoRA
from rankalloc.methods.planners.gradients import weight_gradients
from rankalloc.methods.planners.planning import layer_shapes
from rankalloc.methods.planners.probe import Probe, unchanged
from tests.support.batches import mlp_batches, token_batches
from tests.support.models import make_bert, make_gpt2, make_mlp


def probe_of(model, batches, loss_fn=None, peak=4):
    names = [shape.name for shape in layer_shapes(model, peak)]
    targets = {name: model.get_submodule(name) for name in names}
    return Probe(model, targets, batches, dict.fromkeys(names, peak), 0, loss_fn)


def own_gradients(probe):
    """{name: one gradient a batch}, by autograd through the weights themselves."""
    weights = [module.weight for module in probe.targets.values()]
    turned = [weight_view(m).shape != m.weight.shape or m.weight.data_ptr() != weight_view(m).data_ptr() or
              type(m).__name__ == "Conv1D" for m in probe.targets.values()]
    found = {name: [] for name in probe.targets}
    for index in range(len(probe.batches)):
        grads = torch.autograd.grad(probe.loss(index), weights)
        for name, grad, turn in zip(found, grads, turned, strict=True):
            found[name].append(grad.T if turn else grad)
    return found


def causal(count=2):
    return [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in token_batches(count)]


CASES = {
    "bert": lambda: probe_of(make_bert(), token_batches(2)),
    "conv1d": lambda: probe_of(make_gpt2(), causal()),
    "mlp": lambda: probe_of(make_mlp(), mlp_batches(2), F.mse_loss),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_full_weights_are_autograds(case, frozen):
    probe = CASES[case]()
    expected = own_gradients(probe)
    probe.model.requires_grad_(not frozen)
    with unchanged(probe.model):
        found = weight_gradients(probe)
        losses = [probe.loss(index).item() for index in range(2)]
    for name, grads in expected.items():
        torch.testing.assert_close(found.mean[name], torch.stack(grads).mean(0), rtol=1e-4, atol=1e-7)
    assert found.loss == pytest.approx(sum(losses) / 2) and all(p.grad is None for p in probe.model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_mean_square_of_the_gradient_of_p(case):
    probe = CASES[case]()
    expected = {
        name: torch.stack([(grad @ probe.kaiming(name, 4).T).square().mean() for grad in grads]).mean().item()
        for name, grads in own_gradients(probe).items()
    }
    with unchanged(probe.model):
        scores = FIM().scores(probe, None)
    assert {name: values[0] for name, values in scores.items()} == pytest.approx(expected, rel=1e-3)


def test_ranks_go_by_the_norm_of_the_gradient():
    probe = CASES["bert"]()
    norms = {name: torch.stack(grads).mean(0).norm().item() for name, grads in own_gradients(probe).items()}
    plan = ra.plan_ranks(make_bert(), token_batches(2), ra.RankBudget(ranks=40), "gradient-share", rank=32)
    total = sum(norms.values())
    assert all(abs(plan[name] - 40 * norm / total) < 1 for name, norm in norms.items())


def test_effective_rank_counts_directions_not_their_size():
    identity = torch.eye(6, 9)
    assert effective_rank(identity) == pytest.approx(6) == pytest.approx(effective_rank(1e-6 * identity))
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1) and effective_rank(torch.zeros(4, 4)) == 0
    assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 0.1]))) < 2


def test_goras_ranks_are_its_shares_per_width():
    probe = CASES["bert"]()
    importance = {
        name: (probe.targets[name].weight * torch.stack(grads).mean(0)).abs().mean().item()
        for name, grads in own_gradients(probe).items()
    }
    due = {name: share / sum(probe.shape(name)) ** 0.5 for name, share in importance.items()}
    plan = ra.plan_ranks(make_bert(), token_batches(2), ra.RankBudget(ranks=40), "gora", rank=32)
    assert all(abs(plan[name] - 40 * share / sum(due.values())) < 1 for name, share in due.items())


@pytest.mark.parametrize("alpha", [4, 64])
@pytest.mark.parametrize("case", CASES)
def test_gora_begins_downhill_whatever_the_scaling(case, alpha):
    probe = CASES[case]()
    model, batches = probe.model, probe.batches
    with torch.no_grad():
        before = [probe.loss(index).item() for index in range(2)]
    gradients = {name: torch.stack(grads).mean(0) for name, grads in own_gradients(probe).items()}
    plan = ra.plan_ranks(model, batches, ra.RankBudget(fraction=0.4), "gora", rank=4, loss_fn=probe.loss_fn)
    adapters = ra.attach(model, ranks=plan, alpha=alpha)
    with torch.no_grad():
        after = [probe.loss(index).item() for index in range(2)]
    assert sum(after) < sum(before)
    assert plan.notes == []
    for name, adapter in adapters.modules.items():
        if adapter.rank:
            onto = torch.linalg.pinv(adapter.Q.detach()) @ adapter.Q.detach()
            step = -0.05 * (adapter.d_in / adapter.rank) ** 0.5 * gradients[name] @ onto
            torch.testing.assert_close(adapter.delta_weight(), step, rtol=1e-3, atol=1e-6)


def test_goras_step_is_halved_until_the_loss_falls():
    probe = CASES["mlp"]()
    with torch.no_grad():
        before = sum(probe.loss(index).item() for index in range(2))
    plan = ra.plan_ranks(
        probe.model, probe.batches, ra.RankBudget(ranks=6), "gora", rank=4, loss_fn=F.mse_loss, gamma=1e4
    )
    assert "the loss rose at" in plan.notes[0]
    ra.attach(probe.model, ranks=plan)
    with torch.no_grad():
        assert sum(probe.loss(index).item() for index in range(2)) < before


def test_gora_at_a_minimum_begins_at_no_update():
    batches = [(x, torch.zeros(len(x), 8)) for x, _ in mlp_batches(2)]
    model = make_mlp()
    torch.nn.init.zeros_(model[-1].weight)
    torch.nn.init.zeros_(model[-1].bias)
    plan = ra.plan_ranks(model, batches, ra.RankBudget(ranks=6), "gora", rank=4, loss_fn=F.mse_loss)
    assert list(plan.values()) == [2, 2, 2] and "ΔW = 0" in plan.notes[0]
    assert all(not adapter.delta_weight().any() for adapter in ra.attach(model, ranks=plan))
    assert GoRA.name == "gora"
