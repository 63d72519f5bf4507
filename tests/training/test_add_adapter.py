"""Adapters that transformers holds itself (``add_adapter``), in its Trainer and inside a SentenceTransformer."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification, BertModel

import rankalloc as ra
from rankalloc.errors import TargetError
from rankalloc.storage.tensors import read_tensors
from tests.support.language import WORDS, counting, make_tokenizer
from tests.support.models import assert_same, logits_of, make_bert, tensors_of
from tests.support.training import make_trainer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = 18


def lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value", "dense"], **options)


def callback():
    return ra.RankCallback(budget=ra.RankBudget(ranks=RANKS, every=2))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    make_bert().save_pretrained(folder)
    return folder


def with_adapter(folder):
    model = BertForTokenClassification.from_pretrained(folder)
    torch.manual_seed(1)
    model.add_adapter(lora())
    return model


def test_a_transformers_model_with_add_adapter(bert_folder, tmp_path):
    model, chooses = with_adapter(bert_folder), callback()
    trainer = make_trainer(model, tmp_path / "run", [chooses])
    trainer.train()
    ranks = chooses.adapters.ranks()
    assert sum(ranks.values()) == RANKS == sum(a.rank for a in chooses.adapters) and 0 in ranks.values()
    assert all(isinstance(model.get_submodule(name), peft.tuners.lora.LoraLayer) for name in ranks)
    assert set(model.peft_config["default"].rank_pattern) < {"^" + name.replace(".", "\\.") for name in ranks}
    trainer.save_model(str(tmp_path / "final"))
    saved, _ = read_tensors(tmp_path / "final" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == chooses.adapters.num_params()
    plain = BertForTokenClassification.from_pretrained(bert_folder)
    later = BertForTokenClassification.from_pretrained(bert_folder)
    later.load_adapter(str(tmp_path / "final"))
    readers = (
        peft.PeftModel.from_pretrained(plain, tmp_path / "final"), later,
        AutoModelForTokenClassification.from_pretrained(tmp_path / "final"),
    )
    for reader in readers:
        assert torch.equal(logits_of(reader), logits_of(model))
    model.disable_adapters()
    assert torch.equal(logits_of(model), logits_of(BertForTokenClassification.from_pretrained(bert_folder)))


def test_weights_of_other_ranks_are_loaded_into_it(bert_folder):
    """Also from a model in which layers without a rank have no adapter: there the base's weights have other names."""
    trained, fresh = with_adapter(bert_folder), with_adapter(bert_folder)
    adapters, mine = ra.adopt(trained), ra.adopt(fresh)
    for rank, adapter in enumerate(adapters):
        adapter.resize(min(rank, 4))
        for factor in (adapter.P, adapter.Q):
            nn.init.normal_(factor)
    adapters.resized()
    state = tensors_of(trained)
    first = next(iter(adapters.modules))
    assert f"{first}.lora_A.default.weight" not in state
    for part in ("weight", "bias"):
        state[f"{first}.{part}"] = state.pop(f"{first}.base_layer.{part}")
    fresh.load_state_dict(state)
    assert torch.equal(logits_of(fresh), logits_of(trained))
    assert [a.rank for a in mine] == [a.rank for a in adapters]


def test_where_it_is_not_clear_which_adapters_are_meant(bert_folder):
    assert len(ra.adopt(nn.Sequential(with_adapter(bert_folder)))) == 12
    two = nn.ModuleList([with_adapter(bert_folder), peft.get_peft_model(make_bert(), lora())])
    with pytest.raises(TargetError, match=r"several parts of this ModuleList .*\(0, 1\)"):
        ra.adopt(two)
    wrapped = nn.Module()
    wrapped.module = two[0]
    with pytest.raises(TargetError, match="before it is wrapped"):
        ra.adopt(wrapped)
    with pytest.raises(TargetError, match="no LoRA layers"):
        ra.adopt(make_bert())
    assert not any(hasattr(config, "rankalloc_excluded") for part in two for config in part.peft_config.values())


# --- sentence-transformers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def train_encoder(encoder, folder, resume=None, **settings):
    """(model, callback, trainer) of a run that brings neighbours together."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )

    transformer = models.Transformer(str(encoder))
    model = SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")
    torch.manual_seed(1)
    model.add_adapter(lora(task_type="FEATURE_EXTRACTION"))
    pairs = Dataset.from_list([{"anchor": counting(i), "positive": counting((i + 5) % WORDS)} for i in range(WORDS)])
    arguments = SentenceTransformerTrainingArguments(**{
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3, "save_strategy": "steps", "save_steps": 4,
        "logging_steps": 4, "log_level": "error", **settings,
    })
    chooses = callback()
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, eval_dataset=pairs, callbacks=[chooses],
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, chooses, trainer


@pytest.fixture(scope="module")
def encoder_run(encoder_folder, tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("run")
    model, chooses, trainer = train_encoder(encoder_folder, folder)
    trainer.save_model(str(folder / "final"))
    return SimpleNamespace(folder=folder, model=model, chooses=chooses, vectors=encoded(model))


def encoded(model) -> torch.Tensor:
    return torch.tensor(model.encode([counting(3), counting(9)]))


def test_a_sentence_transformer_ends_on_the_budget_and_is_read_as_it_was_written(encoder_run):
    from sentence_transformers import SentenceTransformer

    adapters, folder = encoder_run.chooses.adapters, encoder_run.folder
    assert sum(adapters.ranks().values()) == RANKS == sum(a.rank for a in adapters) and 0 in adapters.ranks().values()
    assert all(name.startswith(("encoder.layer.", "pooler.")) for name in adapters.ranks())
    numbers = []
    for name in ("checkpoint-4", "checkpoint-8", "final"):
        held = {file.name: read_tensors(file)[0] for file in (folder / name).rglob("*.safetensors")}
        assert held.keys() - {"rankalloc_state.safetensors"} == {"adapter_model.safetensors"}
        numbers.append(sum(tensor.numel() for tensor in held["adapter_model.safetensors"].values()))
    assert numbers[0] > numbers[1] == numbers[2] == adapters.num_params()
    assert torch.equal(encoded(SentenceTransformer(str(folder / "final"), device="cpu")), encoder_run.vectors)


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.long)])
def test_its_runs_are_resumed(encoder_run, encoder_folder, tmp_path, step):
    """sentence-transformers loads a whole model of the checkpoint, in which layers without a rank have no adapter."""
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    shutil.copytree(encoder_run.folder / checkpoint.name, checkpoint)
    model, _, _ = train_encoder(encoder_folder, tmp_path / "run", str(checkpoint))
    assert_same(tensors_of(model), tensors_of(encoder_run.model))


@pytest.mark.long
def test_its_best_model_is_loaded(encoder_folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    model, chooses, trainer = train_encoder(
        encoder_folder, tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")  # the loss falls: the first after the freeze
    saved, _ = read_tensors(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    mine = {name: t for name, t in tensors_of(model[0].model).items() if "lora_" in name}
    assert_same({f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in mine.items()}, saved)
    assert sum(a.rank for a in chooses.adapters) == RANKS
