"""What a trainer's settings and PEFT's options change for layers driven in place, and what they leave as it is."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import TargetError
from tests.support.language import (
    conversations,
    make_trl,
    save_language_model,
    texts,
)
from tests.support.language import (
    load_language_model as plain,
)
from tests.support.language import (
    make_lora as lora,
)
from tests.support.models import assert_same, logits_of, tensors_of

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = 21
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("base"))


def train(folder, base, options=None, ranks=RANKS, model=None, resume=None, **settings):
    chooses = ra.RankCallback(budget=ra.RankBudget(ranks=ranks, every=2))
    model = plain(base) if model is None else model
    trainer = make_trl("sft", folder, model, lora(**(options or {})), callbacks=[chooses], **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert sum(chooses.adapters.ranks().values()) == ranks == sum(a.rank for a in chooses.adapters)
    assert not chooses.trace.alerts and not chooses.trace.nonfinite_steps
    return trainer, chooses


def allocations(chooses) -> list[list[int]]:
    return [allocation.ranks for allocation in chooses.trace.allocations]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    return train(tmp_path_factory.mktemp("reference"), base)


@pytest.mark.parametrize("settings", [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.long),
], ids=["reentrant", "not reentrant", "accumulation", "compiled"])
def test_the_same_sums_make_the_same_choices(reference, base, tmp_path, settings):
    trainer, chooses = train(tmp_path, base, **settings)
    assert allocations(chooses) == allocations(reference[1])
    assert len(set(chooses.adapters.ranks().values())) > 2
    torch.testing.assert_close(logits_of(trainer.model), logits_of(reference[0].model), rtol=1e-3, atol=1e-3)


EVERYTHING = {
    "packing": ({"packing": True, "max_length": 16}, {}),
    "answers only": ({"assistant_only_loss": True, "rows": conversations()}, {}),
    "bf16": ({"bf16": True}, {}),
    "adafactor": ({"optim": "adafactor"}, {}),
    "8 bit": ({"optim": "adamw_bnb_8bit"}, {}),
    "a head": ({}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ({}, {"use_rslora": True}),
    "dropout": ({}, {"lora_dropout": 0.1}),
    "embeddings": ({}, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "gaussian": ({}, {"init_lora_weights": "gaussian"}),
    "orthogonal": ({}, {"init_lora_weights": "orthogonal"}),
    "several": (
        {"packing": True, "max_length": 16, "optim": "adafactor", "gradient_checkpointing": True},
        {"use_rslora": True, "lora_dropout": 0.1, "target_modules": ["embed_tokens", "q_proj", "v_proj", "down_proj"]},
    ),
    "several others": (
        {"assistant_only_loss": True, "rows": conversations(), "optim": "adamw_bnb_8bit"},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
}


@pytest.mark.parametrize("name", [
    name if name.startswith("several") else pytest.param(name, marks=pytest.mark.long) for name in EVERYTHING
])
def test_settings_and_options_end_on_the_budget_reload_and_resume(base, tmp_path, name):
    settings, options = EVERYTHING[name]
    if "8bit" in settings.get("optim", ""):
        pytest.importorskip("bitsandbytes")
    settings = {"save_strategy": "steps", "save_steps": 4, **settings}
    trainer, chooses = train(tmp_path / "run", base, options, ranks=9, **settings)
    trainer.save_model(str(tmp_path / "final"))
    there = peft.PeftModel.from_pretrained(plain(base), tmp_path / "final")
    if settings.get("bf16"):
        there = trainer.accelerator.prepare_model(there, evaluation_mode=True)  # as the trained one has been: autocast
    torch.testing.assert_close(logits_of(there).float(), logits_of(trainer.model).float(), **CLOSE)
    assert (logits_of(trainer.model) - logits_of(plain(base))).abs().max() > 1e-2
    assert set(chooses.trace.heads) == set(options.get("modules_to_save", ()))
    checkpoint = tmp_path / "again" / "checkpoint-4"
    shutil.copytree(tmp_path / "run" / checkpoint.name, checkpoint)
    again, _ = train(tmp_path / "again", base, options, ranks=9, resume=str(checkpoint), **settings)
    assert_same(tensors_of(again.model), tensors_of(trainer.model))


def test_beside_a_bf16_base_the_adapter_trains_in_float32(base, tmp_path):
    trainer, chooses = train(tmp_path, base, model=plain(base, dtype=torch.bfloat16), gradient_checkpointing=True)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    trainer.save_model(str(tmp_path / "final"))
    there = peft.PeftModel.from_pretrained(plain(base, dtype=torch.bfloat16), tmp_path / "final")
    assert torch.equal(logits_of(there), logits_of(trainer.model))


@pytest.mark.parametrize(("options", "words"), [
    ({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"lora_bias": True}, "lora_bias"),
])
def test_options_that_cannot_change_rank_in_place_are_refused_when_the_trainer_is_made(base, tmp_path, options, words):
    with pytest.raises(TargetError, match=words):
        train(tmp_path, base, options)


def test_only_checkpoints_that_meet_the_budget_compete_for_the_best(base, tmp_path):
    class Scored(trl.SFTTrainer):
        def evaluate(self, *args, **kwargs):  # the earliest checkpoint that may win does
            metrics = {"eval_loss": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    from datasets import Dataset

    trainer, chooses = train(
        tmp_path, base, trainer_class=Scored, eval_dataset=Dataset.from_list(texts(4)), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=False,
    )
    best = trainer.state.best_model_checkpoint
    assert best.endswith(f"checkpoint-{chooses.controller.schedule.freeze_step}")
    assert torch.equal(logits_of(trainer.model), logits_of(peft.PeftModel.from_pretrained(plain(base), best)))


# --- what else is done with a PeftModel ------------------------------------------------------------------------


def test_everything_around_a_peft_model_goes_on(reference, base, tmp_path):
    trainer, chooses = reference
    model, untouched = trainer.model, logits_of(plain(base))
    trained = logits_of(model)
    assert (trained - untouched).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits_of(model), untouched)
    assert torch.equal(logits_of(model), trained)
    # not a copy of this model: TRL has bound a forward pass to it, which its copies call too
    twin = peft.get_peft_model(plain(base), lora())
    ra.adopt(twin)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(twin), trained)
    assert all(tensor.numel() for tensor in twin.state_dict().values())
    copied = copy.deepcopy(twin)
    assert torch.equal(logits_of(copied), trained)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits_of(copied.unload()), untouched)
    twin.merge_adapter()
    with twin.disable_adapter():  # PEFT unmerges first
        torch.testing.assert_close(logits_of(twin), untouched, **CLOSE)
    twin.merge_adapter()
    torch.testing.assert_close(logits_of(twin), trained, **CLOSE)
    twin.unmerge_adapter()
    torch.testing.assert_close(logits_of(twin), trained, **CLOSE)
    merged = twin.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits_of(merged), trained, **CLOSE)
    assert model.get_nb_trainable_parameters()[0] == chooses.adapters.num_params()
    trainer.save_model(str(tmp_path / "final"))
    model.create_or_update_model_card(str(tmp_path / "final"))
    assert "library_name: peft" in (tmp_path / "final" / "README.md").read_text()
    trainer.args.output_dir = str(tmp_path)
    trainer.create_model_card(model_name="shrunk")
    assert "# Model Card for shrunk" in (tmp_path / "README.md").read_text()


def test_hot_swapping(reference, base, tmp_path):
    """Between adapters of the same ranks, and from what ra.save wrote; PEFT refuses other patterns in one sentence."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    trainer, chooses = reference
    trained = logits_of(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    ra.save(chooses.adapters, tmp_path / "uniform", "uniform")
    alike = peft.PeftModel.from_pretrained(plain(base), tmp_path / "final")
    for layer in alike.modules():
        for factor in getattr(layer, "lora_B", {}).values():
            factor.weight.data.zero_()
    assert not torch.allclose(logits_of(alike), trained, **CLOSE)
    hotswap_adapter(alike, str(tmp_path / "final"), "default")
    torch.testing.assert_close(logits_of(alike), trained, **CLOSE)
    fresh = peft.get_peft_model(plain(base), lora())
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(fresh, str(tmp_path / "final"), "default")
    prepare_model_for_compiled_hotswap(fresh, target_rank=8)
    hotswap_adapter(fresh, str(tmp_path / "uniform"), "default")
    torch.testing.assert_close(logits_of(fresh), trained, **CLOSE)
