"""Adapters beside real quantised layers: 4 and 8 bits of bitsandbytes, int8 and int4 of torchao; on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.layers.adaptable import full_weight, shape_of
from rankalloc.layers.quantized import dequantized, scheme_of
from tests.support.models import logits_of, randomize, token_ids
from tests.support.optimizers import EIGHT_BIT
from tests.support.training import make_trainer, train

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# on such a processor bitsandbytes' 4-bit layers round their inputs in evaluation, as 8-bit ones do everywhere
AS_4_BITS = {"rtol": 0.02, "atol": 0.02} if bnb.functional.has_avx512bf16() else {"rtol": 1e-4, "atol": 1e-4}


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=False))


def with_4bit(model):
    for name, linear in list(model.named_children()):
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4",
                compress_statistics=True, compute_dtype=torch.float32,
            )
            layer.load_state_dict(linear.state_dict())
            model._modules[name] = layer.to("cpu")
    return model


def with_8bit(model):
    for name, linear in list(model.named_children()):
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
            )
            layer.load_state_dict(linear.state_dict())
            model._modules[name] = layer.to("cpu")
    return model


def with_torchao(bits):
    def quantise(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # no part of the test extra: where it is installed, transformers imports it in every process
            torchao = pytest.importorskip("torchao.quantization")
        config = torchao.Int8WeightOnlyConfig()
        if bits == 4:  # Int4WeightOnlyConfig's packed kernels need an accelerator
            config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
        torchao.quantize_(model, config)
        return model

    return quantise


SCHEMES = {
    "nf4, double": (with_4bit, "4bit", 0.12), "8 bit": (with_8bit, "8bit", 0.01),
    "torchao int8": (with_torchao(8), "torchao", 0.01), "torchao int4": (with_torchao(4), "torchao", 0.12),
}
each_scheme = pytest.mark.parametrize("quantise, scheme, error", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def llama(folder, **quantised):
    config = BitsAndBytesConfig(**quantised) if quantised else None
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")


@each_scheme
def test_an_adapter_stands_beside_a_quantised_layer(quantise, scheme, error):
    plain, model = make_mlp(), quantise(make_mlp())
    x = torch.randn(5, 64)
    before = model.eval()(x).detach()
    adapters = ra.attach(model, rank=3, alpha=6)
    assert {n: (a.d_in, a.d_out) for n, a in adapters.modules.items()} == {"0": (64, 96), "2": (96, 64)}
    assert {scheme_of(a.base_layer) for a in adapters} == {scheme}
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    for name, adapter in adapters.modules.items():
        assert shape_of(adapter.base_layer) == (adapter.d_in, adapter.d_out)
        weight = full_weight(adapter.base_layer)
        assert weight.shape == (adapter.d_out, adapter.d_in) and weight.is_floating_point()
        original = plain.get_submodule(name).weight
        assert 0 < (weight - original).norm() / original.norm() < error
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    randomize(adapters)
    first = adapters.modules["0"]
    torch.testing.assert_close(first(x) - first.base_layer(x), F.linear(x, first.delta_weight()), **CLOSE)
    ra.detach(adapters)
    assert torch.equal(model(x), before)


@each_scheme
def test_lora_xs_stands_between_singular_vectors_of_the_dequantised_weight(quantise, scheme, error):
    adapters = ra.attach(quantise(make_mlp()), rank=3, init="lora-xs")
    for adapter in adapters:
        values = torch.linalg.svdvals(full_weight(adapter.base_layer).float())[:3]
        torch.testing.assert_close(adapter.P.norm(dim=0), values)
        torch.testing.assert_close(full_weight(adapter.base_layer).float() @ adapter.Q.T, adapter.P, **CLOSE)
    model = adapters.model.train()
    model(torch.randn(5, 64)).square().sum().backward()
    assert all(a.core.grad.any() and a.Q.grad is None for a in adapters)


@each_scheme
def test_it_trains_to_its_budget_and_the_base_stays_as_it_was(quantise, scheme, error):
    model = quantise(make_mlp())
    packed = {name: full_weight(layer).clone() for name, layer in model.named_children() if hasattr(layer, "weight")}
    adapters = ra.attach(model, rank=6, alpha=6)
    budget = ra.RankBudget(params=160 * 5, warmup=0.1, freeze=0.3, every=2)
    controller = ra.RankController(adapters, budget, total_steps=20)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    x = torch.randn(16, 64)
    losses = train(controller, optimizer, 20, lambda _: F.mse_loss(model(x), x.sin()))
    controller.finish()
    assert adapters.num_params() == 800 and sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(full_weight(adapters.modules[n].base_layer), w) for n, w in packed.items())


@pytest.mark.parametrize("double", [True, False])
def test_a_4_bit_weight_that_was_laid_out_anew_for_the_cpu_is_still_read(double):
    """As bitsandbytes does by itself on a CPU with AVX512-BF16, at a layer's first call in evaluation."""
    layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=double, compute_dtype=torch.float32)
    layer = layer.to("cpu")
    before = dequantized(layer)
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert not torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).reshape(96, 128), before)
    found = [dequantized(layer) for _ in range(2)]
    torch.testing.assert_close(found[0], before, rtol=2**-8, atol=0)  # the scales are rounded to bfloat16
    assert found[0].dtype == before.dtype and torch.equal(*found)


@each_scheme
def test_merging_into_a_quantised_base_is_refused_or_says_what_it_lost(quantise, scheme, error):
    model = quantise(make_mlp())
    adapters = ra.attach(model, rank=3)
    randomize(adapters)
    model.eval()
    x = torch.randn(5, 64)
    before = model(x).detach()
    with pytest.raises(RankallocError, match="0 is quantised .*dequantize=True"):
        ra.merge(adapters)
    assert len(adapters) == 2
    merged = ra.merge(adapters, dequantize=True)
    assert merged is model and [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert adapters.merge_loss.keys() == {"0", "2"} and all(0 < loss < 1e-5 for loss in adapters.merge_loss.values())
    # the 8-bit kernel rounds its inputs too
    close = {"8bit": {"rtol": 0.05, "atol": 0.05}, "4bit": AS_4_BITS}.get(scheme, {"rtol": 1e-4, "atol": 1e-4})
    torch.testing.assert_close(merged(x), before, **close)


@pytest.mark.parametrize(
    "dtype, lowest, highest",
    [(torch.float64, 0, 1e-7), (torch.float32, 1e-9, 1e-5), (torch.float16, 1e-4, 0.01), (torch.bfloat16, 1e-3, 0.1)],
)
def test_what_merging_lost_is_the_rounding_of_the_sum(dtype, lowest, highest):
    model = make_mlp().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = ra.attach(model, rank=3)
    randomize(adapters)
    deltas = {name: adapter.delta_weight() for name, adapter in adapters.modules.items()}
    ra.merge(adapters)
    for name, delta in deltas.items():
        exact = before[f"{name}.weight"].double() + delta.double()
        lost = (model.get_submodule(name).weight.double() - exact).norm() / delta.double().norm()
        assert adapters.merge_loss[name] == pytest.approx(lost.item(), rel=1e-6, abs=1e-12)
        assert lowest <= adapters.merge_loss[name] < highest


def test_an_update_that_drowns_in_rounding_is_told_of(caplog):
    model = make_mlp().to(torch.bfloat16)
    adapters = ra.attach(model, rank=3)
    randomize(adapters)
    for adapter in adapters:
        adapter.scaling = 1e-3
    ra.merge(adapters)
    assert min(adapters.merge_loss.values()) > 0.1 and "of the update of" in caplog.text


# --- models that transformers quantises ------------------------------------------------------------------------


def test_qlora_trains_to_its_budget_and_its_adapter_loads_on_every_base(folder, tmp_path):
    """NF4, double quantisation, 8-bit AdamW and the Trainer; then the adapter on both bases, here and in PEFT."""
    peft = pytest.importorskip("peft")
    model = llama(folder, **NF4)
    ids = token_ids(3, rows=32)
    data = [{"input_ids": row, "labels": row} for row in ids]
    untouched = logits_of(model)
    adapters = ra.attach(model, rank=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    assert {scheme_of(a.base_layer) for a in adapters} == {"4bit"}
    budget = ra.RankBudget(ranks=9, warmup=0.1, freeze=0.3, every=2)
    callback = ra.RankCallback(adapters, budget)
    make_trainer(model, tmp_path / "run", [callback], data, steps=12, optim="adamw_bnb_8bit").train()
    assert sum(adapters.ranks().values()) == 9
    trained = logits_of(model)
    assert (trained - untouched).abs().max() > 1e-2
    ra.save(adapters, tmp_path / "uniform", "uniform")
    ra.save(adapters, tmp_path / "compact", "compact")

    again = llama(folder, **NF4)
    assert ra.load(again, tmp_path / "uniform").ranks() == adapters.ranks()
    torch.testing.assert_close(logits_of(again), trained, **CLOSE)
    full = llama(folder)
    ra.load(full, tmp_path / "uniform")
    for layout in ("uniform", "compact"):
        there = peft.PeftModel.from_pretrained(llama(folder, **NF4), tmp_path / layout)
        torch.testing.assert_close(logits_of(there), trained, **CLOSE)
        there = peft.PeftModel.from_pretrained(llama(folder), tmp_path / layout)
        torch.testing.assert_close(logits_of(there), logits_of(full), **CLOSE)

    merged = ra.merge(adapters, dequantize=True)
    torch.testing.assert_close(logits_of(merged), trained, **AS_4_BITS)


def test_a_merged_model_is_saved_as_a_plain_one(folder, tmp_path):
    model = llama(folder, **NF4)
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    assert model.is_quantized is False
    ra.detach(adapters)
    assert model.is_quantized is True
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    merged = ra.merge(adapters, dequantize=True)
    assert not any(scheme_of(module) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(llama(tmp_path)), logits_of(merged), **CLOSE)


@pytest.mark.parametrize("method", ["gora", "eva"])
def test_ranks_are_planned_on_a_quantised_base(folder, method):
    model = llama(folder, **NF4)
    batches = [{"input_ids": token_ids(s), "labels": token_ids(s)} for s in range(2)]
    plan = ra.plan_ranks(model, batches, ra.RankBudget(ranks=14), method, rank=4)
    assert sum(plan.values()) == 14
    ra.attach(model, ranks=plan)


# --- 8-bit optimizers ------------------------------------------------------------------------------------------


def eight_bit_run(make, method="auto", steps=14, **options):
    """A model whose factors have 4096 numbers and more, so that their state is 8-bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1100), nn.Tanh(), nn.Linear(1100, 1024))
    adapters = ra.attach(model, rank=5, alpha=5)
    optimizer = make(adapters.parameters())
    budget = ra.RankBudget(ranks=4, warmup=0.1, freeze=0.3, every=2)
    controller = ra.RankController(adapters, budget, total_steps=steps, method=method, **options)

    def loss_of(step):
        x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(step))
        return F.mse_loss(model(x), x.sin())

    train(controller, optimizer, steps, loss_of)
    controller.finish()
    return adapters, optimizer


@pytest.mark.parametrize("make", EIGHT_BIT.values(), ids=EIGHT_BIT)
def test_ranks_leave_the_memory_of_an_8_bit_optimizer(make):
    adapters, optimizer = eight_bit_run(make)
    assert sum(adapters.ranks().values()) == 4 and all(a.rank == a.live_rank for a in adapters)
    for adapter in adapters:
        for parameter in (adapter.P, adapter.lam, adapter.Q):
            state = optimizer.state[parameter]
            assert torch.isfinite(parameter).all() and state["state1"].shape == parameter.shape
            if state["state1"].dtype is torch.uint8:
                assert len(state["absmax1"]) == -(-parameter.numel() // 256)


def test_an_8_bit_state_is_sliced_to_within_a_step_of_its_code():
    from rankalloc.adapters import memory
    from rankalloc.adapters.optimizer_state.packed import unpacked

    torch.manual_seed(0)
    adapters = ra.attach(nn.Sequential(nn.Linear(1024, 1100)), rank=5)
    optimizer = EIGHT_BIT["adamw"](adapters.parameters())
    for parameter in adapters.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    (adapter,) = adapters
    state = optimizer.state[adapter.P]
    before = {key: unpacked(state, key) for key in ("state1", "state2")}
    assert state["state1"].dtype is torch.uint8 and before["state1"].abs().max() > 0
    adapter.drop(torch.tensor([True, False, True, True, False]))
    memory.shrink(adapters, optimizer)
    for key, value in before.items():
        kept, scale = value[:, [0, 2, 3]], value.abs().max()
        torch.testing.assert_close(unpacked(state, key), kept, rtol=0, atol=0.02 * scale.item())


def test_a_state_that_cannot_be_sliced_is_told_of_at_the_first_step():
    with pytest.raises(RankallocError, match="AdEMAMix8bit keeps .*shrink=False"):
        eight_bit_run(lambda p: bnb.optim.AdEMAMix8bit(p, lr=1e-3), method="first-order")


def test_a_kind_of_quantisation_that_is_not_known_is_named():
    with pytest.raises(RankallocError, match="Linear is quantised in a way"):
        dequantized(nn.Linear(4, 4))
