"""Embeddings and convolutions: the plain formula, PEFT's file, and everything the linear layers can do."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.adapters.triplets import INITS
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError, TargetError
from rankalloc.layers.adaptable import weight_view
from tests.support.models import logits_of, make_llama, prune, randomize, tensors_of
from tests.support.towers import CONVOLUTIONS, adapt, ids, make

PEFT_IS_WRONG = ("dilated", "reflect", "groups, dilated, circular")


@torch.no_grad()
def merged_output(kind: str, adapters) -> torch.Tensor:
    """What the same model gives with s P Λ Q added to its weights by hand."""
    model = make(kind)
    for name, adapter in adapters.modules.items():
        layer = model.get_submodule(name)
        delta = adapter.scaling * adapter.P @ torch.diag(adapter.lam) @ adapter.Q
        layer.weight.data += delta.T if name == "embedding" else delta.reshape(layer.weight.shape)
    return model(ids())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_adapter_adds_its_matrix_to_the_weight(kind, training):
    model, adapters = adapt(kind)
    before = model(ids())
    randomize(adapters)
    expected = merged_output(kind, adapters)
    model.train(training)
    torch.testing.assert_close(model(ids()), expected, rtol=1e-4, atol=1e-5)
    model.eval()
    assert (before - expected).abs().max() > 0.1
    ra.merge(adapters)
    torch.testing.assert_close(model(ids()), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, Adapter) for module in model.modules())


@pytest.mark.parametrize("kind", ["groups, dilated, circular", "1d", "3d"])
def test_gradients_of_a_convolution(kind):
    torch.manual_seed(0)
    base = CONVOLUTIONS[kind]().double().requires_grad_(False)
    adapter = Adapter(base, 2, 0.7, dtype=torch.float64)
    nn.init.normal_(adapter.lam)
    x = torch.randn(1, 4, *[4] * (base.weight.dim() - 2), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(adapter, (x,))
    adapter(x).square().sum().backward()
    whole = base.weight.detach().clone().requires_grad_()
    factors = [p.detach().clone().requires_grad_() for p in (adapter.P, adapter.lam, adapter.Q)]
    delta = (0.7 * factors[0] @ torch.diag(factors[1]) @ factors[2]).reshape(whole.shape)
    base._conv_forward(x.detach(), whole + delta, base.bias).square().sum().backward()
    for own, reference in zip((adapter.P, adapter.lam, adapter.Q), factors, strict=True):
        torch.testing.assert_close(own.grad, reference.grad)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_file_comes_back_and_peft_computes_the_same_from_it(kind, layout, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters = adapt(kind)
    randomize(adapters)
    prune(adapters, (3, 2, 1))
    if kind in PEFT_IS_WRONG:
        with pytest.warns(UserWarning, match="layer: PEFT leaves"):
            ra.save(adapters, tmp_path, layout)
    else:
        ra.save(adapters, tmp_path, layout)
    again = make(kind)
    loaded = ra.load(again, tmp_path)
    assert list(loaded.ranks().values()) == [3, 2, 1]
    assert torch.equal(again(ids()), model(ids()))
    assert loaded.num_params() == adapters.num_params()
    if kind not in PEFT_IS_WRONG:
        other = peft.PeftModel.from_pretrained(make(kind), tmp_path)
        torch.testing.assert_close(other(ids()), model(ids()), rtol=1e-5, atol=1e-5)
        return
    other = peft.PeftModel.from_pretrained(make(kind), tmp_path)
    with contextlib.suppress(RuntimeError):  # the warning is needed as long as this is so
        assert not torch.allclose(other(ids()), model(ids()), atol=1e-3)
    if kind in ("dilated", "reflect"):  # merged, they are right there too
        torch.testing.assert_close(other.merge_and_unload()(ids()), model(ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["strided", "1d", "3d"])
def test_an_adapter_made_by_peft_computes_the_same_here(kind, tmp_path):
    peft = pytest.importorskip("peft")
    base = make(kind)
    if kind == "3d":
        base.layer = nn.Conv3d(4, 6, 2)
    weights = base.state_dict()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embedding", "layer"], use_rslora=True)
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = make(kind)
    if kind == "3d":
        ours.layer = nn.Conv3d(4, 6, 2)
    ours.load_state_dict({k: weights[k] for k in ours.state_dict()})
    ra.load(ours, tmp_path)
    torch.testing.assert_close(ours(ids()), theirs.eval()(ids()), rtol=1e-5, atol=1e-5)


def test_a_grouped_convolution_of_pefts_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make("groups"), peft.LoraConfig(r=4, target_modules=["layer"]))
    nn.init.normal_(theirs.base_model.model.layer.lora_B["default"].weight)
    theirs.save_pretrained(tmp_path)
    model = make("groups")
    with pytest.raises(AdapterFileError, match="layer: it was trained over all 2 groups"):
        ra.load(model, tmp_path)
    assert isinstance(model.layer, nn.Conv2d)
    with pytest.raises(AdapterFileError, match=r"layer: its factors are \(4, 4, 3, 3\)"):
        ra.load(make("plain"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "method"), [("groups", "auto"), ("reflect", "auto"), ("groups", "elalora"), ("groups", "sora")]
)
def test_ranks_are_chosen_over_all_kinds_of_layers_and_a_run_resumes_to_the_bit(kind, method):
    budget = ra.RankBudget(params=250, every=2)

    def begin():
        model, adapters = adapt(kind, init=ra.METHODS[method].init)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-2)
        return model, adapters, optimizer, ra.RankController(adapters, budget, 12, method, seed=1)

    def run(model, optimizer, controller, last):
        model.train()
        for step in range(controller.step, last):
            target = F.one_hot(ids(step).sum(1) % 5, 5).float()
            F.mse_loss(model(ids(step)), target).backward()
            controller.observe()
            optimizer.step()
            controller.update(optimizer)
            optimizer.zero_grad()

    model, adapters, optimizer, controller = begin()
    cost = {name: weight_view(a.base_layer).shape for name, a in adapters.modules.items()}
    assert {n: sum(s) for n, s in cost.items()} == {n: a.params_per_rank for n, a in adapters.modules.items()}
    run(model, optimizer, controller, 5)
    saved, state = tensors_of(model), controller.state_dict()
    memory = optimizer.state_dict()
    memory = {**memory, "state": {k: {n: v.clone() for n, v in s.items()} for k, s in memory["state"].items()}}
    state = {"meta": state["meta"], "tensors": {k: v.clone() for k, v in state["tensors"].items()}}
    run(model, optimizer, controller, 12)
    whole = tensors_of(model)
    assert 250 - max(a.params_per_rank for a in adapters) < adapters.num_params() <= 250
    assert all(a.rank == a.live_rank for a in adapters)

    again, adapters, optimizer, controller = begin()
    again.load_state_dict(saved)
    optimizer.load_state_dict(memory)
    controller.load_state_dict(state)
    run(again, optimizer, controller, 12)
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors_of(again).items())
    # the padding row has been left alone by every allocation and every fresh triplet
    assert adapters.modules["embedding"].delta_weight()[:, 0].abs().max() < 1e-7


def test_canonical_form_of_a_kernel_is_its_svd():
    model, adapters = adapt("groups")
    randomize(adapters)
    before, adapter = model(ids()), adapters.modules["layer"]
    from rankalloc.adapters.canonical import canonicalize

    canonicalize(adapter)
    torch.testing.assert_close(model(ids()), before, rtol=1e-4, atol=1e-5)
    flat = torch.linalg.svdvals(adapter.delta_weight().double())[:3]
    torch.testing.assert_close(adapter.singular_values(), flat, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapter.lam.double() * adapter.scaling, flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_every_parametrisation_begins_at_the_model_itself(init):
    model, adapters = adapt("groups", init=init, dropout=0.5)
    assert torch.equal(model(ids()), make("groups")(ids()))
    model.train()
    model(ids()).square().sum().backward()  # ids are not dropped out
    assert all(p.grad is not None for p in adapters.parameters())
    assert not adapters.modules["embedding"].Q[:, 0].any()


def test_others_read_from_the_adapter_what_they_read_from_the_layer():
    model, _ = adapt("groups")
    assert model.layer.stride == (1, 1) and model.layer.groups == 2 and model.layer.kernel_size == (3, 3)
    assert model.embedding.num_embeddings == 11 and model.embedding.padding_idx == 0 and model.embedding.bias is None


def test_all_linear_means_linear_layers_alone():
    assert list(ra.attach(make(), rank=2).modules) == ["out"]


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Scaled(5, 4), "Scaled computes its output differently from the layer it is derived from"),
        (nn.Embedding(5, 4, max_norm=1.0), "changes its own weight at each call"),
        (nn.ConvTranspose2d(4, 4, 3), r"ConvTranspose2d is not one of the layers that rankalloc adapts \(nn.Linear, "),
    ],
)
def test_layers_that_an_adapter_cannot_stand_beside_are_refused(layer, words):
    with pytest.raises(TargetError, match=words):
        ra.attach(nn.Sequential(layer), rank=2, target_modules=["0"])


def test_planners_that_look_at_inputs_say_which_layer_they_cannot_read():
    targets = ["layer", "out"]
    with pytest.raises(ConfigError, match="'eva' looks at the inputs of linear layers, and layer is a Conv2d"):
        ra.plan_ranks(make(), [ids()], ra.RankBudget(ranks=4), "eva", rank=3, target_modules=targets)
    plan = ra.plan_ranks(make(), None, ra.RankBudget(ranks=4), "uniform", rank=3, target_modules=targets)
    assert plan == {"layer": 2, "out": 2}


def test_an_embedding_tied_to_the_head_is_not_merged(llama):
    adapters = ra.attach(llama, rank=2, target_modules=["embed_tokens"])
    randomize(adapters)
    with pytest.raises(RankallocError, match="shares its weight"):
        ra.merge(adapters)


def test_an_embedding_adapted_by_peft_brings_its_base_weight_along(llama, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = make_llama()
    ra.load(ours, tmp_path)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-5, atol=1e-5)
    resized = make_llama()
    resized.model.embed_tokens.weight.data += 1
    with pytest.raises(AdapterFileError, match="is not this model's model.embed_tokens.weight"):
        ra.load(resized, tmp_path)


@pytest.mark.parametrize("how", ["autocast", "bfloat16 base"])
@pytest.mark.parametrize("kind", ["plain", "groups"])
def test_narrow_types(kind, how):
    model, adapters = adapt(kind)
    randomize(adapters)
    exact = model(ids()).detach()
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.train()(ids())
    else:
        for adapter in adapters:
            adapter.base_layer.bfloat16()
        out = model.train()(ids())
        assert all(p.dtype == torch.float32 for p in adapters.parameters())
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in adapters.parameters())
