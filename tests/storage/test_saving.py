"""Saved adapters: real PEFT computes the same function, and the same adapters give the same bytes."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.errors import ConfigError
from tests.support.models import MAKERS, logits_of, make_bert, prune, randomize
from tests.support.saved import CLOSE, adapted, in_peft, read

pytest.importorskip("peft")


@pytest.mark.parametrize("shrink", [True, False], ids=["in memory", "held at zero"])
@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_peft_computes_what_we_compute(name, layout, shrink, tmp_path):
    plain = logits_of(MAKERS[name]())
    model, adapters = adapted(name, shrink=shrink)
    ours = logits_of(model)
    assert (ours - plain).abs().max() > 1e-2
    assert ra.save(adapters, tmp_path / "a", layout) == tmp_path / "a"
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path / "a")), ours, **CLOSE)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_uniform_layout_is_right_for_readers_that_know_no_patterns(name, tmp_path):
    model, adapters = adapted(name)
    ra.save(adapters, tmp_path, "uniform")
    config, tensors = read(tmp_path)
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["use_rslora"] is False and config["bias"] == "none" and config["peft_type"] == "LORA"
    assert {t.shape[0] for k, t in tensors.items() if ".lora_A." in k} == {4}
    assert {t.shape[1] for k, t in tensors.items() if ".lora_B." in k} == {4}
    # a reader with one global scale and nothing else: plain loops over the file
    other = MAKERS[name]()
    with torch.no_grad():
        for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
            module = other.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * (config["lora_alpha"] / config["r"])
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
        for head in config["modules_to_save"] or []:
            prefix = f"base_model.model.{head}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            other.get_submodule(head).load_state_dict(state)
    torch.testing.assert_close(logits_of(other), logits_of(model), **CLOSE)
    for key in ("rank_pattern", "alpha_pattern"):
        del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path)), logits_of(model), **CLOSE)


def test_the_compact_layout_holds_live_ranks_alone(tmp_path):
    _, adapters = adapted("bert", shrink=False)
    ra.save(adapters, tmp_path, "compact")
    config, tensors = read(tmp_path)
    ranks = {n: r for n, r in adapters.ranks().items() if r}
    stored = {
        k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): t.shape[0]
        for k, t in tensors.items() if "lora_A" in k
    }
    assert stored == ranks and 0 < len(ranks) < len(adapters)
    assert config["rank_pattern"] == config["alpha_pattern"]
    lora = sum(t.numel() for k, t in tensors.items() if "lora_" in k)
    assert lora == adapters.num_params()


@pytest.mark.parametrize("multiple", [1, 3, 8, 16])
def test_padding_to_what_a_server_wants(multiple, tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path, "uniform" if multiple == 1 else None, pad_multiple=multiple)
    assert read(tmp_path)[0]["r"] == -(-4 // multiple) * multiple
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)
    again = make_bert()
    assert ra.load(again, tmp_path).ranks() == adapters.ranks()
    torch.testing.assert_close(logits_of(again), logits_of(model), **CLOSE)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("ranks", [(0,), (1,), (4,)], ids=["all zero", "all one", "all full"])
def test_the_extremes(layout, ranks, tmp_path):
    model, adapters = adapted("bert", ranks=ranks)
    ra.save(adapters, tmp_path, layout)
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)
    again = make_bert()
    loaded = ra.load(again, tmp_path)
    torch.testing.assert_close(logits_of(again), logits_of(model), **CLOSE)
    assert sum(loaded.ranks().values()) == sum(adapters.ranks().values())


class Look(nn.Module):
    """Names that suffix matching and unescaped patterns confuse."""

    def __init__(self):
        super().__init__()
        self.l1, self.l11, self.xl1 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.sub = nn.ModuleDict({"l1": nn.Linear(16, 16), "lx1": nn.Linear(16, 16)})

    def forward(self, x):
        return self.sub["lx1"](self.sub["l1"](self.xl1(self.l11(self.l1(x)))))


def make_look():
    torch.manual_seed(0)
    return Look().eval()


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("ranks", [(1, 2, 3, 4, 2), (1, 0, 0, 0, 0), (0, 3, 0, 1, 0), (4, 4, 1, 4, 4)])
def test_names_that_contain_each_other(layout, ranks, tmp_path):
    model = make_look()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    prune(adapters, ranks)
    ra.save(adapters, tmp_path, layout)
    there = in_peft("", tmp_path, make_look)
    torch.testing.assert_close(logits_of(there), logits_of(model), **CLOSE)
    names = {n for n, m in there.base_model.model.named_modules() if hasattr(m, "lora_A")}
    expected = {n for n, r in adapters.ranks().items() if r or layout == "uniform"}
    assert names == expected
    again = make_look()
    loaded = ra.load(again, tmp_path).ranks()
    assert {n: r for n, r in loaded.items() if r} == {n: r for n, r in adapters.ranks().items() if r}
    assert torch.equal(logits_of(again), logits_of(model))


def test_heads_travel_as_modules_to_save(tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path)
    config, tensors = read(tmp_path)
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "TOKEN_CLS"
    assert torch.equal(tensors["base_model.model.classifier.weight"], model.classifier.weight)
    fresh = make_bert()
    fresh.classifier.weight.data.zero_()
    assert list(ra.load(fresh, tmp_path).heads) == ["classifier"]
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_peft_loads_an_adapter_without_a_head_of_a_model_that_has_one(tmp_path):
    adapters = ra.attach(make_bert(), rank=2, modules_to_save=(), exclude_modules=["classifier"])
    randomize(adapters)
    ra.save(adapters, tmp_path)
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(adapters.model), **CLOSE)


def test_a_head_is_the_one_of_that_name_and_no_other(tmp_path):
    def make():
        torch.manual_seed(0)
        aux = nn.ModuleDict({"score": nn.Linear(4, 4)})
        return nn.ModuleDict({"body": nn.Linear(16, 16), "score": nn.Linear(16, 3), "aux": aux})

    adapters = ra.attach(make(), rank=2, exclude_modules=["aux.score"])
    assert list(adapters.heads) == ["score"]
    ra.save(adapters, tmp_path)
    again = make()
    assert list(ra.load(again, tmp_path).heads) == ["score"]
    assert not again["aux"]["score"].weight.requires_grad


def test_a_gpt2_adapter_says_how_its_weights_lie(tmp_path):
    _, adapters = adapted("gpt2")
    ra.save(adapters, tmp_path, "uniform")
    config, _ = read(tmp_path)
    assert config["fan_in_fan_out"] is True and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_a_run_may_be_saved_between_two_allocations_with_what_grew_back(tmp_path):
    model, adapters = adapted("bert", shrink=False)
    grown = next(a for a in adapters if a.live_rank == 1)
    grown.lam.data[2] = 0.7
    ra.save(adapters, tmp_path, "compact")
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)


@pytest.mark.parametrize(
    "arguments",
    [{"layout": "unifrom"}, {"pad_multiple": 0}, {"layout": "compact", "pad_multiple": 8}, {"pad_multiple": 2.5}],
)
def test_layouts_that_do_not_exist_are_refused(arguments, tmp_path):
    _, adapters = adapted()
    with pytest.raises(ConfigError):
        ra.save(adapters, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_the_same_adapters_give_the_same_bytes(tmp_path):
    """Also across processes: nothing may depend on the order of a hash table."""
    digests = set()
    for attempt in range(12):
        _, adapters = adapted("bert")
        ra.save(adapters, tmp_path / str(attempt))
        digests.add(tuple(
            hashlib.sha256((tmp_path / str(attempt) / name).read_bytes()).hexdigest()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ))
    assert len(digests) == 1
