"""Beside a base of 4 bits TRL casts what is trained to bfloat16; a RankCallback trains it in float32."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import rankalloc as ra
from rankalloc.layers.quantized import scheme_of
from tests.support.language import make_lora, make_trl, save_language_model
from tests.support.models import assert_same, logits_of

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RANKS, HALF = 21, torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("base"))


def quantised(base) -> LlamaForCausalLM:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=nf4, device_map="cpu")
    assert scheme_of(model.model.layers[0].mlp.up_proj) == "4bit"
    return model


def trained(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moments(trainer) -> set[torch.dtype]:
    return {state["exp_avg"].dtype for state in trainer.optimizer.state.values()}


def begin(folder, base, dtype=torch.float32, uncast=False, **settings):
    """A trainer of TRL's beside the 4-bit base, and its callback; ``uncast`` puts back what TRL rounded."""
    chooses = ra.RankCallback(budget=ra.RankBudget(ranks=RANKS, every=2), dtype=dtype)
    torch.manual_seed(0)
    model = peft.get_peft_model(quantised(base), make_lora())
    drawn = {name: p.detach().clone() for name, p in trained(model).items()}
    settings = {"save_strategy": "steps", "save_steps": 4, **settings}
    trainer = make_trl("sft", folder, model, callbacks=[chooses], **settings)
    if uncast:
        restore(trained(model), drawn)
    return trainer, chooses


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], drawn: dict[str, torch.Tensor]) -> None:
    """Put back what was rounded to bfloat16 and is held in float32."""
    assert any((p != drawn[name]).any() for name, p in parameters.items())
    for name, p in parameters.items():
        assert torch.equal(p, drawn[name].to(HALF).float())
        p.copy_(drawn[name])


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer, chooses = begin(folder, base)
    before = {p.dtype for p in trained(trainer.model).values()}
    trainer.train()
    return folder, trainer, chooses, before


def moved(one: dict[str, int], two: dict[str, int]) -> int:
    """Triplets that stand elsewhere."""
    return sum(abs(one[name] - two[name]) for name in one) // 2


def test_the_adapter_and_its_moments_are_float32(run):
    _, trainer, chooses, before = run
    assert before == {torch.float32} == {p.dtype for p in trained(trainer.model).values()} == moments(trainer)
    assert sum(chooses.adapters.ranks().values()) == RANKS == sum(a.rank for a in chooses.adapters)


def test_ranks_are_those_of_a_run_that_nobody_cast(run, base, tmp_path):
    trainer, chooses = begin(tmp_path, base, uncast=True)
    trainer.train()
    assert moved(chooses.adapters.ranks(), run[2].adapters.ranks()) <= RANKS // 20
    assert len(set(chooses.adapters.ranks().values())) > 2


def test_a_resumed_run_is_the_uninterrupted_one(run, base, tmp_path):
    folder, trainer, _, _ = run
    shutil.copytree(folder / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    again, _ = begin(tmp_path / "run", base)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(trained(again.model), trained(trainer.model))


def test_the_result_reloads_onto_the_quantised_base(run, base, tmp_path):
    trainer = run[1]
    trainer.save_model(str(tmp_path))
    there = peft.PeftModel.from_pretrained(quantised(base), tmp_path)
    assert_same(
        {name: p for name, p in there.named_parameters() if "lora_" in name},
        {name: p for name, p in trainer.model.named_parameters() if "lora_" in name and p.numel()},
    )
    torch.testing.assert_close(logits_of(there), logits_of(trainer.model), rtol=1e-5, atol=1e-5)


def test_the_type_that_trl_chose_stays_if_asked(base, tmp_path):
    trainer, chooses = begin(tmp_path, base, dtype=None, max_steps=4)
    trainer.train()
    assert {p.dtype for p in trained(trainer.model).values()} == {HALF} == moments(trainer)
    assert sum(chooses.adapters.ranks().values()) == RANKS


def test_adapters_of_our_own_begin_with_the_very_numbers_from_before_the_cast(base, tmp_path):
    """λ begins at 0 and grows by steps that bfloat16 would soon lose."""
    torch.manual_seed(0)
    adapters = ra.attach(quantised(base), rank=4)
    drawn = [p.detach().clone() for a in adapters for p in a.own_parameters()]
    trainer = make_trl(
        "sft", tmp_path, adapters.model, callbacks=[ra.RankCallback(adapters, ra.RankBudget(ranks=RANKS, every=2))]
    )
    assert any((number != number.to(HALF)).any() for number in drawn)  # which the cast has rounded
    for own, before in zip((p for a in adapters for p in a.own_parameters()), drawn, strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, before)
    trainer.train()
    assert {p.dtype for a in adapters for p in a.own_parameters()} == {torch.float32} == moments(trainer)
    lam = torch.cat([a.lam for a in adapters]).detach()
    assert len(lam) == RANKS and lam.all() and not torch.equal(lam, lam.to(HALF).float())
