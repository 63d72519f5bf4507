"""Mixtures of experts whose weights are stacked in one tensor: named, never passed over in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli.app import app
from rankalloc.errors import AdapterFileError, TargetError
from tests.support.models import logits_of, make_bert, token_ids

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)).eval()


def make_qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4,
    )).eval()


@pytest.mark.parametrize("make", [make_mixtral, make_qwen])
def test_all_linear_says_how_many_expert_weights_it_leaves(make, tmp_path):
    model = make()
    with pytest.warns(UserWarning, match=r"4 stacked expert weights \(12 matrices; model.layers.0.mlp.experts.gate_up_"
                                         r"proj is the first\) are not adapted"):
        adapters = ra.attach(model, rank=2)
    assert {name.rsplit(".", 1)[-1] for name in adapters.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    controller = ra.RankController(adapters, ra.RankBudget(ranks=8, every=2), 6)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for _ in range(6):
        model(token_ids(), labels=token_ids()).loss.backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
    assert controller.finish().alerts == adapters.notes and "4 stacked expert weights" in adapters.notes[0]
    ra.save(adapters, tmp_path)
    again = make()
    ra.load(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


def test_nothing_is_said_of_experts_that_are_excluded_or_not_there():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        for names in (["experts"], ["gate_up_proj", "down_proj"]):
            assert not ra.attach(make_mixtral(), rank=2, exclude_modules=names).notes
        assert not ra.attach(make_mixtral(), rank=2, target_modules=["q_proj"]).notes
        assert not ra.attach(make_bert(), rank=2).notes


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["experts"], "cannot adapt model.layers.0.mlp.experts .*keeps the weights of 3 experts stacked in one tensor"),
        (r".*\.experts", "MixtralExperts keeps .*gate_up_proj, down_proj"),
        (["q_proj", "down_proj"], "weights of experts, model.layers.0.mlp.experts.down_proj and 1 more"),
        (["experts.gate_up_proj"], "weights of experts, model.layers.0.mlp.experts.gate_up_proj and 1 more"),
        (["layers.0.mlp.experts.gate_up_proj"], "gate_up_proj: stacked in one tensor"),
    ],
)
def test_experts_that_are_asked_for_are_refused_by_name(targets, words):
    model = make_mixtral()
    with pytest.raises(TargetError, match=words):
        ra.attach(model, rank=2, target_modules=targets)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_pefts_over_experts_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    peft.get_peft_model(make_mixtral(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="experts stacked in one tensor"):
        ra.load(make_mixtral(), tmp_path)


def test_ls_targets_names_them_too(tmp_path):
    make_mixtral().config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["ls", "targets", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "note: 4 stacked expert weights (12 matrices" in " ".join(done.output.split())
