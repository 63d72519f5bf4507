"""Mixtures: exact at every corner where the answer is known, and the same function however it is called."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.adapters.gates import mean_so_far
from rankalloc.errors import AdapterFileError, BudgetError, ConfigError, TargetError
from tests.support.architectures import ARCHITECTURES
from tests.support.models import assert_same, logits_of, make_bert, make_llama, make_mlp, randomize, token_ids
from tests.support.training import make_trainer

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
GATES = ["layer", "model"]


def folder_of(path, seed, make=make_llama, **attach):
    adapters = ra.attach(make(), rank=3, **attach)
    randomize(adapters, seed)
    return ra.save(adapters, path)


def assert_near(one, other, share=1e-6):
    """Equal but for rounding: within a share of their size."""
    assert one.shape == other.shape and (one - other).norm() <= share * other.norm()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one decoder, the second of the attention alone."""
    root = tmp_path_factory.mktemp("adapters")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return [folder_of(root / "a", 1), folder_of(root / "b", 2, target_modules=attention, alpha=12)]


def opened(mixture, size=0.1, seed=4):
    """The mixture with gates that depend on the input."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in mixture.gates.values():
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=draw) * size)
            gate.bias.copy_(torch.randn(gate.bias.shape, generator=draw) * size)
    return mixture


def mixed(folders, gate="layer", **options):
    model = make_llama()
    return model, opened(ra.mix(model, folders, gate=gate, **options))


@pytest.mark.parametrize("gate", GATES)
def test_one_adapter_alone_is_that_adapter_to_the_bit(gate, folders):
    for folder in folders:
        alone, model = make_llama(), make_llama()
        ra.load(alone, folder)
        opened(ra.mix(model, [folder], gate=gate))
        assert torch.equal(logits_of(model), logits_of(alone))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation, gates", [("softmax", (0.3, 0.7)), ("softmax", (1, 0)), ("sigmoid", (0.9, 0.4))])
def test_constant_gates_are_the_composed_adapter(activation, gates, gate, folders, tmp_path):
    ra.compose(folders, gates, out=tmp_path / "sum", missing="zero")
    expected = make_llama()
    ra.load(expected, tmp_path / "sum")
    model, mixture = mixed(folders, gate, activation=activation)
    mixture.fix(gates)
    assert_near(logits_of(model), logits_of(expected))
    exported = make_llama()
    adapters = ra.load(exported, mixture.export(tmp_path / "one"))
    assert_near(logits_of(exported), logits_of(expected))
    assert sum(adapters.ranks().values()) <= 3 * sum(gate > 0 for gate in gates) * len(adapters)


def test_an_exported_mixture_is_plain_lora_within_its_budget(folders, tmp_path):
    _, mixture = mixed(folders)
    mixture.fix(mixture.mean_gates([{"input_ids": token_ids()}]))  # other weights in every layer
    budget = ra.RankBudget(ranks=20)
    mixture.export(tmp_path / "one", budget)
    read = ra.FinishedAdapter(tmp_path / "one")
    assert sum(layer.rank for layer in read.layers.values()) == 20
    peft = pytest.importorskip("peft")
    theirs, ours = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "one"), make_llama()
    ra.load(ours, tmp_path / "one")
    assert_near(logits_of(theirs), logits_of(ours))


@pytest.mark.parametrize("budget", [{"ranks": 17}, {"ranks": 40, "min_rank": 1}, {"params": 3000}])
def test_all_ranks_together_cost_the_budget(budget, folders):
    budget = ra.RankBudget(**budget)
    mixture = ra.mix(make_llama(), folders, budget)
    total = sum(rank for ranks in mixture.ranks().values() for rank in ranks.values())
    assert total == budget.ranks if budget.ranks else 3000 - 96 < mixture.num_params() <= 3000
    assert mixture.cut.spent == (total if budget.ranks else mixture.num_params())
    with pytest.raises(BudgetError, match="these adapters together"):
        ra.mix(make_llama(), folders, ra.RankBudget(ranks=1000))


def test_an_adapter_at_a_larger_scale_does_not_crowd_out_the_other(folders, tmp_path):
    given = [folders[0], folder_of(tmp_path / "large", 2, alpha=60)]

    def kept(**options):
        ranks = ra.mix(make_llama(), given, ra.RankBudget(ranks=20), **options).ranks()
        return [sum(each.values()) for each in ranks.values()]

    fair, plain = kept(), kept(balance=False)
    assert sum(fair) == sum(plain) == 20 and plain == [0, 20] and 5 < fair[0] < 15


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_weights_whatever_the_input(gate, activation, folders):
    model, mixture = mixed(folders, gate, activation=activation)
    with mixture.watching() as seen, torch.no_grad():
        model(token_ids())
    assert seen.keys() == mixture.gates.keys() and all(len(calls) == 1 for calls in seen.values())
    for (gates,) in seen.values():
        assert gates.shape == (3, 8, 2) and (gates > 0).all() and (gates < 1).all() and gates.std(0).min() > 0
        assert activation == "sigmoid" or torch.allclose(gates.sum(-1), torch.ones(3, 8))


@pytest.mark.parametrize("gate", GATES)
def test_rows_padding_and_cache_change_nothing(gate, folders):
    model, _ = mixed(folders, gate)
    ids = token_ids()
    whole = logits_of(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids[[2, 0, 1]]).logits, whole[[2, 0, 1]])
        assert_near(model(ids[1:2]).logits, whole[1:2])
        # a causal model sees nothing of what comes
        assert_near(model(ids[:, :5]).logits, whole[:, :5])
        padding = torch.full((3, 4), 7)
        for side in (-1, 1):
            padded = torch.cat([padding, ids][::side * -1], 1)
            mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)][::side * -1], 1)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model(padded, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            assert_near(out, whole.flatten(0, 1))
    for beams in (1, 3):
        with_cache, without = (model.generate(ids, num_beams=beams, use_cache=use, **GREEDY) for use in (True, False))
        assert torch.equal(with_cache, without)


def test_texts_packed_into_one_row_do_not_see_each_other():
    embedded = torch.randn(1, 7, 4)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    packed = mean_so_far(embedded, torch.ones(1, 7), positions)
    apart = [mean_so_far(part, torch.ones(part.shape[:2])) for part in embedded.split([3, 2, 2], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))
    torch.testing.assert_close(apart[0][0, 2], embedded[0, :3].mean(0))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Two adapters of an encoder, each with a head of its own."""
    root = tmp_path_factory.mktemp("towers")
    return [folder_of(root / name, seed, make_bert) for name, seed in (("a", 1), ("b", 2))]


def test_padding_has_no_vote_in_an_encoder_and_heads_are_mixed(towers):
    model, ids = make_bert(), token_ids()
    with pytest.raises(AdapterFileError, match="heads='first'"):
        ra.mix(model, towers)
    mixture = opened(ra.mix(model, towers, gate="model", heads="mixed"))
    whole = logits_of(model, ids)
    padded, mask = torch.cat([ids, torch.full((3, 4), 7)], 1), torch.cat([torch.ones(3, 8), torch.zeros(3, 4)], 1)
    with torch.no_grad():
        out = model(padded, attention_mask=mask.long()).logits[:, :8]
    assert_near(out, whole)
    for k, folder in enumerate(towers):
        mixture.fix([1.0 - k, float(k)])
        alone = make_bert()
        ra.load(alone, folder)
        assert_near(logits_of(model), logits_of(alone))


def test_a_mixed_head_is_exported_as_one(towers, tmp_path):
    model = make_bert()
    ra.mix(model, towers, heads="mixed").fix([0.25, 0.75]).export(tmp_path / "one")
    one = make_bert()
    ra.load(one, tmp_path / "one")
    assert_near(logits_of(one), logits_of(model))


@pytest.mark.parametrize("train", [("router",), ("router", "scales"), ("scales",)])
def test_gradient_reaches_what_trains_and_nothing_else(train, folders):
    model, mixture = mixed(folders, train=train)
    model.train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {f"{layer}.lam" for layer in mixture.layers if "scales" in train}
    both = [layer for layer, parts in mixture.layers.items() if min(parts.ranks)]
    expected |= {f"{n}.gate.{p}" for n in mixture.layers if "router" in train for p in ("weight", "bias")}
    assert reached == expected and len(both) == 8
    assert {id(p) for p in mixture.parameters()} == {id(p) for n, p in model.named_parameters() if n in expected}


@pytest.mark.parametrize("gate", GATES)
def test_checkpointed_layers_have_the_gradients_of_others(gate, folders):
    found = []
    for checkpointing in (False, True):
        model, mixture = mixed(folders, gate)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        found.append([p.grad.clone() for p in mixture.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gate", GATES)
def test_a_half_precision_base_keeps_its_type(gate, folders):
    model = make_llama().bfloat16()
    opened(ra.mix(model, folders, gate=gate))
    out = logits_of(model)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    single, _ = mixed(folders, gate)
    assert (out.float() - logits_of(single)).norm() < 0.05 * logits_of(single).norm()


@pytest.mark.parametrize("gate", GATES)
def test_a_trainer_trains_saves_and_resumes_to_the_bit(gate, folders, tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(5, rows=32)]

    def run(output, steps, **options):
        model = make_llama()
        mixture = ra.mix(model, folders, ra.RankBudget(ranks=30), gate=gate, train=("router", "scales"))
        trainer = make_trainer(model, output, data=data, steps=steps, **options)
        return model, mixture, trainer

    model, mixture, trainer = run(tmp_path, 6, save_strategy="steps", save_steps=3)
    before = mixture.state_dict()
    trainer.train()
    after = mixture.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(before[name], after[name]) for name in after if name.endswith((".P", ".Q")))
    again, mixture_again, trainer = run(tmp_path, 6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(after, mixture_again.state_dict())
    # what a checkpoint, and save_pretrained, leave is the mixture
    for folder in (tmp_path / "checkpoint-6", tmp_path / "own"):
        if folder.name == "own":
            model.save_pretrained(folder)
        loaded = make_llama()
        ra.load_mixture(loaded, folder)
        assert torch.equal(logits_of(loaded), logits_of(model))
    other = make_llama()
    resumed = ra.mix(other, folders, ra.RankBudget(ranks=30), gate=gate)
    resumed.load_state_dict(after)
    assert torch.equal(logits_of(other), logits_of(model))
    with pytest.raises(ConfigError, match="another mixture"):
        ra.mix(make_llama(), folders, gate=gate).load_state_dict(after)


def test_a_router_learns_which_adapter_an_input_is_for(tmp_path):
    """Two functions, told apart by a feature: the router finds the right adapter for each input."""
    base, folders = make_mlp(), []
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2):
        folders.append(folder_of(tmp_path / str(seed), seed, make_mlp))
    targets = []
    for folder in folders:
        alone = make_mlp()
        ra.load(alone, folder)
        targets.append(logits_of(alone, x))
    target = torch.where(x[:, :1] > 0, *targets)
    mixture = ra.mix(base, folders)

    def error():
        with torch.no_grad():
            return float((base(x) - target).square().mean())

    average = error()
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.05)
    for _ in range(150):
        (base(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error() < 0.3 * average
    side = [mixture.mean_gates([x[x[:, 0] * sign > 0.5]])["0"][0] for sign in (1, -1)]
    assert side[0] > 0.7 > 0.3 > side[1]


class Everything(nn.Module):
    """A layer of every kind that is no nn.Linear, and one that is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.grouped = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.wide, self.out = nn.Conv2d(1, 4, (3, 8), padding=(1, 0)), nn.Linear(12, 5)

    def forward(self, ids):
        x = self.grouped(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(torch.cat([x, self.wide(x[:, None])[..., 0].transpose(1, 2)], -1))


def test_layers_of_every_kind_are_mixed_and_exported(tmp_path):
    make, targets = Everything, ["words", "grouped", "wide", "out"]
    folders = [folder_of(tmp_path / str(seed), seed, make, target_modules=targets) for seed in (1, 2)]
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    alone, model = make(), make()
    ra.load(alone, folders[1])
    mixture = ra.mix(model, folders)
    with pytest.raises(TargetError, match="has none; mix with gate='layer'"):
        ra.mix(make(), folders, gate="model")
    assert torch.allclose(logits_of(ra.mix(again := make(), folders[1:]).model, ids), logits_of(alone, ids)), again
    mixture.fix([0, 1])
    assert_near(logits_of(model, ids), logits_of(alone, ids))
    mixture.fix([0.6, 0.4]).export(tmp_path / "one")
    one = make()
    ra.load(one, tmp_path / "one")
    assert_near(logits_of(one, ids), logits_of(model, ids))
    opened(mixture)
    assert torch.equal(logits_of(model, ids[[1, 0]]), logits_of(model, ids)[[1, 0]])


def test_a_copy_is_a_mixture_of_its_own(folders):
    for gate in GATES:
        model, mixture = mixed(folders, gate)
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        copied = copy.deepcopy(model)
        expected = logits_of(model)
        opened(mixture, seed=9)
        assert torch.equal(logits_of(copied), expected) and not torch.equal(logits_of(model), expected)
        assert torch.equal(copied.generate(token_ids(), **GREEDY), copied.generate(token_ids(), **GREEDY))


def test_a_mixture_leaves_the_model_as_it_was(folders):
    model = make_llama()
    before, names, own = logits_of(model), dict(model.named_parameters()).keys(), dict(vars(model))
    for gate in GATES:
        mixture = ra.mix(model, folders, gate=gate)
        assert mixture.detach() is model and torch.equal(logits_of(model), before)
        assert dict(model.named_parameters()).keys() == names and all(p.requires_grad for p in model.parameters())
        assert vars(model).keys() == own.keys() and not model._forward_pre_hooks and not model._forward_hooks
        assert model.generate(token_ids(), **GREEDY).shape == (3, 14)
        with pytest.raises(ra.RankallocError, match="taken out of its model"):
            mixture.export("nowhere")


@pytest.mark.parametrize("ask, sentence", [
    (lambda mixture, path: mixture.export(path), "depend on the input, so no single adapter"),
    (lambda mixture, path: ra.merge(mixture), "cannot be folded into the weights"),
    (lambda mixture, path: ra.detach(mixture), "cannot be folded into the weights"),
    (lambda mixture, path: ra.save(mixture, path), "mixture.save"),
    (lambda mixture, path: ra.attach(mixture.model, rank=2), "a mixture of adapters already"),
    (lambda mixture, path: mixture.fix([0.5, 0.6]), "add up to 1.1"),
    (lambda mixture, path: mixture.fix([0.5, 0.2, 0.3]), "2 adapters, and 3 gates"),
    (lambda mixture, path: mixture.fix({"model": [0.5, 0.5]}), "is in one alone"),
    (lambda mixture, path: mixture.fix([float("nan"), 1]), "got nan"),
    (lambda mixture, path: mixture.mean_gates([]), "at least one batch"),
    (lambda mixture, path: mixture.train_only("gates"), "some of router, scales, heads"),
    (lambda mixture, path: mixture.train_only("heads"), "no task heads"),
    (lambda mixture, path: mixture.model.save_pretrained(path, push_to_hub=True), "save it to a folder"),
    (lambda mixture, path: mixture.model.save_pretrained(path, state_dict={
        "model.layers.0.mlp.up_proj.lam": torch.zeros(3)}), "other weights than the model has"),
])
def test_what_a_mixture_cannot_do_is_said(ask, sentence, folders, tmp_path):
    model, mixture = mixed(folders)
    before = logits_of(model)
    with pytest.raises(ra.RankallocError, match=sentence) as caught:
        ask(mixture, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name, sentence", [
    ("t5", "reads two"), ("vit", "has none"), ("gemma3n", None), ("mamba", None), ("distilbert", None),
])
def test_architectures_with_one_text_take_one_gate(name, sentence, tmp_path):
    architecture = ARCHITECTURES[name]
    adapters = ra.attach(architecture.build(), rank=2, modules_to_save=())
    randomize(adapters)
    folder, inputs = ra.save(adapters, tmp_path / "a"), architecture.inputs(0)
    model, alone = architecture.build().eval(), architecture.build().eval()
    if sentence:
        with pytest.raises(TargetError, match=sentence):
            ra.mix(model, [folder], gate="model")
    ra.load(alone, folder)
    opened(ra.mix(model, [folder], gate="layer" if sentence else "model"))
    with torch.no_grad():
        one, other = (next(v for v in m(**inputs).values() if torch.is_tensor(v) and v.dim()) for m in (model, alone))
    assert_near(one, other)


@pytest.mark.parametrize("options, sentence", [
    ({"gate": "token"}, "unknown gate"), ({"activation": "relu"}, "unknown activation"),
    ({"train": "router"}, "a list of some of"), ({"train": ()}, "a list of some of"),
    ({"heads": "all"}, "unknown heads"),
])
def test_options_that_do_not_exist_change_nothing(options, sentence, folders):
    model = make_llama()
    with pytest.raises(ConfigError, match=sentence):
        ra.mix(model, folders, **options)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="takes several adapters"):
        ra.mix(model, folders[0])
    with pytest.raises(ConfigError, match="at least one"):
        ra.mix(model, [])
    with pytest.raises(AdapterFileError, match="another base model"):
        ra.mix(make_bert(), folders)
    with pytest.raises(AdapterFileError, match="another model: this one has no layer"):
        ra.mix(make_bert(), folders, check_base=False)


def test_the_gate_of_a_model_is_not_asked_without_its_text(folders):
    model, _ = mixed(folders, "model")
    ids = token_ids()
    calls = {
        "call the model that was given": lambda: model.model(ids),
        "let model.generate continue it": lambda: model(
            ids[:, -1:], past_key_values=model(ids, use_cache=True).past_key_values
        ),
        "without input_ids": lambda: model(),
        "need an attention_mask of the shape": lambda: model(ids, attention_mask=torch.ones(3, 1, 8, 8)),
    }
    for sentence, call in calls.items():
        with pytest.raises(ra.RankallocError, match=sentence):
            call()
    # embeddings say as much as ids
    with torch.no_grad():
        given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert_near(given, logits_of(model, ids))


@pytest.fixture
def saved(folders, tmp_path):
    _, mixture = mixed(folders, budget=ra.RankBudget(ranks=30))
    return mixture.save(tmp_path / "mixture")


def edited(folder, **values):
    path = folder / "mixture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "mixture.json").write_text("{"), "mixture.json is damaged"),
    (lambda f: (f / "mixture.json").write_text("[]"), "does not describe a mixture"),
    (lambda f: (f / "mixture.json").write_text("[" * 100_000), "damaged"),
    (lambda f: (f / "mixture.json").write_bytes(b"\xff\xfe"), "damaged"),
    (lambda f: edited(f, version=2), "version 2, and this version of rankalloc reads 1"),
    (lambda f: edited(f, gate="model"), "not of one save"),
    (lambda f: (f / "mixture.safetensors").unlink(), "holds no mixture.safetensors"),
    (lambda f: (f / "mixture.safetensors").write_bytes(b"x" * 40), "damaged or truncated"),
    (lambda f: (f / "mixture.json").unlink(), "holds no mixture.json"),
])
def test_a_damaged_mixture_is_refused_by_name(damage, sentence, saved):
    damage(saved)
    model = make_llama()
    with pytest.raises(AdapterFileError, match=sentence) as caught:
        ra.load_mixture(model, saved)
    assert str(saved) in str(caught.value) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("edit, sentence", [
    (lambda t, about: t.pop("model.layers.0.mlp.up_proj.gate.bias"), "incomplete"),
    (lambda t, about: t["model.layers.0.mlp.up_proj.Q"].fill_(torch.nan), "not finite"),
    (lambda t, about: about["adapters"].append("c"), "do not agree"),
    (lambda t, about: about["layers"]["model.layers.0.mlp.up_proj"]["ranks"].append(-1), "damaged"),
    (lambda t, about: about["layers"].update({"lm_head.x": {"d_in": 4, "d_out": 4, "ranks": [0, 0]}}), "incomplete"),
    (lambda t, about: about.pop("activation"), "damaged"),
])
def test_contents_that_do_not_fit_are_refused(edit, sentence, saved):
    from safetensors.torch import load_file, save_file

    from rankalloc.files import sha256_of

    tensors, about = load_file(saved / "mixture.safetensors"), json.loads((saved / "mixture.json").read_text())
    edit(tensors, about)
    text = json.dumps(about)
    (saved / "mixture.json").write_text(text)
    save_file(tensors, saved / "mixture.safetensors", {"rankalloc_mixture": sha256_of(text)})
    with pytest.raises(AdapterFileError, match=sentence):
        ra.load_mixture(make_llama(), saved)


def test_no_other_reader_takes_a_mixture_for_an_adapter(folders, saved):
    peft = pytest.importorskip("peft")
    with pytest.raises(AdapterFileError, match="load it with rankalloc.load_mixture"):
        ra.load(make_llama(), saved)
    with pytest.raises(ValueError, match="adapter_config"):
        peft.PeftModel.from_pretrained(make_llama(), str(saved))
    with pytest.raises(AdapterFileError, match="not a mixture but a plain adapter"):
        ra.load_mixture(make_llama(), folders[0])
    with pytest.raises(ConfigError, match="every other reader would take for the mixture"):
        ra.load_mixture(make_llama(), saved).save(folders[0])
    with pytest.raises(AdapterFileError, match="another"):
        ra.load_mixture(make_bert(), saved)
