"""LoRA's variants as options of one adapter: rsLoRA, LoRA+, LoRA-FA and VeRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.adapters.triplets import TRAINED
from rankalloc.errors import ConfigError, RankallocError
from rankalloc.methods import METHODS
from rankalloc.methods.requirements import require_trainable
from rankalloc.methods.scores import SCORES
from rankalloc.training.callback import RankCallback
from tests.support.models import assert_same, logits_of, make_bert, make_mlp, prune, randomize, tensors_of
from tests.support.training import make_trainer, train_mlp

FIXED = ("lora-fa", "vera")
STEPS = 16
OF_FIXED = ("first-order", "fisher", "gradient-norm", "magnitude")

# --- rsLoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_rslora_divides_by_the_root_of_the_rank_and_the_file_holds_the_scale(layout, tmp_path):
    model = make_mlp()
    adapters = ra.attach(model, rank=4, alpha=6, scale="rslora", ranks={"2": 1})
    assert adapters.scaling == 3.0 and {a.scaling for a in adapters} == {3.0}
    randomize(adapters)
    prune(adapters, (2, 1, 3))
    ra.save(adapters, tmp_path, layout)
    loaded = make_mlp()
    ra.load(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(make_mlp(), tmp_path)
    torch.testing.assert_close(logits_of(other), logits_of(model), rtol=1e-5, atol=1e-5)


def test_a_scale_is_lora_or_rslora():
    with pytest.raises(ConfigError, match="did you mean 'rslora'"):
        ra.attach(make_mlp(), rank=4, scale="rs-lora")


def test_a_run_of_another_scale_does_not_resume():
    controllers = []
    for scale in ("lora", "rslora"):
        torch.manual_seed(1)
        model = make_mlp()
        adapters = ra.attach(model, rank=4, scale=scale)
        controllers.append(ra.RankController(adapters, ra.RankBudget(ranks=6), STEPS))
    with pytest.raises(RankallocError, match="scaling was 2.0 and now is 4.0"):
        controllers[1].load_state_dict(controllers[0].state_dict())


# --- LoRA+ and weight decay -------------------------------------------------------------------------------------


def test_parameter_groups_hold_everything_that_trains_once(bert):
    adapters = ra.attach(bert, rank=2)
    groups = {g["name"]: g for g in adapters.parameter_groups(lr=1e-3, plus_ratio=8, weight_decay=0.1)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "P": (8e-3, 0.1), "lam": (8e-3, 0.0), "Q": (1e-3, 0.1), "heads": (1e-3, 0.1), "heads' vectors": (1e-3, 0.0),
    }
    members = [p for group in groups.values() for p in group["params"]]
    assert len(members) == len({id(p) for p in members})
    assert {id(p) for p in members} == {id(p) for p in adapters.parameters()}
    assert [p.shape for p in groups["heads' vectors"]["params"]] == [bert.classifier.bias.shape]


@pytest.mark.parametrize("init", TRAINED)
def test_groups_leave_out_what_is_frozen(init):
    adapters = ra.attach(make_mlp(), rank=2, init=init)
    names = [group["name"] for group in adapters.parameter_groups(1e-3)]
    wanted = {"P": "P", "lam": "lam", "lam_out": "lam", "core": "core", "Q": "Q", "biases": "biases"}
    assert set(names) == {wanted[factor] for factor in TRAINED[init]}
    trained = sum(p.numel() for group in adapters.parameter_groups(1e-3) for p in group["params"])
    assert trained == adapters.trainable_params() == sum(p.numel() for p in adapters.parameters())


@pytest.mark.parametrize("values", [{"lr": -1}, {"lr": 1e-3, "plus_ratio": 0}, {"lr": 1e-3, "weight_decay": -0.1}])
def test_rates_that_are_none_are_refused(values):
    with pytest.raises(ConfigError, match=f"{list(values)[-1]} must be a number"):
        ra.attach(make_mlp(), rank=2).parameter_groups(**values)


def test_one_step_of_sgd_moves_each_factor_by_its_own_rate():
    torch.manual_seed(0)
    model = make_mlp()
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=1e-2, plus_ratio=16))
    model(torch.randn(6, 16)).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = {"P": 0.16, "lam": 0.16, "Q": 0.01}.get(name.rsplit(".", 1)[-1], 0.0)
        moved = 0.0 if parameter.grad is None else rate * parameter.grad
        torch.testing.assert_close(parameter.detach(), before[name] - moved)


def test_trainer_takes_the_groups_and_resumes_to_the_bit(tmp_path):
    def run(folder, **resume):
        torch.manual_seed(1)
        model = make_bert()
        adapters = ra.attach(model, rank=4)
        callback = RankCallback(adapters, ra.RankBudget(ranks=24, every=2))
        optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=2e-3, plus_ratio=4, weight_decay=0.01))
        trainer = make_trainer(
            model, folder, [callback], steps=10, optimizers=(optimizer, None), save_strategy="steps", save_steps=5,
        )
        trainer.train(**resume)
        assert sum(adapters.ranks().values()) == 24
        rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
        assert rates["P"] == pytest.approx(8e-3) and rates["Q"] == pytest.approx(2e-3)
        return tensors_of(model)

    whole = run(tmp_path)
    assert_same(whole, run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5")))


# --- LoRA-FA and VeRA: what is trained, kept and computed -------------------------------------------------------


@pytest.mark.parametrize("init", FIXED)
def test_frozen_factors_stay_as_they_were_drawn(init):
    torch.manual_seed(1)
    model = make_mlp()
    adapters = ra.attach(model, rank=4, init=init)
    begin = copy.deepcopy([(a.P.data, a.Q.data) for a in adapters])
    assert torch.equal(logits_of(model), logits_of(make_mlp()))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), STEPS, "magnitude")
    model.train()
    train_mlp(model, controller, optimizer, STEPS)
    assert (logits_of(model) - logits_of(make_mlp())).abs().max() > 0.01
    for adapter, (p, q) in zip(adapters, begin, strict=True):
        assert torch.equal(adapter.Q, q) and torch.equal(adapter.P, p) == (init == "vera")
    assert len(optimizer.state) == len(adapters.parameters()) == len(adapters) * len(TRAINED[init])


def test_vera_is_its_formula_with_one_pair_for_all_layers():
    torch.manual_seed(1)
    model = make_mlp()
    adapters = ra.attach(model, rank=3, alpha=3, init="vera", ranks={"2": 2})
    first, second, third = adapters
    assert torch.equal(first.P[:, :2], second.P) and torch.equal(first.P[:8], third.P)
    assert torch.equal(first.Q[:2], second.Q[:, :16]) and torch.equal(third.Q, torch.cat([third.Q[:2], third.Q[2:]]))
    assert torch.equal(third.Q[:2], second.Q) and (third.lam == 0.1).all() and not third.lam_out.any()
    for adapter in adapters:
        nn.init.normal_(adapter.lam)
        nn.init.normal_(adapter.lam_out)
    x = torch.randn(5, 16)
    wanted = torch.diag(first.lam_out) @ first.P @ torch.diag(first.lam) @ first.Q
    torch.testing.assert_close(first.delta_weight(), wanted.detach())
    for training in (False, True):
        first.train(training)
        torch.testing.assert_close(first(x), first.base_layer(x) + x @ wanted.T)
    torch.testing.assert_close(first.singular_values(), torch.linalg.svdvals(wanted.double())[:3].detach())
    assert adapters.trainable_params() == (3 + 24) + (2 + 24) + (3 + 8)
    assert adapters.num_params() == 3 * 40 + 2 * 48 + 3 * 32


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("init", FIXED)
def test_variants_travel_as_plain_lora_and_merge(init, layout, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_bert()
    adapters = ra.attach(model, rank=4, alpha=3, init=init)
    for adapter in adapters:
        for factor in adapter.trained():
            nn.init.normal_(factor, std=2.0)
    prune(adapters, [1, 4, 0, 2] * 3)
    ra.save(adapters, tmp_path, layout)
    other = make_bert()
    loaded = ra.load(other, tmp_path)
    held = {name: rank for name, rank in adapters.ranks().items() if rank}
    assert {name: rank for name, rank in loaded.ranks().items() if rank} == held
    assert torch.equal(logits_of(other), logits_of(model))
    theirs = peft.PeftModel.from_pretrained(make_bert(), tmp_path)
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=1e-5, atol=1e-5)
    before = logits_of(model)
    torch.testing.assert_close(logits_of(ra.merge(adapters)), before, rtol=1e-4, atol=1e-5)
    assert (before - logits_of(make_bert())).abs().max() > 0.01


def saved_shapes(adapter: Adapter, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of everything the graph keeps for the backward pass, frozen weights apart."""
    shapes, own = [], {p.data_ptr() for p in adapter.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x).sum()
    return shapes


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("init", TRAINED)
def test_an_adapter_keeps_its_input_only_where_q_is_trained(init, needs_x):
    tokens, d_in, d_out, rank = 50, 6, 10, 3
    adapter = Adapter(nn.Linear(d_in, d_out).requires_grad_(False), rank, 0.7, init)
    shapes = saved_shapes(adapter, torch.randn(tokens, d_in, requires_grad=needs_x))
    per_token = [shape for shape in shapes if tokens in shape]
    assert ((tokens, d_in) in per_token) == ("Q" in TRAINED[init])
    # z, with ones for the bias where Python computes
    assert {(tokens, rank), (tokens, rank + 1)} & set(per_token) and (tokens, d_out) not in per_token


@pytest.mark.parametrize("init", FIXED)
def test_the_same_gradients_as_the_plain_formula(init):
    torch.manual_seed(0)
    adapter = Adapter(nn.Linear(6, 10).requires_grad_(False), 3, 0.7, init, dtype=torch.float64).double()
    for factor in adapter.trained():
        nn.init.normal_(factor)
    results = []
    for _ in range(2):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        adapter.zero_grad()
        adapter(x).square().sum().backward()
        results.append([x.grad, *[p.grad.clone() for p in adapter.trained()]])
        adapter.base_layer.register_forward_hook(lambda *_: None)  # from here on by the plain formula
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_second_derivatives_need_what_is_not_kept():
    adapter = Adapter(nn.Linear(6, 10).requires_grad_(False), 3, 0.7, "lora-fa")
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RankallocError, match=r"in evaluation mode \(model.eval\(\)\)"):
        torch.autograd.grad(adapter(x).square().sum(), x, create_graph=True)
    adapter.eval()
    grad, = torch.autograd.grad(adapter(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert adapter.P.grad is not None


# --- LoRA-FA and VeRA: ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", FIXED)
def test_methods_that_need_the_basis_say_which_do_not(init):
    fit = []
    for name, method in METHODS.items():
        try:
            require_trainable(method, init)
            fit.append(name)
        except ConfigError as error:
            assert init in str(error) and "\n" not in str(error)
            if method.when == "during":
                assert all(other in str(error) for other in OF_FIXED)
    assert tuple(sorted(n for n in fit if METHODS[n].when == "during")) == tuple(sorted(OF_FIXED))
    early = {name for name, method in METHODS.items() if method.when == "before" and method.lora}
    assert early - set(fit) == ({"eva", "gora"} if init == "vera" else set())


@pytest.mark.parametrize("options", [{"canonical": True}, {"orthogonal": 0.1}])
@pytest.mark.parametrize("init", FIXED)
def test_what_would_turn_the_basis_is_refused(init, options):
    adapters = ra.attach(make_mlp(), rank=4, init=init)
    with pytest.raises(ConfigError, match="changes both P and Q"):
        ra.RankController(adapters, ra.RankBudget(ranks=6), STEPS, "first-order", **options)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=6), STEPS, "first-order", canonical=False)
    assert controller.settings.orthogonal == 0.0


@pytest.mark.parametrize(
    ("shrink", "budget"), [("events", {"params": 230}), ("freeze", {"ranks": 5}), (False, {"params": 230})]
)
@pytest.mark.parametrize("method", OF_FIXED)
@pytest.mark.parametrize("init", FIXED)
def test_budgets_are_met_and_runs_resume_to_the_bit(init, method, shrink, budget):
    budget = ra.RankBudget(**budget, every=2)

    def begin():
        model = make_mlp()
        torch.manual_seed(1)
        adapters = ra.attach(model, rank=4, init=init)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        return model, adapters, optimizer, ra.RankController(adapters, budget, STEPS, method, shrink=shrink)

    model, adapters, optimizer, controller = begin()
    train_mlp(model, controller, optimizer, 7)
    saved, memory, state = tensors_of(model), copy.deepcopy(optimizer.state_dict()), controller.state_dict()
    state = {"meta": state["meta"], "tensors": {k: v.clone() for k, v in state["tensors"].items()}}
    train_mlp(model, controller, optimizer, STEPS)
    plan, ranks = controller.schedule, list(adapters.ranks().values())
    assert 0 <= plan.target - plan.spent(ranks) < min(c for c, r in zip(plan.costs, ranks, strict=True) if r < 4)
    assert shrink is False or all(a.rank == a.live_rank for a in adapters)
    whole = tensors_of(model)

    again, adapters, optimizer, controller = begin()
    again.load_state_dict(saved)
    optimizer.load_state_dict(memory)
    controller.load_state_dict(state)
    train_mlp(again, controller, optimizer, STEPS)
    assert_same(whole, tensors_of(again))


@pytest.mark.parametrize("method", ["uniform", "eva", "gora", "fim"])
def test_ranks_chosen_before_training_go_with_a_frozen_q(method):
    batches = [(x := torch.randn(32, 16), x[:, :8].sin()) for _ in range(2)]
    model = make_mlp()
    budget = ra.RankBudget(ranks=6)
    plan = ra.plan_ranks(model, batches, budget, method, rank=4, loss_fn=nn.functional.mse_loss)
    adapters = ra.attach(model, ranks=plan, init="lora-fa")
    before = [a.Q.clone() for a in adapters]
    controller = ra.RankController(adapters, budget, STEPS, method)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), STEPS)
    assert sum(adapters.ranks().values()) == 6
    assert all(torch.equal(a.Q, q) for a, q in zip(adapters, before, strict=True))


def test_a_plan_with_factors_is_none_for_vera():
    model, budget = make_mlp(), ra.RankBudget(ranks=6)
    plan = ra.plan_ranks(model, [torch.randn(32, 16)], budget, "eva", rank=4)
    with pytest.raises(ConfigError, match=r"pass ranks=dict\(plan\)"):
        ra.attach(model, ranks=plan, init="vera")
    adapters = ra.attach(model, rank=4, init="vera")
    with pytest.raises(ConfigError, match="'eva' starts adapters from factors it computes"):
        RankCallback(adapters, budget, "eva")


def test_a_gradient_of_lambda_without_a_trained_lambda():
    """P and Λ act through their product, so the score of a fixed Λ is the one it would have if it were trained."""
    torch.manual_seed(0)
    values = {}
    for trained in (False, True):
        adapter = Adapter(nn.Linear(6, 10).requires_grad_(False), 3, 0.7, "lora-fa")
        with torch.no_grad():
            for factor in (adapter.P, adapter.Q):
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(factor.numel())))
            adapter.base_layer.weight.fill_(0.1)
            adapter.base_layer.bias.zero_()
        adapter.lam.requires_grad_(trained)
        score = SCORES["first-order"]([adapter])
        adapter(torch.ones(4, 6) + torch.eye(4, 6)).square().sum().backward()
        score.observe()
        values[trained] = score.values()[0]
    torch.testing.assert_close(values[False], values[True])
    assert values[True].min() > 0


def test_a_triplet_of_lora_fa_that_comes_back_begins_at_zero():
    adapter = Adapter(nn.Linear(6, 10).requires_grad_(False), 3, 0.7, "lora-fa")
    nn.init.normal_(adapter.P)
    adapter.drop(torch.tensor([True, False, True]))
    assert adapter.lam.tolist() == [1.0, 0.0, 1.0] and not adapter.P[:, 1].any() and adapter.P[:, 0].any()
    nn.init.normal_(adapter.P)  # as momentum would
    delta = adapter.delta_weight()
    adapter.drop(torch.tensor([True, True, False]))
    assert adapter.lam.tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(adapter.delta_weight(), delta - 0.7 * adapter.P[:, 2:] @ adapter.Q[2:] - (
        delta - 0.7 * adapter.P[:, :1] @ adapter.Q[:1]
    ))
    adapter(torch.ones(2, 6)).sum().backward()
    assert adapter.P.grad[:, 1].any()
