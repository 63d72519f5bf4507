"""PEFT's own layers, taken over: what files say of their ranks, what goes on working, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import rankalloc as ra
from rankalloc.adapters.driven import COPIED_LAYERS, alpha_of
from rankalloc.errors import BudgetError, NotAdaptedError, TargetError
from tests.support.models import assert_same, logits_of, make_gpt2, make_llama, make_mlp, tensors_of
from tests.support.peft_models import cut_to, fill, peft_llama, peft_mlp, peft_of


def shrunken(ranks=(3, 0, 2), **config):
    """(model, adapters) of a driven MLP whose layers hold ``ranks``."""
    model = peft_mlp(**config)
    adapters = ra.adopt(model)
    fill(adapters)
    cut_to(adapters, ranks)
    return model, adapters


def saved(model, folder, **options):
    """Save as a script would; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder, **options)
    return json.loads((folder / "adapter_config.json").read_text())


# files


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha": 7, "rank": 3}, {"lora_dropout": 0.1}])
def test_what_peft_saves_is_read_by_peft_and_by_us_to_the_bit(config, tmp_path):
    model, adapters = shrunken(**config)
    written = saved(model, tmp_path)
    assert (written["r"], written["lora_alpha"]) == (config.get("rank", 4), config.get("alpha", 4))
    assert written["rank_pattern"] == {"^4": 2} | ({"^0": 3} if written["r"] != 3 else {})
    assert written["exclude_modules"] == ["2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    ours = make_mlp()
    loaded = ra.load(ours, tmp_path)
    assert loaded.ranks() == {"0": 3, "4": 2}
    torch.testing.assert_close(logits_of(ours), logits_of(model))
    ra.save(adapters, tmp_path / "ours")
    again = PeftModel.from_pretrained(make_mlp(), tmp_path / "ours")
    torch.testing.assert_close(logits_of(again), logits_of(model))


class Nested(nn.Module):
    """Names that end alike and begin alike: l1, l11, and l1 inside block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.l1, self.l11 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.block = nn.ModuleDict({"l1": nn.Linear(16, 16), "l_x": nn.Linear(16, 8)})

    def forward(self, x):
        return self.block["l_x"](self.block["l1"](self.l11(self.l1(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4), (0, 2, 3, 1), (2, 0, 0, 1), (3, 1, 0, 0), (4, 4, 4, 4)])
@pytest.mark.parametrize("exclude", [None, ["l_x"], r"block\.l_x"])
def test_patterns_name_whole_layers(ranks, exclude, tmp_path):
    model = peft_of(Nested(), 4, 8, target_modules=["l1", "l11", "l_x"], exclude_modules=exclude)
    adapters = ra.adopt(model)
    fill(adapters)
    cut_to(adapters, ranks[: len(adapters)])
    written = saved(model, tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert bool(written["rank_pattern"]) == (ranks[: len(adapters)] != (4,) * len(adapters))


def test_a_layer_without_ranks_keeps_its_parameters_and_stays_out_of_the_state_dict():
    model, adapters = shrunken()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    # optimizers keep their order
    assert names == [name for name, p in peft_mlp().named_parameters() if p.requires_grad]
    state = model.state_dict()
    assert not any(".2.lora" in key for key in state)
    model.load_state_dict(state)  # strict: what was left out is not missed
    copied = copy.deepcopy(model)
    assert_same(copied.state_dict(), state)
    fresh = peft_mlp()
    ra.adopt(fresh)
    copied = copy.deepcopy(fresh)  # a hook that looked at the model it was made for would leave this one as it is
    copied.load_state_dict(state)
    assert torch.equal(logits_of(copied), logits_of(model))
    assert [p.shape for p in fresh.parameters()] != [p.shape for p in copied.parameters()]


def test_weights_of_more_and_of_fewer_ranks_find_room_and_the_patterns_follow(tmp_path):
    model, adapters = shrunken((4, 2, 0))
    model.save_pretrained(tmp_path / "more")
    cut_to(adapters, (1, 1, 0))
    model.save_pretrained(tmp_path / "fewer")
    for name, ranks in (("more", [4, 2, 0]), ("fewer", [1, 1, 0]), ("more", [4, 2, 0])):
        model.load_adapter(tmp_path / name, "default", is_trainable=True)
        assert [adapter.rank for adapter in adapters] == [int(adapter.kept.sum()) for adapter in adapters] == ranks
        written = saved(model, tmp_path / "again")
        assert written["rank_pattern"] == {f"^{k}": r for k, r in zip("024", ranks, strict=True) if 0 < r < 4}
        assert torch.equal(logits_of(PeftModel.from_pretrained(make_mlp(), tmp_path / "again")), logits_of(model))


def test_the_scale_stays_when_peft_computes_it_anew():
    model, adapters = shrunken((3, 1, 0), rank=4, alpha=7, use_rslora=True)
    before = logits_of(model)
    for adapter in adapters:
        adapter.layer.set_scale("default", 1)
        adapter.layer.scale_layer(2)
        adapter.layer.unscale_layer()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_gives_back_exactly_the_scale(rslora):
    for rank in range(1, 65):
        for scaling in (2.0, 16 / 12, 0.1, 7 / 3, 1e-3):
            divisor = rank**0.5 if rslora else rank
            assert alpha_of(scaling, rank, rslora) / divisor == pytest.approx(scaling, rel=2e-16)
    assert alpha_of(2.0, 3, False) == 6 and isinstance(alpha_of(2.0, 3, False), int)


# what goes on working


def test_everything_of_a_peft_model_goes_on_working(tmp_path):
    base, model = logits_of(make_llama()), peft_llama()
    adapters = ra.adopt(model)
    fill(adapters)
    cut_to(adapters, [index % 5 for index in range(len(adapters))])
    adapted = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), adapted, rtol=1e-4, atol=1e-5)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file() and (tmp_path / "other" / "adapter_config.json").is_file()
    model.delete_adapter("other")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [["wte"], ["wte", "c_attn"], ["wpe", "c_fc"]])
def test_embeddings_and_conv1d_are_driven(target, tmp_path):
    model = peft_of(make_gpt2(), 4, 8, target_modules=target, fan_in_fan_out=True)
    adapters = ra.adopt(model)
    assert len(adapters) == (1 if len(target) == 1 else 3)
    fill(adapters)
    cut_to(adapters, [2] + [index for index in range(len(adapters) - 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the embedding, which PEFT saves along
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_gpt2(), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert [layer.kind for layer in adapters.layer_records()][0] == "embedding"


def test_heads_that_train_along_are_known():
    model = peft_mlp(target_modules=["0", "2"], modules_to_save=["4"])
    adapters = ra.adopt(model)
    assert list(adapters.heads) == ["4"] and adapters.head_params() == {"4": 24 * 8 + 8}
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_adopting_twice_changes_nothing_more():
    model, adapters = shrunken()
    config, hooks = copy.deepcopy(model.peft_config["default"]), len(model._state_dict_hooks)
    again = ra.adopt(model)
    assert again.ranks() == {"0": 3, "2": 0, "4": 2} and next(iter(again)).P is next(iter(adapters)).P
    assert model.peft_config["default"] == config and len(model._state_dict_hooks) == hooks


def test_an_adapter_that_shares_its_configuration_keeps_its_own():
    """TRL gives the reference adapter the very configuration of the one that trains."""
    model = peft_mlp()
    model.add_adapter("ref", model.peft_config["default"])
    adapters = ra.adopt(model)
    fill(adapters)
    cut_to(adapters, (1, 2, 0))
    assert model.peft_config["ref"].rank_pattern == {} and model.peft_config["ref"].exclude_modules is None
    assert model.peft_config["default"].rank_pattern
    state = model.state_dict()
    assert [len(state[f"base_model.model.0.lora_A.{name}.weight"]) for name in ("ref", "default")] == [4, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_train_in_float32_unless_told_otherwise(dtype):
    for wanted in (torch.float32, None):
        model = peft_mlp()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        adapters = ra.adopt(model, dtype=wanted)
        assert all(p.dtype == (wanted or dtype) for p in adapters.parameters())


def trained_beside_an_average(model, steps=8, when="events"):
    """(adapters, average, its adapters) of ``model`` after a run whose ranks leave, followed by an EMA."""
    adapters = ra.adopt(model)
    fill(adapters)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=2, every=2), steps, shrink=when)
    copies = controller.follow(averaged)
    for step in range(steps):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
        averaged.update_parameters(model)
    return adapters, averaged, copies


@pytest.mark.parametrize("when", ["events", "freeze"])
def test_an_average_of_the_weights_follows_and_is_saved_by_peft(when, tmp_path):
    model = peft_mlp()
    adapters, averaged, copies = trained_beside_an_average(model, when=when)
    assert copies.ranks() == adapters.ranks() and sum(copies.ranks().values()) == 2
    assert 0 in copies.ranks().values()  # a layer that the file has to leave out
    average, trained = logits_of(averaged), logits_of(model)
    assert (average - trained).abs().max() > 1e-3
    own, models = averaged.module.peft_config["default"], model.peft_config["default"]
    assert own is not models and own.rank_pattern == models.rank_pattern and own.rank_pattern
    written = saved(averaged.module, tmp_path)
    assert written["rank_pattern"] == {f"^{name}": rank for name, rank in copies.ranks().items() if rank}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert torch.equal(logits_of(again), average)
    ours = make_mlp()
    ra.load(ours, tmp_path)
    torch.testing.assert_close(logits_of(ours), average)
    cut_to(copies, [0, 0, 0])  # a change of the average's alone is none of the model's
    assert models.rank_pattern and not own.rank_pattern
    assert torch.equal(logits_of(model), trained)


def test_a_pickle_needs_nothing_of_the_view_and_its_averages_are_found_again():
    model = peft_mlp()
    ra.adopt(model)
    data = pickle.dumps(model)
    assert b"adapters.driven" not in data
    again = pickle.loads(data)
    adapters = ra.adopt(again)
    averaged = torch.optim.swa_utils.AveragedModel(again)
    assert {layer for layer in COPIED_LAYERS if layer in set(averaged.modules())} == {
        layer for layer in averaged.modules() if isinstance(layer, LoraLayer)
    }
    assert len(adapters) == 3


# what is refused


def broken(change):
    """A PeftModel whose configuration says ``change``, as one would after such a start."""
    model = peft_mlp()
    for name, value in change.items():
        setattr(model.peft_config["default"], name, value)
    return model


def tied():
    model = peft_mlp()
    layers = [model.base_model.model[0], model.base_model.model[2]]
    layers[1].lora_B["default"].weight = layers[0].lora_B["default"].weight
    return model


def merged():
    model = peft_mlp()
    model.merge_adapter()
    return model


def two_active():
    model = peft_mlp()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def conv():
    torch.manual_seed(0)
    return peft_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 2, 2, target_modules=["0"])


def attention():
    torch.manual_seed(0)
    return peft_of(nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)}), 2, 2, target_modules=["attn"])


def wrapped(model):
    return nn.Sequential(model)


def with_add_adapter():
    model = make_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


ADALORA = AdaLoraConfig(target_modules=["0"], total_step=9, tinit=1, tfinal=1)
IA3 = IA3Config(target_modules=["0"], feedforward_modules=[])
REFUSALS = {
    "a plain model": (make_mlp, "no LoRA layers.*get_peft_model"),
    "our own adapters": (lambda: ra.attach(make_mlp(), rank=2).model, "own adapters"),
    "another method": (lambda: get_peft_model(make_mlp(), IA3), "IA3"),
    "AdaLoRA": (lambda: get_peft_model(make_mlp(), ADALORA), "ADALORA"),
    "DoRA": (lambda: peft_mlp(use_dora=True), "0 in place.*DoRA"),
    "biases in B": (lambda: peft_mlp(lora_bias=True), "lora_bias"),
    "PiSSA": (lambda: peft_mlp(init_lora_weights="pissa"), "pissa"),
    "PiSSA, fast": (lambda: peft_mlp(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "OLoRA": (lambda: peft_mlp(init_lora_weights="olora"), "olora"),
    "CorDA": (lambda: broken({"init_lora_weights": "corda"}), "corda"),
    "LoftQ": (lambda: broken({"init_lora_weights": "loftq"}), "loftq"),
    "LoRA-GA": (lambda: broken({"init_lora_weights": "lora_ga"}), "lora_ga"),
    "trained biases": (lambda: peft_mlp(bias="lora_only"), "bias='none'"),
    "attention in one module": (attention, "MultiheadAttention"),
    "whole parameters": (lambda: peft_mlp(target_modules=[], target_parameters=["0.weight"]), "target_parameters"),
    "a convolution": (conv, "Conv2d"),
    "tied layers": (tied, "0 and 2 share"),
    "merged": (merged, "merged"),
    "several active": (two_active, "default, other.*adapter_name"),
    "inside a wrapper": (lambda: nn.DataParallel(peft_mlp()), "wraps a PeftModel"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_driven_is_refused_and_nothing_changes(case):
    make, words = REFUSALS[case]
    model = make()
    before = tensors_of(model)
    with pytest.raises(TargetError, match=words) as refusal:
        ra.adopt(model)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    assert_same(tensors_of(model), before)


def test_frozen_adapters_and_unknown_names_are_refused(tmp_path):
    model, _ = shrunken()
    model.save_pretrained(tmp_path)
    with pytest.raises(NotAdaptedError, match="is_trainable=True"):
        ra.adopt(PeftModel.from_pretrained(make_mlp(), tmp_path))
    with pytest.raises(TargetError, match="did you mean 'default'"):
        ra.adopt(model, "defualt")
    assert ra.adopt(PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True)).ranks() == {"0": 3, "4": 2}


def test_one_of_several_adapters_can_be_named():
    model = two_active()
    adapters = ra.adopt(model, "other")
    assert adapters.ranks() == {"0": 2}


@pytest.mark.parametrize("budget", [{"ranks": 13}, {"params": 10**6}, {"params": 1}, {"ranks": 2, "min_rank": 1}])
def test_a_budget_that_does_not_fit_is_refused_before_anything_is_trained(budget):
    with pytest.raises(BudgetError) as refusal:
        ra.RankController(ra.adopt(peft_mlp()), ra.RankBudget(**budget), 10)
    assert "\n" not in str(refusal.value)


def test_a_second_run_cannot_spend_what_the_first_one_gave_away():
    with pytest.raises(BudgetError, match="above what these adapters still hold"):
        ra.RankController(shrunken()[1], ra.RankBudget(ranks=6), 10)


@pytest.mark.parametrize("use", [ra.detach, ra.merge])
def test_taking_out_is_left_to_peft(use):
    with pytest.raises(ra.RankallocError, match="unload"):
        use(shrunken()[1])


# our own adapters and PEFT's do not mix (cases of the field, row 7)


@pytest.mark.parametrize(
    "make", [peft_mlp, peft_llama, with_add_adapter, lambda: wrapped(peft_mlp()), lambda: peft_mlp(use_dora=True)]
)
def test_attach_on_a_model_with_adapters_of_peft_points_to_adopt(make, tmp_path):
    model = make()
    before = tensors_of(model)
    with pytest.raises(TargetError, match="rankalloc.adopt.*merge_and_unload"):
        ra.attach(model, rank=2)
    with pytest.raises(TargetError, match="rankalloc.adopt"):
        ra.plan_ranks(model, None, ra.RankBudget(ranks=2), "uniform", rank=2)
    saved_model, _ = shrunken()
    saved_model.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="rankalloc.adopt"):
        ra.load(model, tmp_path)
    assert_same(tensors_of(model), before)


def test_after_peft_has_left_a_model_it_can_be_attached():
    assert ra.attach(peft_mlp().merge_and_unload(), rank=2).ranks() == {"0": 2, "2": 2, "4": 2}


# state dicts and files that are not what they seem


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_weights_of_another_adapter_leave_the_driven_one_alone(tmp_path):
    whole = peft_mlp()
    fill(ra.adopt(whole))
    whole.save_pretrained(tmp_path)  # holds layer 2, which the driven one has lost and "other" never had
    model, adapters = shrunken((4, 0, 4))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0"]))
    before = state_of(model)
    model.load_adapter(tmp_path, "other")
    assert [adapter.rank for adapter in adapters] == [4, 0, 4]
    assert_same(*({k: v for k, v in state.items() if ".default" in k} for state in (before, state_of(model))))


def test_each_of_two_driven_adapters_takes_its_own_file(tmp_path):
    model = peft_mlp()
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2", "4"]))
    a = ra.adopt(model, "default")
    model.set_adapter("b")
    b = ra.adopt(model, "b")
    for adapters, ranks in ((a, (0, 4, 2)), (b, (0, 1, 4))):
        fill(adapters)
        for adapter in adapters:
            for factor in adapter.own_parameters():
                factor.requires_grad_(True)
        cut_to(adapters, ranks)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "b", "b", is_trainable=True)
    assert [[adapter.rank for adapter in adapters] for adapters in (a, b)] == [[0, 4, 2], [0, 1, 4]]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 0, 2)])
def test_what_a_whole_state_lacks_is_missing_and_not_a_layer_without_ranks(ranks):
    model, adapters = shrunken(ranks)
    state = {key: value for key, value in state_of(model).items() if ".4.lora_" not in key}
    with pytest.raises(RuntimeError, match="4.lora_A"):
        model.load_state_dict(state)
    assert [adapter.rank for adapter in adapters] == list(ranks)


@pytest.mark.parametrize("option", [{"trainable_token_indices": [1]}, {"layer_replication": [(0, 2), (1, 2)]}])
def test_what_plain_lora_cannot_hold_is_left_to_peft(option, tmp_path):
    model = peft_llama(**option)
    fill(adapters := ra.adopt(model))
    with pytest.raises(ra.RankallocError, match=f"{next(iter(option))}.*save_pretrained"):
        ra.save(adapters, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weighted_combination_still_works():
    model, adapters = shrunken((4, 4, 4))
    model.add_weighted_adapter(["default"], [1.0], "w", combination_type="linear")
    with model.disable_adapter():
        base = logits_of(model)
    model.set_adapter("w")
    assert not torch.equal(logits_of(model), base)


def test_a_layer_that_has_ranks_again_is_waited_for_by_ddp(tmp_path):
    model, _ = shrunken((0, 4, 4))
    empty = state_of(model)
    full, _ = shrunken((4, 4, 4))
    model.load_state_dict(empty)
    assert any(".0.lora_A" in name for name in model._ddp_params_and_buffers_to_ignore)
    model.load_state_dict(state_of(full))
    assert not any(".0.lora_A" in name for name in model._ddp_params_and_buffers_to_ignore)


def test_a_layer_begins_at_its_own_full_rank(tmp_path):
    model = peft_mlp(rank=20)
    adapters = ra.adopt(model)
    assert adapters.ranks() == {"0": 16, "2": 20, "4": 8} and adapters.notes == [
        "0 begins at its full rank 16, and 1 more at theirs: 20 is above the shorter side of its weight"
    ]
    written = saved(model, tmp_path)
    assert written["rank_pattern"] == {"^0": 16, "^4": 8}
    model(torch.randn(3, 16)).sum().backward()
    assert [adapter.P.grad.shape[1] for adapter in adapters] == [16, 20, 8]
    learned = peft_mlp(rank=20)
    nn.init.ones_(learned.base_model.model[4].lora_B["default"].weight)
    with pytest.raises(TargetError, match="4 has learned at rank 20"):
        ra.adopt(learned)
