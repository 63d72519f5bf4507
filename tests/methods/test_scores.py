"""The importance score equals its formulas, and real PEFT's choice of triplets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import ConfigError
from rankalloc.methods.scores import SCORES
from rankalloc.methods.scores.sensitivity import Sensitivity
from tests.support.models import make_mlp


def transcribed(history, beta1, beta2):
    """AdaLoRA, eqs. 8-11, entry by entry; ``history`` is [(weight, gradient), ...] of one factor."""
    mean = np.zeros(history[0][0].shape)
    deviation = np.zeros_like(mean)
    for weight, gradient in history:
        importance = np.abs(weight * gradient)
        mean = beta1 * mean + (1 - beta1) * importance
        deviation = beta2 * deviation + (1 - beta2) * np.abs(importance - mean)
    return mean * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sensitivity_is_the_formula(dtype):
    model = make_mlp().to(dtype)
    adapters = ra.attach(model, rank=4)
    model.to(dtype)
    score = Sensitivity(list(adapters), beta1=0.8, beta2=0.7)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    histories = [{"P": [], "lam": [], "Q": []} for _ in adapters]
    for step in range(30):
        x = torch.randn(8, 16, dtype=dtype, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x[:, :8].sin()).backward()
        score.observe()
        for adapter, history in zip(adapters, histories, strict=True):
            for name, entries in history.items():
                weight = getattr(adapter, name)
                entries.append((weight.detach().double().numpy().copy(), weight.grad.double().numpy().copy()))
        optimizer.step()
        optimizer.zero_grad()
    for values, history in zip(score.values(), histories, strict=True):
        p, lam, q = (transcribed(history[name], 0.8, 0.7) for name in ("P", "lam", "Q"))
        expected = lam + p.mean(0) + q.mean(1)
        assert expected.min() > 0
        np.testing.assert_allclose(values.double().numpy(), expected, rtol=2e-5)


def test_scores_only_read(mlp):
    adapters = ra.attach(mlp, rank=4)
    score = Sensitivity(list(adapters))
    mlp(torch.randn(4, 16)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in adapters.parameters()]
    score.observe()
    score.values()
    for p, (weight, gradient) in zip(adapters.parameters(), before, strict=True):
        assert torch.equal(p, weight) and torch.equal(p.grad, gradient)


def test_a_layer_that_took_no_part_has_sensitivity_zero(mlp):
    adapters = ra.attach(mlp, rank=2)
    for adapter in adapters:
        adapter.lam.data.fill_(1.0)
    score = Sensitivity(list(adapters), beta1=0.5, beta2=0.5)
    mlp(torch.randn(4, 16)).sum().backward()
    score.observe()
    once = score.tensors()["sensitivity.1.P"].clone()
    adapters.modules["2"].P.grad = None
    score.observe()
    assert once.any() and torch.equal(score.tensors()["sensitivity.1.P"], once * 0.5)


def test_a_constant_factor_on_all_gradients_leaves_the_order(mlp):
    adapters = ra.attach(mlp, rank=4)
    scores = [Sensitivity(list(adapters)) for _ in range(2)]
    for step in range(5):
        mlp(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        scores[0].observe()
        for p in adapters.parameters():
            p.grad.mul_(0.01)
        scores[1].observe()
        mlp.zero_grad()
        for p in adapters.parameters():
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)), alpha=0.1)
    orders = [torch.cat(s.values()).argsort().tolist() for s in scores]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("beta", [0, 1, -0.5, 1.5, float("nan")])
def test_decays_outside_their_range_are_refused(mlp, beta):
    adapters = ra.attach(mlp, rank=2)
    for name in ("beta1", "beta2"):
        with pytest.raises(ConfigError, match=name):
            ra.RankController(adapters, ra.RankBudget(ranks=2), 10, "adalora", **{name: beta})


def test_the_compatible_mode_is_pefts_allocator_over_a_hundred_steps():
    """Equal weights and gradients into both, scored after the optimizer's step as PEFT does: the same scores at
    every step and the same triplets at every mask."""
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    rank, names, steps = 4, ["0", "2", "4"], 100
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=2, lora_alpha=rank, tinit=10, tfinal=30, deltaT=5, total_step=steps, beta1=0.85,
        beta2=0.85, target_modules=names,
    )
    theirs = peft.get_peft_model(make_mlp(), config).base_model.model
    allocator = RankAllocator(theirs, config, "default")
    layers = [theirs.get_submodule(name) for name in names]

    model = make_mlp()
    adapters = ra.attach(model, rank=rank)
    budget = ra.RankBudget(ranks=6, warmup=0.1, freeze=0.3, every=5)
    controller = ra.RankController(
        adapters, budget, steps, "adalora", orthogonal=0.0, shrink=False, score_after_step=True
    )
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    seen, scores = [], controller.state.score.values
    controller.state.score.values = lambda: seen.append(scores()) or seen[-1]
    masks = 0
    for step in range(1, steps + 1):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x[:, :8].sin()).backward()
        controller.observe()
        optimizer.step()
        with torch.no_grad():
            for layer, adapter in zip(layers, adapters, strict=True):
                for ours, other in (
                    (adapter.P, layer.lora_B["default"]), (adapter.lam, layer.lora_E["default"]),
                    (adapter.Q, layer.lora_A["default"]),
                ):
                    other.copy_(ours.reshape(other.shape))
                    other.grad = ours.grad.reshape(other.shape).clone()
        mine = controller.state.score
        controller.update(optimizer)
        if step <= 70:
            asked, pattern = allocator.update_and_allocate(theirs, step, force_mask=step == 70)
            for index, layer in enumerate(layers):
                expected = _peft_scores(allocator, names[index], layer)
                got = seen[-1][index] if controller.schedule.allocates(step) else mine.values()[index]
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-30)
            if pattern is not None:
                assert controller.schedule.allocates(step) and asked == controller.schedule.asked(step)
                by_name = {key.split(".")[0]: mask for key, mask in pattern.items()}
                assert [a.kept.tolist() for a in adapters] == [by_name[name] for name in names]
                masks += 1
            else:
                assert not controller.schedule.allocates(step)
        optimizer.zero_grad()
    assert masks == 12 and sum(adapters.ranks().values()) == 6


def _peft_scores(allocator, name, layer):
    """PEFT's triplet scores of one layer, from its own averages."""
    def entries(kind):
        key = f"{name}.lora_{kind}.default"
        return allocator._element_score(key)

    return entries("E").view(-1) + entries("A").mean(1) + entries("B").mean(0)


def test_weighted_energy_is_lambda_times_the_averaged_first_order_change(mlp):
    adapters = ra.attach(mlp, rank=3)
    for adapter in adapters:
        adapter.lam.data.normal_()
    score, average = SCORES["weighted-energy"](list(adapters), beta=0.5), 0.0
    for step in range(3):
        mlp(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        score.observe()
        first = adapters.modules["0"].lam
        average = 0.5 * average + 0.5 * (first * first.grad).abs()
        mlp.zero_grad()
    torch.testing.assert_close(score.values()[0], (first.abs() * average).detach())


def test_the_registry_names_its_scores():
    assert all(cls.name == name for name, cls in SCORES.items())
