"""Models whose experts transformers stacks: PEFT rewrites names like up_proj there, and our files load all the same."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

import rankalloc as ra
from rankalloc.storage.peft_names import as_parameters, is_parameter
from tests.support.models import logits_of

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS = {
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                    "topk_group": 1},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 8},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                 "topk_group": 1, "head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
              "head_dim": 8},
}  # fmt: skip


def make(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def trained(model: nn.Module) -> ra.Adapters:
    """Adapters of different ranks, two layers without any, that change the model's outputs."""
    targets = [name for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "gate"))]  # fmt: skip
    adapters = ra.attach(
        model, rank=3, alpha=6, target_modules=targets, ranks={name: i % 4 for i, name in enumerate(targets)}
    )
    for adapter in adapters:
        nn.init.normal_(adapter.lam, std=5.0)
    return adapters


def read_by_peft(model_type: str, folder) -> PeftModel:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(make(model_type), folder)
    # of patterns PEFT says that they match no module even where they match a parameter
    keys = [str(w.message) for w in said if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    assert keys == [], "a factor that PEFT could not place"
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_adapters_of_shared_experts_and_dense_blocks_reach_peft(model_type, tmp_path):
    model = make(model_type)
    before = logits_of(model)
    adapters = trained(model)
    after = logits_of(model)
    effect = (after - before).abs().max()
    assert sum("shared" in name or "layers.0.mlp" in name for name in adapters.modules) >= 3 and effect > 0.01
    for layout in ("uniform", "compact"):
        folder = ra.save(adapters, tmp_path / layout, layout=layout)
        peft = read_by_peft(model_type, folder)
        assert (logits_of(peft) - after).abs().max() < 1e-5 * effect + 1e-6
        assert (logits_of(peft.merge_and_unload()) - after).abs().max() < 1e-4 * effect + 1e-6
        again = make(model_type)
        loaded = ra.load(again, folder)
        assert torch.allclose(logits_of(again), after, atol=1e-6)
        assert loaded.ranks() == adapters.ranks()


def test_files_made_of_such_a_file_reach_peft_too(tmp_path):
    model = make("deepseek_v3")
    whole = ra.save(trained(model), tmp_path / "whole")
    made = {
        "shrunk": lambda out: ra.shrink(whole, ra.RankBudget(ranks=9), out=out, layout="compact"),
        "composed": lambda out: ra.compose([whole, whole], [0.5, 0.5], out=out),
    }
    for name, make_file in made.items():
        make_file(tmp_path / name)
        own = make("deepseek_v3")
        ra.load(own, tmp_path / name)
        peft = read_by_peft("deepseek_v3", tmp_path / name)
        assert (logits_of(peft) - logits_of(own)).abs().max() < 1e-5
        assert (logits_of(own) - logits_of(make("deepseek_v3"))).abs().max() > 0.01


def test_other_models_are_written_as_ever(tmp_path):
    assert as_parameters("llama", ["model.layers.0.mlp.up_proj"]) == as_parameters(None, ["a.gate"]) == []
    assert as_parameters("mixtral", ["a.w1", "a.q_proj", "w2"]) == ["a.w1.weight", "w2.weight"]
    assert is_parameter("a.b", ["b.weight"]) and not is_parameter("a.bb", ["b.weight", "a.bb.bias"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    folder = ra.save(ra.attach(model, rank=1), tmp_path)
    assert "target_parameters" not in json.loads((folder / "adapter_config.json").read_text())
