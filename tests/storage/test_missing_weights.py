"""What a checkpoint lacks is drawn at random: it is trained and saved with the adapter, or said to be lost."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

import rankalloc as ra
from rankalloc.layers.missing import missing_modules, missing_parameters

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 32}  # fmt: skip
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": (16, 16),
    "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20, "num_feat_extract_layers": 2,
}  # fmt: skip
CASES = {  # the base that is saved, the class that is loaded, what is new in it beside the head
    "deberta": (
        lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES)),
        transformers.DebertaV2ForSequenceClassification, ["pooler.dense"],
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False),
        transformers.BertForSequenceClassification, ["bert.pooler.dense"],
    ),
    "wav2vec2": (
        lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)),
        transformers.Wav2Vec2ForSequenceClassification, ["projector"],
    ),
    "roberta pooler": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES), add_pooling_layer=False),
        transformers.RobertaModel, ["pooler.dense"],
    ),
    "untied output head": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
        transformers.LlamaForCausalLM, ["lm_head"],
    ),
}  # fmt: skip


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    if model.config.model_type == "wav2vec2":
        return {"input_values": torch.linspace(-1, 1, 400).sin()[None]}
    return {"input_ids": torch.arange(10)[None]}


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(**inputs(model))
    return found.logits if "logits" in found else found.pooler_output


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(function that loads the model, what it lacks)."""
    make, cls, lacking = CASES[request.param]
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    make().save_pretrained(folder)

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return cls.from_pretrained(folder)

    return load, lacking


def test_it_is_trained_whole_saved_and_said(case, tmp_path):
    load, lacking = case
    model = load(1)
    assert set(lacking) <= set(missing_modules(model))
    with pytest.warns(UserWarning, match="not in the model's checkpoint, so it is trained whole"):
        adapters = ra.attach(model, rank=2)
    assert set(lacking) <= set(adapters.heads) and not set(lacking) & set(adapters.modules)
    assert [lacking[0] in note for note in adapters.notes] == [True]
    for parameter in adapters.parameters():  # as training would
        nn.init.normal_(parameter, std=0.2)
    expected = output(model)
    for layout in ("uniform", "compact"):
        folder = ra.save(adapters, tmp_path / layout, layout=layout)
        assert torch.allclose(output(PeftModel.from_pretrained(load(2), folder)), expected, atol=1e-5)
        again = load(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # nothing is left to say
            ra.load(again, folder)
        assert torch.equal(output(again), expected)


def test_left_frozen_it_is_said_and_is_not_part_of_the_base(case, tmp_path):
    load, lacking = case
    with pytest.warns(UserWarning, match="drawn at random, frozen, and in no file"):
        adapters = ra.attach(load(1), rank=2, modules_to_save=())
    folder = ra.save(adapters, tmp_path)
    with pytest.warns(UserWarning, match="drawn at random"):
        ra.load(load(2), folder)  # the same base, whatever was drawn


def test_nothing_is_known_of_a_model_from_a_configuration_or_a_copy(tmp_path):
    config = transformers.BertConfig(**SIZES)
    for model in (transformers.BertForSequenceClassification(config), nn.Linear(2, 2)):
        assert missing_parameters(model) == {}
    transformers.BertModel(config).save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert missing_modules(loaded) == ["classifier"] and missing_modules(copy.deepcopy(loaded)) == []
    assert missing_modules(nn.Sequential(loaded, nn.Linear(2, 2))) == ["0.classifier"]
    assert missing_modules(loaded.bfloat16()) == ["classifier"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a task head is expected to be new
        assert list(ra.attach(loaded, rank=1).heads) == ["classifier"]
