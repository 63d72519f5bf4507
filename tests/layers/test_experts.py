"""Mixtures of experts whose weights are stacked in one tensor: each expert has an adapter and ranks of its own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.adapters.experts import AdaptedExperts
from rankalloc.cli.app import app
from rankalloc.errors import AdapterFileError, ConfigError, TargetError
from rankalloc.layers.experts import ExpertMatrix, expert_matrices
from tests.support.architectures import ARCHITECTURES
from tests.support.models import assert_same, logits_of, make_bert, tensors_of, token_ids
from tests.support.training import train

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}
EXPERTS = "model.layers.0.mlp.experts"


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)).eval()


def randomised(adapters: ra.Adapters) -> ra.Adapters:
    """As training would leave them."""
    torch.manual_seed(1)
    for adapter in adapters:
        nn.init.normal_(adapter.lam, std=5.0)
    return adapters


def roles(adapters: ra.Adapters) -> set[str]:
    return {name.removeprefix("model.layers.0.").removeprefix("model.layers.1.") for name in adapters.modules}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["experts"], {f"mlp.experts.{key}_proj.{e}" for key in ("gate_up", "down") for e in range(3)}),
        (["q_proj", "down_proj"], {"self_attn.q_proj", *(f"mlp.experts.down_proj.{e}" for e in range(3))}),
        (r".*layers\.0\.mlp\.experts\.gate_up_proj", {f"mlp.experts.gate_up_proj.{e}" for e in range(3)}),
        (["down_proj.1"], {"mlp.experts.down_proj.1"}),
        (lambda name, module: isinstance(module, ExpertMatrix) and module.expert == 2,
         {"mlp.experts.gate_up_proj.2", "mlp.experts.down_proj.2"}),
    ],
)
def test_experts_are_chosen_by_the_names_of_their_parameters(targets, expected):
    model = make_mixtral()
    before = logits_of(model)
    adapters = ra.attach(model, rank=2, target_modules=targets)
    assert roles(adapters) == expected
    assert torch.equal(logits_of(model), before)
    randomised(adapters)
    assert not torch.equal(logits_of(model), before)
    ra.detach(adapters)
    assert torch.equal(logits_of(model), before) and not any(isinstance(m, AdaptedExperts) for m in model.modules())


def test_lora_xs_has_a_core_for_every_expert():
    model = make_mixtral()
    adapters = ra.attach(model, rank=2, target_modules=["experts"], init="lora-xs")
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    assert adapters.trainable_params() == 4 * len(adapters) and any(a.core.grad.any() for a in adapters)
    for adapter in adapters:
        nn.init.normal_(adapter.core)
    before = logits_of(model)
    torch.testing.assert_close(logits_of(ra.merge(adapters)), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, logits_of(make_mixtral()))


def test_experts_that_are_excluded_stay_frozen():
    for names in (["experts"], ["gate_up_proj", "down_proj"]):
        assert roles(ra.attach(make_mixtral(), rank=2, exclude_modules=names)) == {
            f"self_attn.{x}_proj" for x in "qkvo"
        }
    assert "mlp.experts.down_proj.1" in roles(ra.attach(make_mixtral(), rank=2, exclude_modules=["gate_up_proj"]))
    with pytest.raises(TargetError, match=r"matches no layer.*What can be adapted: .*gate_up_proj \(6\)"):
        ra.attach(make_mixtral(), rank=2, target_modules=["up_proj_gate"])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_update_is_that_of_the_matrices(name):
    """W + ΔW put into the stack computes the same, for stacks of both orientations."""
    architecture = ARCHITECTURES[name]
    model, plain = architecture.build().eval(), architecture.build().eval()
    adapters = randomised(ra.attach(model, rank=2, target_modules=["experts"], ranks={f"{EXPERTS}.down_proj.1": 0}))
    assert expert_matrices(plain).keys() == adapters.modules.keys()
    with torch.no_grad():
        for key, matrix in expert_matrices(plain).items():
            matrix.weight.add_(adapters.modules[key].delta_weight())
        inputs = architecture.inputs(0)
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_every_implementation_and_a_copy_and_checkpointing_agree():
    model = make_mixtral()
    adapters = randomised(ra.attach(model, rank=2))
    expected = logits_of(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    for adapter in adapters:
        adapter.lam.data.zero_()
    torch.testing.assert_close(logits_of(twin), expected, rtol=1e-4, atol=1e-5)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        twin.train()(token_ids(), labels=token_ids()).loss.backward()
        grads.append([p.grad.clone() for p in twin.parameters() if p.requires_grad])
        twin.zero_grad()
    torch.testing.assert_close(*grads)


def test_ranks_of_experts_survive_a_file_and_a_file_of_pefts_is_read(tmp_path):
    model = make_mixtral()
    names = [*ra.attach(make_mixtral(), rank=3).modules]
    adapters = randomised(ra.attach(model, rank=3, ranks={name: i % 4 for i, name in enumerate(names)}))
    expected = logits_of(model)
    folder = ra.save(adapters, tmp_path / "ours", "compact")
    again = make_mixtral()
    loaded = ra.load(again, folder)
    assert torch.equal(logits_of(again), expected)
    assert {n: r for n, r in loaded.ranks().items() if r} == {n: r for n, r in adapters.ranks().items() if r}
    with pytest.raises(AdapterFileError, match="experts stacked in one tensor .*rankalloc.load puts it into its model"):
        ra.FinishedAdapter(folder)

    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, rank_pattern={"down_proj": 3},
    )
    theirs = peft.get_peft_model(make_mixtral(), config)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make_mixtral()
    loaded = ra.load(again, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(again), logits_of(theirs), rtol=1e-4, atol=1e-5)
    assert loaded.ranks()[f"{EXPERTS}.down_proj.0"] == 3 and loaded.ranks()[f"{EXPERTS}.gate_up_proj.2"] == 2
    with pytest.raises(AdapterFileError, match="made for another model"):
        ra.load(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5)), tmp_path / "theirs")


def test_pefts_own_layers_over_experts_are_refused():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(TargetError, match="use rankalloc.attach, which gives each expert ranks of its own"):
        ra.adopt(peft.get_peft_model(make_mixtral(), config))


def test_routing_weighs_experts_and_resumes_exactly():
    def begin():
        model = make_mixtral().train()
        adapters = ra.attach(model, rank=2)
        controller = ra.RankController(adapters, ra.RankBudget(ranks=20, every=2), 8, routing=True)
        return model, controller, torch.optim.AdamW(adapters.parameters(), lr=3e-2)

    def go_on(model, controller, optimizer, steps):
        train(controller, optimizer, steps, lambda step: model(token_ids(), labels=token_ids()).loss, lambda step: None)

    whole = begin()
    go_on(*whole, 1)
    score = whole[1].score
    shares = [share[0] for share in score.share.values()][:3]
    assert 0.9 < sum(shares) < 1.1 and len({float(share) for share in shares}) > 1
    values = dict(zip(whole[1].adapters.modules, zip(score.values(), score.inner.values(), strict=True), strict=True))
    weighed, plain = values[f"{EXPERTS}.gate_up_proj.0"]
    torch.testing.assert_close(weighed, 3 * shares[0] * plain)
    assert torch.equal(*values["model.layers.0.self_attn.q_proj"])
    go_on(*whole, 3)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    go_on(*whole, 8)
    resumed = begin()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    go_on(*resumed, 8)
    assert_same(tensors_of(whole[0]), tensors_of(resumed[0]))
    assert whole[1].finish().method_options["routing"] and sum(whole[1].adapters.ranks().values()) == 20


def test_routing_needs_experts_that_know_whose_token_is_whose():
    with pytest.raises(ConfigError, match="no experts stacked in one tensor are adapted"):
        ra.RankController(ra.attach(make_bert(), rank=2), ra.RankBudget(ranks=5), 8, routing=True)
    architecture = ARCHITECTURES["llama4"]
    model = architecture.build().train()
    adapters = ra.attach(model, rank=2)
    ra.RankController(adapters, ra.RankBudget(fraction=0.5), 8, routing=True)
    with pytest.raises(ConfigError, match="does not tell its experts which token is whose"):
        model(**architecture.inputs(0))


def test_what_experts_cannot_have_is_said(recwarn):
    assert any("dropout is not applied to the updates of experts" in n for n in ra.attach(
        make_mixtral(), rank=2, dropout=0.1).notes)
    with pytest.raises(ConfigError, match="experts.*exclude_modules"):
        ra.plan_ranks(make_mixtral(), [{"input_ids": token_ids()}], ra.RankBudget(ranks=5), "eva")


def test_ls_targets_counts_them(tmp_path):
    make_mixtral().config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["ls", "targets", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "mlp.experts.gate_up_proj" in done.output and "100" in done.output


def test_projections_of_every_expert_as_peft_names_them_are_read(tmp_path):
    """PEFT takes the names that older versions of transformers had for the stacked parameters."""
    architecture = ARCHITECTURES["qwen3_moe"]
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(architecture.build(), peft.LoraConfig(r=2, target_modules=names))
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    theirs.eval().save_pretrained(tmp_path)
    model, inputs = architecture.build().eval(), architecture.inputs(0)
    ra.load(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterFileError, match="it adapts stacked experts .*, and this one has none"):
        ra.load(make_bert(), tmp_path)
