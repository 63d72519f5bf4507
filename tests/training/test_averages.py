"""Averages of the weights that follow: torch's own AveragedModel beside ranks that leave memory and bases that turn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rankalloc as ra
from rankalloc.adapters import canonical
from rankalloc.training import averages
from tests.support.models import logits_of, make_mlp
from tests.support.peft_models import peft_mlp
from tests.support.training import train_mlp

STEPS, DECAY = 24, 0.8
DURING = [name for name, method in ra.METHODS.items() if method.when == "during"]
FACTORS = ("P", "lam", "Q")


def ema_of(model, use_buffers=False):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)


def prepare(method="auto", **options):
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4, init=ra.METHODS[method].init)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5, every=3), STEPS, method, seed=3, **options)
    return model, adapters, optimizer, controller


def steps(model, optimizer, controller, until=STEPS):
    """One step of training at a time."""
    while controller.step < until:
        train_mlp(model, controller, optimizer, controller.step + 1)
        yield controller.step


def products(adapters):
    return [adapter.delta_weight() for adapter in adapters]


@pytest.mark.parametrize(("method", "use_buffers"), [*((m, False) for m in DURING), ("auto", True), ("elalora", True)])
def test_an_average_follows_every_method(method, use_buffers):
    model, adapters, optimizer, controller = prepare(method)
    ema = ema_of(model, use_buffers)
    followed = controller.follow(ema)
    ideal = None
    for _ in steps(model, optimizer, controller):
        ema.update_parameters(model)
        now = torch.cat([update.flatten() for update in products(adapters)])
        ideal = now if ideal is None else DECAY * ideal + (1 - DECAY) * now
    controller.finish()
    assert followed.ranks() == adapters.ranks() and sum(adapters.ranks().values()) == 5
    for own, trained in zip(followed, adapters, strict=True):
        assert torch.equal(own.kept, trained.kept)
        for name in FACTORS:
            assert getattr(own, name).shape == getattr(trained, name).shape
    # an average of factors is none of products, but near to one
    average = torch.cat([update.flatten() for update in products(followed)])
    assert (average - ideal).norm() < 0.25 * ideal.norm()


@pytest.mark.parametrize("method", ["adalora", "magnitude"])
def test_an_average_is_that_of_masked_full_matrices_taken_by_hand(method):
    model, adapters, optimizer, controller = prepare(method)
    ema = ema_of(model)
    followed = controller.follow(ema)
    for _ in steps(model, optimizer, controller):
        ema.update_parameters(model)
    twin, masked, twins_optimizer, twins_controller = prepare(method, shrink=False)
    full = None
    for step in steps(twin, twins_optimizer, twins_controller):
        now = [{name: getattr(a, name).detach().double() for name in FACTORS} for a in masked]
        if full is None:
            full = now
        for average, new, adapter in zip(full, now, masked, strict=True):
            if twins_controller.schedule.allocates(step):
                average["lam"] = average["lam"] * adapter.kept
            for name in FACTORS:
                average[name] = DECAY * average[name] + (1 - DECAY) * new[name]
    assert adapters.ranks() == masked.ranks() and sum(a.rank for a in adapters) == 5 < sum(a.rank for a in masked)
    for own, average, adapter in zip(followed, full, masked, strict=True):
        kept = adapter.kept
        torch.testing.assert_close(own.P.double(), average["P"][:, kept], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.lam.double(), average["lam"][kept], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.Q.double(), average["Q"][kept], rtol=1e-5, atol=1e-6)
        update = adapter.scaling * (average["P"] * average["lam"]) @ average["Q"]
        torch.testing.assert_close(own.delta_weight().double(), update, rtol=1e-4, atol=1e-6)


def adapted(form):
    """(model, adapters) with random weights, Λ trained or 1, in layers of ours or of PEFT's."""
    model = peft_mlp() if form == "adopt" else make_mlp()
    adapters = ra.adopt(model) if form == "adopt" else ra.attach(model, rank=4, init=form)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factor in (factor for adapter in adapters for factor in adapter.trained()):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
    return model, adapters


FORMS = ["svd", "lora", "adopt"]


def shaken(adapters, size):
    """A copy of ``adapters`` as an average may be: every number moved a little."""
    ema = ema_of(adapters.model)
    copies = averages.copy_of(adapters, ema)
    with torch.no_grad():
        for own in copies:
            for factor in own.trained():
                factor.add_(size * factor.std() * torch.randn(factor.shape, generator=torch.Generator().manual_seed(4)))
    return copies


def distance(copies, adapters):
    """Between factors, so of a triplet with the triplet it is averaged with."""
    pairs = [(getattr(a, n).detach(), getattr(b, n).detach()) for a, b in zip(copies, adapters, strict=True)
             for n in FACTORS if a.rank]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.0, 0.01, 0.1])
def test_a_change_of_basis_keeps_the_average_and_its_triplets_near_the_models(size, form):
    _, adapters = adapted(form)
    copies = shaken(adapters, size)
    before, function = products(copies), logits_of(copies.model)
    for adapter in adapters:
        canonical.canonicalize(adapter)
    assert distance(copies, adapters) > 1  # left alone, it would be averaged with something else
    averages.align([copies], adapters)
    for update, was in zip(products(copies), before, strict=True):
        torch.testing.assert_close(update, was, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(copies.model), function, rtol=1e-4, atol=1e-5)
    assert distance(copies, adapters) < 1e-5 + 8 * size


@pytest.mark.parametrize("form", FORMS)
def test_the_average_of_a_model_that_stands_still_is_the_model(form):
    model, adapters = adapted(form)
    ema = ema_of(model)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.0)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=12, every=2), 12, canonical=True)
    followed = controller.follow(ema)
    start, function = [adapter.P.detach().clone() for adapter in adapters], logits_of(model)
    for _ in steps(model, optimizer, controller, 12):
        ema.update_parameters(model)
        torch.testing.assert_close(logits_of(ema), logits_of(model), rtol=1e-4, atol=1e-5)
    assert sum(adapters.ranks().values()) == 12
    assert all(float((adapter.P - p).abs().max()) > 0.1 for adapter, p in zip(adapters, start, strict=True))
    torch.testing.assert_close(logits_of(ema), function, rtol=1e-4, atol=1e-5)
    assert distance(followed, adapters) < 1e-4


@pytest.mark.parametrize("dropped", [0, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_dropped_in_the_model_is_nothing_in_a_copy_that_is_turned(form, dropped):
    _, adapters = adapted(form)
    copies = shaken(adapters, 0.1)
    for adapter in adapters:
        adapter.drop(torch.arange(4) < 4 - dropped)
    averages.drop([copies], adapters, None, False)
    function = logits_of(copies.model)
    for adapter in adapters:
        canonical.canonicalize(adapter)
    averages.align([copies], adapters)
    torch.testing.assert_close(logits_of(copies.model), function, rtol=1e-4, atol=1e-5)
    averages.drop([copies], adapters, None, False)  # what is dropped had no part in it
    torch.testing.assert_close(logits_of(copies.model), function, rtol=1e-4, atol=1e-5)
    for own in copies:
        assert not own.contributes()[~own.kept].any() and int(own.kept.sum()) == 4 - dropped
        if own.sized_by_factors:
            assert (own.lam == 1).all() and (own.Q != 0).any(1).all()  # a dropped triplet can grow back
            live = own.kept
            torch.testing.assert_close(own.P[:, live].norm(dim=0), own.Q[live].norm(dim=1), rtol=1e-4, atol=1e-6)


def test_copies_of_layers_narrower_than_their_rank_can_be_turned():
    adapters = ra.adopt(peft_mlp(rank=20))
    with torch.no_grad():
        for adapter in adapters:
            adapter.P.normal_()
    copies = shaken(adapters, 0.1)
    function = logits_of(copies.model)
    averages.align([copies], adapters)
    torch.testing.assert_close(logits_of(copies.model), function, rtol=1e-3, atol=1e-4)


def test_an_average_of_nothing_and_empty_adapters_can_be_turned():
    model = make_mlp()
    adapters = ra.attach(model, rank=4, ranks={"2": 0})
    copies = averages.copy_of(adapters, ema_of(model))
    for adapter in adapters:
        canonical.canonicalize(adapter)
    averages.align([copies], adapters)
    assert distance(copies, adapters) == 0


def test_a_followed_average_is_saved_and_computes_what_it_did(tmp_path):
    model, adapters, optimizer, controller = prepare()
    ema = ema_of(model)
    followed = controller.follow(ema)
    for _ in steps(model, optimizer, controller):
        ema.update_parameters(model)
    controller.finish()
    ra.save(followed, tmp_path / "ema")
    fresh = make_mlp()
    loaded = ra.load(fresh, tmp_path / "ema")
    torch.testing.assert_close(logits_of(fresh), logits_of(ema), rtol=1e-5, atol=1e-6)
    assert sum(loaded.ranks().values()) == 5


def test_new_triplets_have_no_past_in_the_average():
    model, adapters, optimizer, controller = prepare("elalora")
    ema = ema_of(model)
    followed = controller.follow(ema)
    came = 0
    before = [a.kept.clone() for a in adapters]
    for _ in steps(model, optimizer, controller):
        for own, adapter, was in zip(followed, adapters, before, strict=True):
            fresh = adapter.kept & ~was if adapter.rank == len(was) else adapter.kept[:0]
            came += int(fresh.sum())
            if len(fresh):
                assert torch.equal(own.P[:, fresh], adapter.P[:, fresh])
                assert torch.equal(own.Q[fresh], adapter.Q[fresh])
            assert not own.P[:, ~own.kept].any() and not own.lam[~own.kept].any()
        before = [a.kept.clone() for a in adapters]
        ema.update_parameters(model)
    assert came


@pytest.mark.parametrize("form", FORMS)
def test_an_average_that_nobody_told_of_is_refused_and_forgotten_when_it_is_gone(form):
    model, adapters = adapted(form)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5, every=3), STEPS)
    snapshot, ema = copy.deepcopy(model), ema_of(model)  # a copy that is no average may stay as it is
    with pytest.raises(ra.RankallocError, match=r"controller\.follow"):
        train_mlp(model, controller, optimizer, 1)
    del ema
    optimizer.zero_grad()
    told = ema_of(model)
    controller.follow(told)
    train_mlp(model, controller, optimizer, 8)
    late = ema_of(snapshot)  # a copy of a copy
    with pytest.raises(ra.RankallocError, match=r"controller\.follow"):
        train_mlp(model, controller, optimizer, STEPS)
    assert late is not None and snapshot is not None


def test_what_is_no_copy_or_an_old_one_is_not_followed():
    model, adapters, optimizer, controller = prepare()
    old = averages.copy_of(adapters, copy.deepcopy(model)).model
    train_mlp(model, controller, optimizer, STEPS)
    for stranger in (model, make_mlp(), ema_of(make_mlp())):
        with pytest.raises(ra.RankallocError, match="no copy of these adapters"):
            controller.follow(stranger)
    with pytest.raises(ra.RankallocError, match="left memory since"):
        controller.follow(old)
    assert controller.follow(ema_of(model)).ranks() == adapters.ranks()


def test_a_resumed_average_goes_on_to_the_bit():
    model, adapters, optimizer, controller = prepare()
    ema = ema_of(model)
    followed = controller.follow(ema)
    saved = None
    for step in steps(model, optimizer, controller):
        ema.update_parameters(model)
        if step == 13:
            saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, controller, ema)])
    again, adapters_again, optimizer, controller = prepare(fresh=False)
    again.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(adapters_again.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved[1])
    controller.load_state_dict(saved[2])
    ema = ema_of(again)
    ema.load_state_dict(saved[3])
    resumed = controller.follow(ema)
    for _ in steps(again, optimizer, controller):
        ema.update_parameters(again)
    for own, other in zip(resumed, followed, strict=True):
        assert all(torch.equal(getattr(own, name), getattr(other, name)) for name in (*FACTORS, "kept"))


def test_an_average_that_is_told_twice_follows_once():
    model, _, optimizer, controller = prepare()
    ema = ema_of(model)
    assert controller.follow(ema) is controller.follow(ema)
    for _ in steps(model, optimizer, controller):
        ema.update_parameters(model)
