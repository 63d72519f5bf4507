"""Loaded adapters: what was saved, bit for bit, what PEFT wrote, and one clear sentence for another model."""

from __future__ import annotations

import pytest
import torch

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.errors import AdapterFileError, TargetError
from tests.support.models import MAKERS, logits_of, make_bert, make_gpt2, make_llama, make_mlp
from tests.support.saved import CLOSE, adapted, in_peft, read

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_what_was_saved_loads_bit_for_bit(name, layout, tmp_path):
    model, adapters = adapted(name)
    ra.save(adapters, tmp_path, layout)
    again = MAKERS[name]()
    loaded = ra.load(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert loaded.ranks() == adapters.ranks() and loaded.num_params() == adapters.num_params()
    ra.save(loaded, tmp_path / "b", layout)
    one, two = read(tmp_path)[1], read(tmp_path / "b")[1]
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_loaded_adapters_train_on(tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path)
    again = make_bert()
    loaded = ra.load(again, tmp_path)
    again.train()
    again(torch.arange(16).reshape(2, 8), labels=torch.zeros(2, 8, dtype=torch.long)).loss.backward()
    assert all(a.P.grad.any() and a.lam.grad.any() and a.Q.grad.any() for a in loaded if a.rank)
    assert again.classifier.weight.grad.any() and again.bert.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 2, "c_attn": 3}, "alpha_pattern": {"key": 20, "c_fc": 7}},
        {
            "rank_pattern": {r"layer\.1\..*dense": 5, "h.1.attn.c_proj": 1}, "alpha_pattern": {"query": 1},
            "use_rslora": True,
        },
        {"lora_alpha": 32, "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "patterns and rslora", "gaussian"],
)
def test_an_adapter_made_by_peft_computes_the_same_here(name, options, tmp_path):
    targets = ["query", "key", "dense"] if name == "bert" else ["c_attn", "c_fc", "c_proj"]
    config = peft.LoraConfig(**{
        "r": 4, "lora_alpha": 12, "target_modules": targets, "fan_in_fan_out": name == "gpt2",
        "task_type": "TOKEN_CLS" if name == "bert" else "CAUSAL_LM", **options,
    })
    theirs = peft.get_peft_model(MAKERS[name](), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = MAKERS[name]()
    adapters = ra.load(ours, tmp_path)
    assert (logits_of(theirs) - logits_of(MAKERS[name]())).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **CLOSE)
    ra.save(adapters, tmp_path / "again")
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path / "again")), logits_of(theirs), **CLOSE)
    ra.merge(adapters)  # whose one product is rounded otherwise than two
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_whose_base_weights_were_changed_are_refused(init, tmp_path):
    """PEFT changes the frozen weights with these; the file alone does not say what the model computes."""
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=init)
    peft.get_peft_model(make_bert(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="init_lora_weights"):
        ra.load(make_bert(), tmp_path)


@pytest.mark.parametrize("labels", [3, 9])
def test_another_number_of_labels_is_told(labels, tmp_path):
    _, adapters = adapted("bert", ranks=(3,))
    ra.save(adapters, tmp_path)
    model = make_bert(labels=labels)
    with pytest.raises(AdapterFileError, match="made for another model.*classifier"):
        ra.load(model, tmp_path)
    assert not any(isinstance(m, Adapter) for m in model.modules()) and model.classifier.out_features == labels


def test_another_architecture_and_an_adapted_model_are_told(tmp_path):
    _, adapters = adapted("bert", ranks=(3,))
    ra.save(adapters, tmp_path)
    for other in (make_gpt2(), make_llama(), make_mlp(), make_bert(hidden=16)):
        with pytest.raises(AdapterFileError, match="made for another model"):
            ra.load(other, tmp_path)
    model = make_bert()
    ra.attach(model, rank=2)
    with pytest.raises(TargetError, match="attached already"):
        ra.load(model, tmp_path)
