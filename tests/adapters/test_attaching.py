"""Finding targets, putting adapters in, taking them out, folding them in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.errors import ConfigError, NotAdaptedError, RankallocError, TargetError
from rankalloc.methods.planners.planning import layer_shapes
from tests.support.models import MAKERS, logits_of, make_bert, make_llama, make_mlp, randomize
from tests.support.training import train_mlp


def refused(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


# --- what is adapted -------------------------------------------------------------------------------------------


def test_all_linear_takes_every_linear_layer_but_the_head(bert):
    adapters = ra.attach(bert, rank=4)
    assert len(adapters) == 2 * 6 and list(adapters.heads) == ["classifier"]
    assert all(name.startswith("bert.encoder.layer.") for name in adapters.modules)
    trainable = {n for n, p in bert.named_parameters() if p.requires_grad}
    assert trainable == {n for n in flags(bert) if n.endswith((".P", ".lam", ".Q")) or n.startswith("classifier.")}
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in bert.parameters() if p.requires_grad}


def test_all_linear_leaves_the_language_modelling_head_alone(llama, gpt2):
    assert sorted({n.rsplit(".", 1)[-1] for n in ra.attach(llama, rank=4).modules}) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]
    adapters = ra.attach(gpt2, rank=4)
    assert len(adapters) == 2 * 4 and {a.kind for a in adapters} == {"conv1d"}
    assert not any("lm_head" in name for name in adapters.modules)


def test_all_linear_leaves_a_linear_layer_tied_to_an_embedding_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.embedding.weight

    assert list(ra.attach(Tied(), rank=2).modules) == ["inner"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["query", "value"], 4),
        (["attention.self.query"], 2),
        (["bert.encoder.layer.0.attention.self.key"], 1),
        (r"bert\.encoder\.layer\.1\.attention\.self\.(query|key|value)", 3),
        (lambda name, module: name.endswith("intermediate.dense") and module.out_features == 64, 2),
    ],
    ids=["suffixes", "longer suffix", "full name", "regex", "callable"],
)
def test_ways_to_name_targets(bert, targets, count):
    assert len(ra.attach(bert, rank=2, target_modules=targets)) == count


def test_a_suffix_is_a_whole_name():
    model = nn.ModuleDict({"l1": nn.Linear(4, 4), "l11": nn.Linear(4, 4), "xl1": nn.Linear(4, 4)})
    assert list(ra.attach(model, rank=2, target_modules=["l1"]).modules) == ["l1"]


def test_exclude_modules(bert):
    adapters = ra.attach(bert, rank=2, exclude_modules=["query", "output.dense"])
    assert len(adapters) == 2 * 3


def test_heads_are_named_or_none(bert):
    assert list(ra.attach(make_bert(), rank=2, modules_to_save=[]).heads) == []
    adapters = ra.attach(bert, rank=2, modules_to_save=["classifier", "word_embeddings"])
    assert sorted(adapters.heads) == ["bert.embeddings.word_embeddings", "classifier"]
    assert adapters.head_params() == {"classifier": 5 * 33, "bert.embeddings.word_embeddings": 50 * 32}


def test_ranks_by_layer_and_one_scaling(mlp):
    adapters = ra.attach(mlp, rank=4, alpha=8, ranks={"0": 2, "4": 0})
    assert adapters.ranks() == {"0": 2, "2": 4, "4": 0}
    assert {a.scaling for a in adapters} == {2.0}
    assert adapters.num_params() == 2 * 40 + 4 * 48


def test_a_layer_under_two_parents_is_adapted_once_and_in_both_places():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Tanh()), "b": nn.Sequential(shared)})
    adapters = ra.attach(model, rank=2)
    assert list(adapters.modules) == ["a.0"]
    assert model["a"][0] is model["b"][0] is adapters.modules["a.0"]
    randomize(adapters)
    x = torch.randn(3, 4)
    before = model["b"](x).detach()
    ra.merge(adapters)
    assert model["a"][0] is model["b"][0] is shared
    torch.testing.assert_close(model["b"](x), before, rtol=1e-5, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------

BERT_KINDS = ("What can be adapted: ", "query (2)", "dense (6)")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["LayerNorm"], (
            "cannot adapt bert.embeddings.LayerNorm", "LayerNorm is not one of the layers that rankalloc adapts",
            "(nn.Linear, ", *BERT_KINDS,
        )),
        (["qeury"], ("matches no layer", "did you mean 'query'", *BERT_KINDS)),
        (["query", "valeu"], ("'valeu'", "did you mean 'value'")),
        ("query", ("regular expression for the whole name", *BERT_KINDS)),
        ("(", ("not a valid regular expression",)),
        ([], ("must be names",)),
        ([""], ("must be names",)),
        ([3], ("must be names",)),
        (["classifier"], ("classifier is a task head",)),
        (lambda name, module: False, ("matches no layer", *BERT_KINDS)),
    ],
)
def test_targets_that_do_not_work_are_refused_with_what_would(bert, targets, words):
    before = copy.deepcopy(bert.state_dict()), flags(bert)
    refused(TargetError, lambda: ra.attach(bert, rank=2, target_modules=targets), *words)
    assert flags(bert) == before[1] and bert.state_dict().keys() == before[0].keys()


@pytest.mark.parametrize("exclude", [["qeury"], "query"])
def test_an_exclusion_that_excludes_nothing_is_refused(bert, exclude):
    refused(TargetError, lambda: ra.attach(bert, rank=2, exclude_modules=exclude), "exclude_modules")


@pytest.mark.parametrize("names", [["clasifier"], "classifier", ["bert.embeddings.dropout"]])
def test_heads_that_are_not_there_are_refused(bert, names):
    refused(TargetError, lambda: ra.attach(bert, rank=2, modules_to_save=names), "modules_to_save")


def test_attention_that_reads_its_weight_directly_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    words = ("reads this weight directly", "up (1)")
    refused(TargetError, lambda: ra.attach(model, rank=2, target_modules=["out_proj"]), *words)
    assert list(ra.attach(model, rank=2).modules) == ["up"]


def test_an_encoder_layer_that_bypasses_its_linear_layers_is_refused():
    """torch's fast path reads linear1.weight: an adapter there would act in training and not in use."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "out": nn.Linear(8, 3)})
    words = ("encoder.layers.0.linear1", "directly", "What can be adapted: out (1)")
    refused(TargetError, lambda: ra.attach(model, rank=2, target_modules=["linear1"]), *words)
    assert list(ra.attach(model, rank=2).modules) == ["out"]


def quantised_int8():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


def quantised_dynamic():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            pytest.skip("no quantised kernels in this torch")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)[0]


@pytest.mark.parametrize("make", [quantised_int8, quantised_dynamic])
def test_quantised_layers_are_refused_even_by_all_linear(make):
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "packed": make()})
    refused(TargetError, lambda: ra.attach(model, rank=2), "cannot adapt packed", "quantised", "plain (1)")
    assert list(ra.attach(model, rank=2, exclude_modules=["packed"]).modules) == ["plain"]


def test_attaching_twice_is_refused_and_possible_again_after_detach(bert):
    adapters = ra.attach(bert, rank=2)
    refused(TargetError, lambda: ra.attach(bert, rank=2), "attached already", "detach")
    ra.detach(adapters)
    assert len(ra.attach(bert, rank=2)) == 12


def test_a_rank_of_its_own_above_a_layers_smaller_side_is_refused(mlp):
    refused(TargetError, lambda: ra.attach(mlp, ranks={"4": 9}), "rank 9 is above min(d_in, d_out) = 8 of 4")
    assert not any(isinstance(m, Adapter) for m in mlp.modules())


def test_a_layer_smaller_than_the_rank_begins_at_its_full_rank_and_that_is_said_once(mlp):
    with pytest.warns(UserWarning) as said:
        adapters = ra.attach(mlp, rank=20)
    assert adapters.ranks() == {"0": 16, "2": 20, "4": 8} and adapters.scaling == 2.0
    note = "0 begins at its full rank 16, and 1 more at theirs: 20 is above the shorter side of its weight"
    assert adapters.notes == [note] == [str(w.message) for w in said]
    assert layer_shapes(make_mlp(), 20) == adapters.shapes()
    controller = ra.RankController(adapters, ra.RankBudget(ranks=22, every=2), 6)
    train_mlp(mlp, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 6)
    assert sum(adapters.ranks().values()) == 22


@pytest.mark.parametrize("name", ["gate", "shared_expert_gate", "router"])
def test_gates_and_routers_are_left_out_and_said(name):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.experts = nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
            self.add_module(name, nn.Linear(16, 1 if "shared" in name else 2))

    with pytest.warns(UserWarning, match=f"^{name} is left out: routers and gates with one output decide"):
        adapters = ra.attach(Mixture(), rank=2)
    assert set(adapters.modules) == {"up", "experts.0", "experts.1"}
    assert list(ra.attach(Mixture(), rank=2, target_modules=[name], ranks={name: 1}).modules) == [name]
    assert not ra.attach(Mixture(), rank=2, exclude_modules=[name]).notes


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rank": 0}, "rank"), ({"rank": 2.0}, "2.0"), ({"rank": True}, "True"), ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "nan"), ({"alpha": float("inf")}, "inf"), ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "-0.1"), ({"init": "svdd"}, "did you mean 'svd'"), ({"ranks": {"0": -1}}, "-1"),
        ({"ranks": {"0": 1.5}}, "1.5"),
    ],
)
def test_bad_numbers_are_refused(mlp, arguments, word):
    refused(ConfigError, lambda: ra.attach(mlp, **{"rank": 2, **arguments}), word)


def test_an_unknown_layer_in_ranks_is_refused(mlp):
    refused(TargetError, lambda: ra.attach(mlp, rank=2, ranks={"1": 2}), "'1'")


def test_a_model_without_linear_layers_says_so():
    refused(TargetError, lambda: ra.attach(nn.Sequential(nn.BatchNorm1d(2))), "no layer that rankalloc adapts")


# --- taking out and folding in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_detach_leaves_the_model_as_it_was(name):
    model = MAKERS[name]()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, was, keys = logits_of(model), flags(model), list(model.state_dict())
    adapters = ra.attach(model, rank=4)
    randomize(adapters, heads=False)
    assert (logits_of(model) - before).abs().max() > 1e-2
    assert ra.detach(adapters) is model
    assert torch.equal(logits_of(model), before)
    assert flags(model) == was and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_merged_equals_unmerged(name):
    model = MAKERS[name]()
    plain, adapters = logits_of(model), ra.attach(model, rank=4, alpha=6)
    randomize(adapters)
    adapted = logits_of(model)
    assert (adapted - plain).abs().max() > 1e-2
    assert ra.merge(adapters) is model
    assert not any(isinstance(m, Adapter) for m in model.modules())
    torch.testing.assert_close(logits_of(model), adapted, rtol=1e-5, atol=1e-5)


def test_merging_a_weight_that_another_module_holds_is_refused():
    model = make_llama()
    adapters = ra.attach(model, rank=2, target_modules=["lm_head", "q_proj"])
    randomize(adapters)
    before = logits_of(model)
    refused(RankallocError, lambda: ra.merge(adapters), "lm_head shares its weight", "embed_tokens")
    assert torch.equal(logits_of(model), before) and len(adapters) == 3


def test_merging_into_a_weight_that_is_computed_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    x = torch.randn(3, 8)
    before = model(x).detach()
    refused(RankallocError, lambda: ra.merge(adapters), "weight of 1 is computed")
    assert torch.equal(model(x), before)


def test_merging_an_update_that_is_not_finite_is_refused(mlp):
    adapters = ra.attach(mlp, rank=2)
    adapters.modules["2"].lam.data[0] = float("nan")
    before = mlp[0].base_layer.weight.clone()
    refused(RankallocError, lambda: ra.merge(adapters), "update of 2 is not finite")
    assert torch.equal(mlp[0].base_layer.weight, before)


def test_merging_rounds_once_into_half_precision():
    model = make_mlp().bfloat16()
    weight = model[0].weight.clone()
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    expected = (weight.float() + adapters.modules["0"].delta_weight()).bfloat16()
    ra.merge(adapters)
    assert torch.equal(model[0].weight, expected) and model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("act", [ra.merge, lambda a: ra.save(a, "never-written"), lambda a: a.check_adapted()])
def test_adaptation_that_was_asked_for_and_never_happened_is_an_error(mlp, act):
    adapters = ra.attach(mlp, rank=4)
    ra.RankController(adapters, ra.RankBudget(ranks=3), total_steps=10)
    refused(NotAdaptedError, lambda: act(adapters), "never were", "controller.update(optimizer)")


def test_adapters_that_were_taken_out_cannot_be_saved(mlp, tmp_path):
    adapters = ra.attach(mlp, rank=2)
    ra.detach(adapters)
    refused(RankallocError, lambda: ra.save(adapters, tmp_path / "a"), "taken out")
    assert not (tmp_path / "a").exists()
