"""Embeddings that share their weight with the output head, trained or saved whole: exact in PEFT and from PEFT."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankalloc as ra
from rankalloc.errors import TargetError

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 32, "tie_word_embeddings": True}  # fmt: skip
MODELS = {  # class, configuration, embedding, output head, a layer to adapt
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES), "embed_tokens", "lm_head", "q_proj"),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32),
        "wte", "lm_head", "c_fc",
    ),
    "bert": (
        transformers.BertForMaskedLM, transformers.BertConfig(**SIZES), "word_embeddings", "predictions.decoder",
        "query",
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0,
        ),
        "shared", "lm_head", "q",
    ),
}  # fmt: skip
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    cls, config, embedding, head, layer = MODELS[request.param]
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    return lambda: cls.from_pretrained(folder), embedding, head, layer


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).logits


def trained(model: nn.Module) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return output(model)


@pytest.mark.parametrize("which", ["embedding", "head"])
def test_our_files_are_exact_in_peft(case, which, tmp_path):
    load, embedding, head, layer = case
    model = load()
    name = embedding if which == "embedding" else head
    adapters = ra.attach(model, rank=2, target_modules=[layer], modules_to_save=[name])
    expected = trained(model)
    assert (expected - output(load())).abs().max() > 0.05
    for layout in ("uniform", "compact"):
        folder = ra.save(adapters, tmp_path / layout, layout=layout)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert len(config["modules_to_save"]) > 1
        assert torch.allclose(output(PeftModel.from_pretrained(load(), folder)), expected, atol=1e-5)
        again = load()
        ra.load(again, folder)
        assert torch.equal(output(again), expected)
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_peft_files_are_exact_here_and_stay_so(case, which, tmp_path):
    load, embedding, head, layer = case
    whole = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[which]
    peft = get_peft_model(load(), LoraConfig(r=2, target_modules=[layer], modules_to_save=whole))
    expected = trained(peft)
    peft.save_pretrained(tmp_path / "theirs")
    model = load()
    adapters = ra.load(model, tmp_path / "theirs")
    assert torch.allclose(output(model), expected, atol=1e-5)
    ra.save(adapters, tmp_path / "ours")
    assert torch.allclose(output(PeftModel.from_pretrained(load(), tmp_path / "ours")), expected, atol=1e-5)
    ra.merge(adapters)
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(output(type(model).from_pretrained(tmp_path / "merged")), expected, atol=1e-4)


def test_a_tied_layer_is_adapted_or_trained_whole_but_not_both(case, tmp_path):
    load, embedding, head, layer = case
    with pytest.raises(TargetError, match="shares its weight with"):
        ra.attach(load(), rank=2, target_modules=[head], modules_to_save=[embedding])
    model = load()
    adapters = ra.attach(model, rank=2, target_modules=[layer, head])
    expected = trained(model)
    folder = ra.save(adapters, tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(load(), folder)), expected, atol=1e-5)
