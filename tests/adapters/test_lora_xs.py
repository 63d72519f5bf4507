"""LoRA-XS against its formula written out here, and as an adapter like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.adapters.lora_xs import singular_pair
from rankalloc.errors import ConfigError, RankallocError
from rankalloc.methods import METHODS
from rankalloc.methods.requirements import require_trainable
from rankalloc.training.callback import RankCallback
from tests.support.models import assert_same, logits_of, make_bert, make_gpt2, make_mlp, tensors_of
from tests.support.training import make_trainer, train_mlp

RANK, SCALE = 3, 0.7


class Reference(nn.Module):
    """y = W x + b + s · U_r Σ_r R V_rᵀ x, with torch's SVD and nothing else."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, core: torch.Tensor) -> None:
        super().__init__()
        self.base, self.scale, self.core = base, scale, nn.Parameter(core.clone())
        u, sigma, vh = torch.linalg.svd(base.weight.detach().double(), full_matrices=False)
        signs = torch.stack([row[row.abs().argmax()].sign() for row in vh[:rank]])
        self.left, self.right = u[:, :rank] * sigma[:rank] * signs, vh[:rank] * signs[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.right.to(x).T @ self.core.T @ self.left.to(x).T)


def pair_of(d_in: int = 8, d_out: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Adapter, Reference]:
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False)
    adapter = Adapter(base, RANK, SCALE, "lora-xs", dtype=dtype)
    nn.init.normal_(adapter.core)
    return adapter, Reference(base, RANK, SCALE, adapter.core.detach())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sides", [(8, 11), (11, 8), (5, 5)])
def test_it_computes_its_formula_and_one_step_of_adamw_is_the_same(sides, training):
    adapter, reference = pair_of(*sides)
    adapter.train(training)
    x = torch.randn(2, 4, sides[0], dtype=torch.float64)
    states = []
    for module in (adapter, reference):
        seen = x.clone().requires_grad_()
        optimizer = torch.optim.AdamW([module.core], lr=1e-2)
        out = module(seen)
        out.sin().sum().backward()
        gradient = module.core.grad.clone()
        optimizer.step()
        states.append((out.detach(), seen.grad, gradient, module.core.detach(), module(x).detach()))
    for own, wanted in zip(*states, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-10)
    assert [p is adapter.core for p in adapter.trained()] == [True] and adapter.core.shape == (RANK, RANK)
    wanted = reference.left @ adapter.core.detach() @ reference.right * SCALE
    torch.testing.assert_close(adapter.delta_weight(), wanted)
    torch.testing.assert_close(adapter.singular_values(), torch.linalg.svdvals(wanted)[:RANK])


def test_autocast_rounds_the_product_of_factors_as_it_rounds_a_plain_factor():
    adapter, reference = pair_of(dtype=torch.float32)
    x = torch.randn(6, 8)
    plain = Adapter(adapter.base_layer, RANK, SCALE, "lora")
    with torch.no_grad():
        plain.P.copy_(adapter.left())
        plain.Q.copy_(adapter.Q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for training in (False, True):
            out = adapter.train(training)(x)
            assert torch.equal(out, plain.train(training)(x))
    torch.testing.assert_close(out.float(), reference(x), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert adapter.core.grad.any() and adapter.core.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_dropout_see_the_same_core(reentrant):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (False, True):
        adapter, _ = pair_of()
        adapter.dropout = nn.Dropout(0.5)
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        out = checkpoint(adapter, x, use_reentrant=reentrant) if recompute else adapter(x)
        out.square().sum().backward()
        grads.append((x.grad, adapter.core.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("deficient", [False, True])
def test_the_pair_is_the_truncated_svd_whatever_the_rank_of_the_weight(shape, deficient):
    torch.manual_seed(0)
    layer = nn.Linear(*shape[::-1], bias=False, dtype=torch.float64)
    if deficient:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(shape[0], 2) @ torch.randn(2, shape[1]))
    q, p = singular_pair(layer, 4)
    u, sigma, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(p @ q, u[:, :4] * sigma[:4] @ vh[:4])
    torch.testing.assert_close(p.norm(dim=0), sigma[:4])
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64))
    assert (q.gather(1, q.abs().argmax(1, keepdim=True)) > 0).all()
    again = singular_pair(layer, 2)  # nested, and the same twice
    torch.testing.assert_close(again[0], q[:2])
    assert all(torch.equal(*both) for both in zip(singular_pair(layer, 4), (q, p), strict=True))


def test_a_weight_without_singular_vectors_is_refused_before_the_model_is_changed():
    model = make_mlp()
    model[2].weight.data[1, 1] = float("nan")
    with pytest.raises(RankallocError, match="the weight of 2 is not finite"):
        ra.attach(model, rank=4, init="lora-xs")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_model_without_weights_is_adapted_on_the_meta_device():
    with torch.device("meta"):
        model = make_mlp()
    adapters = ra.attach(model, rank=4, init="lora-xs")
    assert adapters.trainable_params() == 3 * 16 and all(a.P.is_meta for a in adapters)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_it_travels_as_plain_lora_that_peft_reads_and_merges(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    adapters = ra.attach(model, rank=4, alpha=3, init="lora-xs", modules_to_save=())
    assert torch.equal(logits_of(model), logits_of(make()))
    assert adapters.trainable_params() == 16 * len(adapters) < adapters.num_params()
    assert f"{16 * len(adapters)} trained" in repr(adapters)
    for adapter in adapters:
        nn.init.normal_(adapter.core)
    before = logits_of(model)
    assert (before - logits_of(make())).abs().max() > 1e-3
    ra.save(adapters, tmp_path)
    other = make()
    assert ra.load(other, tmp_path).ranks() == adapters.ranks() and torch.equal(logits_of(other), before)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits_of(theirs), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(ra.merge(adapters)), before, rtol=1e-4, atol=1e-5)


def test_it_takes_every_method_that_chooses_before_training_and_does_not_bring_its_own_factors():
    fit = set()
    for name, method in METHODS.items():
        try:
            require_trainable(method, "lora-xs")
            fit.add(name)
        except ConfigError as error:
            assert "lora-xs" in str(error) and "\n" not in str(error)
    early = {name for name, method in METHODS.items() if method.when == "before" and method.lora}
    assert fit == early - {"eva", "gora"}
    model, budget = make_mlp(), ra.RankBudget(ranks=6)
    plan = ra.plan_ranks(model, [torch.randn(32, 16)], budget, "eva", rank=4)
    with pytest.raises(ConfigError, match="singular vectors of each layer's weight; pass ranks=dict"):
        ra.attach(model, ranks=plan, init="lora-xs")
    adapters = ra.attach(model, ranks=dict(plan), rank=4, init="lora-xs")
    assert adapters.trainable_params() == sum(rank**2 for rank in plan.values())
    with pytest.raises(ConfigError, match="'auto' chooses ranks while it trains"):
        ra.RankController(adapters, budget, 8)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_ranks_that_leave_take_their_rows_and_columns_along_and_a_run_resumes_to_the_bit(optimizer):
    budget = ra.RankBudget(ranks=6, every=2)

    def begin():
        model = make_mlp()
        adapters = ra.attach(model, rank=4, init="lora-xs")
        stepping = getattr(torch.optim, optimizer)(adapters.parameters(), lr=1e-2)
        return model, adapters, stepping, ra.RankController(adapters, budget, 16, "uniform")

    def copied(state):
        return {"meta": state["meta"], "tensors": {k: v.clone() for k, v in state["tensors"].items()}}

    model, adapters, stepping, controller = begin()
    train_mlp(model, controller, stepping, 7)
    saved, memory, state = tensors_of(model), copy.deepcopy(stepping.state_dict()), copied(controller.state_dict())
    train_mlp(model, controller, stepping, 16)
    trace = controller.finish()
    assert trace.trained_params_initial == 3 * 16 and trace.trained_params_final == 3 * 4 == sum(
        a.core.numel() for a in adapters
    )
    assert set(adapters.ranks().values()) == {2} and trace.adapter_params_final == adapters.num_params()
    for name, adapter in adapters.modules.items():  # what is left is LoRA-XS of the lower rank
        q, p = singular_pair(adapter.base_layer, 2)
        torch.testing.assert_close(adapter.Q, q.float())
        torch.testing.assert_close(adapter.P, p.float())
        assert adapter.core.any(), name

    again, adapters, stepping, controller = begin()
    again.load_state_dict(saved)
    stepping.load_state_dict(memory)
    controller.load_state_dict(state)
    train_mlp(again, controller, stepping, 16)
    assert_same(tensors_of(model), tensors_of(again))

    another, adapters, _, controller = begin()
    another.load_state_dict(saved)
    adapters.modules["0"].core.data += 1e-3
    with pytest.raises(RankallocError, match="weights"):
        controller.load_state_dict(state)


def test_a_trainer_plans_cuts_and_resumes_it_to_the_bit(tmp_path):
    def run(folder, **resume):
        torch.manual_seed(1)
        model = make_bert()
        adapters = ra.attach(model, rank=4, init="lora-xs")
        callback = RankCallback(adapters, ra.RankBudget(ranks=24), "gradient-share")
        make_trainer(model, folder, [callback], steps=6, save_strategy="steps", save_steps=3).train(**resume)
        assert sum(adapters.ranks().values()) == 24
        assert callback.trace.trained_params_final == sum(rank**2 for rank in adapters.ranks().values())
        return tensors_of(model)

    whole = run(tmp_path)
    assert_same(whole, run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3")))


def test_embeddings_and_grouped_convolutions_have_it_too():
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Conv1d(4, 6, 3, groups=2))
    adapters = ra.attach(model, rank=2, init="lora-xs", target_modules=["0", "1"])
    for adapter in adapters:
        nn.init.normal_(adapter.core)
        wanted = adapter.scaling * adapter.P @ adapter.core @ adapter.Q
        torch.testing.assert_close(adapter.delta_weight(), wanted.detach())
    assert not model[0].Q[:, 0].any()
    assert torch.equal(model[0](torch.tensor([0])), model[0].base_layer(torch.tensor([0])))
    loss = F.mse_loss(model[1](torch.randn(2, 4, 9)), torch.zeros(2, 6, 7))
    loss.backward()
    assert model[1].core.grad.any()
