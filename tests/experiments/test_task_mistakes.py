"""A task whose data files or model cannot be used says why in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from rankalloc.errors import ConfigError, DataError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.tasks import models as models_of_tasks
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.packages import minilm_folder
from tests.support import models
from tests.support.task_files import SENTENCES, config, file_config

GOOD = "text,label\n" + "".join(f"{s},{i % 2}\n" for i, s in enumerate(SENTENCES))


@pytest.mark.parametrize(
    "kind, name, content, words",
    [
        ("text-classification", "a.csv", None, "no data file at"),
        ("text-classification", "a.parquet", "x", "no Parquet file"),
        ("text-classification", "a.txt", "x", "reads .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow"),
        ("text-classification", "a.csv", "", "is empty"),
        ("text-classification", "a.csv", "text,label\n", "is empty"),
        ("text-classification", "a.csv", "txt,y\nhi,1\n", "no column 'text' (did you mean 'txt'?); columns: 'txt'"),
        ("text-classification", "a.csv", "text,label\nhi,1\nho,0\n", "too small to split"),
        ("text-classification", "a.csv", GOOD + "hi,\n", "line 38: 'label' should be a class (text or"),
        ("text-classification", "a.csv", GOOD + "hi,0.5\n", "line 38: 'label' should be a class, got '0.5'; for"),
        ("text-classification", "a.csv", GOOD + ",1\n", "line 38: 'text' should be text, got ''"),
        ("text-classification", "a.csv", GOOD + "hi,1,2\n", "line 38: 3 values for 2 columns"),
        ("text-classification", "a.csv", GOOD + "hi,1,2\nho\nha,1\nhu,,1,1\n", "; and 2 more are wrong (line 39, 41)"),
        ("text-classification", "a.csv", GOOD + "hi,\"['0', '1']\"\n", "line 38: 'label' should be a class (text or a"),
        ("text-classification", "a.csv", GOOD + 'hi,"[0, 1]"\n', "got the list '[0, 1]'; one label a word is for kind"),
        ("text-classification", "a.csv", GOOD + "hi,['0' '1']\n", "line 38: 'label' should be a class (text or a"),
        ("text-classification", "a.jsonl", '{"text": "a", "label": ["x"]}\n', "got the list ['x']; one label a word"),
        ("text-classification", "a.csv", GOOD + '"hi,1\n', "invalid ','-separated text"),
        ("text-classification", "a.csv", "text,text\nhi,1\n", "columns of the same name"),
        ("text-classification", "a.csv", GOOD.replace(",0", ",1"), "all rows have the label '1'"),
        ("text-classification", "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', "line 3: invalid JSON"),
        ("text-classification", "a.jsonl", "[1]\n", "line 1: should be an object, and is a list"),
        ("text-classification", "a.jsonl", '{"text": "a", "label": 1.5}\n', "line 1: 'label' should be a class, got 1"),
        ("text-classification", "a.jsonl", '{"text": "a", "label": null}\n', "line 1: 'label' should be a class"),
        ("regression", "a.csv", GOOD + "hi,high\n", "line 38: 'label' should be a finite number, got 'high'"),
        ("regression", "a.csv", GOOD + "hi,nan\n", "line 38: 'label' should be a finite number, got 'nan'"),
        ("token-classification", "a.csv", "tokens,labels\na b,X\n", "line 2: 2 tokens and 1 labels"),
        ("token-classification", "a.jsonl", '{"tokens": 3, "labels": []}\n', "line 1: 'tokens' should be a list"),
        ("causal-lm", "a.txt", "\n \n", "is empty"),
        ("causal-lm", "a.txt", "one line\n", "it has 1 row, and needs at least 3 that differ; or give separate"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, kind, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        prepare(file_config(kind, path))
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_utf8_is_one_sentence(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nol\xe9,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(file_config("text-classification", path))


def test_labels_unseen_in_training_are_named(tmp_path):
    train, tune = tmp_path / "train.csv", tmp_path / "tune.csv"
    train.write_text(GOOD)
    tune.write_text("text,label\nhi,1\nho,7\n")
    with pytest.raises(DataError, match=r"tune.csv, line 3: label '7' does not occur in training; known: 0, 1"):
        prepare(file_config("text-classification", train, f"task.tune={tune}", f"task.report={tune}"))


def test_given_splits_are_used_as_they_are(tmp_path):
    train, tune = tmp_path / "train.csv", tmp_path / "tune.csv"
    train.write_text(GOOD)
    tune.write_text("text,label\nhi,1\nho,0\n")
    prepared = prepare(file_config("text-classification", train, f"task.tune={tune}"))
    assert {split: len(rows) for split, rows in prepared.splits.items()} == {"train": 32, "tune": 2, "report": 4}


@pytest.mark.parametrize(
    "model, words",
    [
        ("./nowhere", "no model folder at"),
        ("some-org/not-a-model", "could not be fetched from the model hub"),
        ("bad name!", "could not be fetched from the model hub"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(model, words):
    with pytest.raises(ConfigError) as caught:
        prepare(config(f"model={model}"))
    assert words in str(caught.value) and model.removeprefix("./") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare(config(f"model={tmp_path}"))
    # Only safetensors are read: pickled weights count as none.
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((minilm_folder() / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded.*safetensors"):
        prepare(config(f"model={tmp_path}", "data.limit_train=4")).build_model()


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_a_model_folder_without_a_tokenizer_is_one_sentence(architecture, tmp_path):
    """transformers makes one that knows no words, and every text becomes the same."""
    models.MAKERS[architecture]().save_pretrained(tmp_path / "model")
    path = tmp_path / "a.csv"
    path.write_text(GOOD)
    sets = [f"task={{kind: text-classification, train: {path}}}", f"model={tmp_path / 'model'}"]
    with pytest.raises(ConfigError, match="holds no tokenizer .*save the model's own there"):
        prepare(load_config(None, sets))


@pytest.mark.parametrize(("kind", "model", "words"), [
    ("seq2seq", "llama", "(llama), so it cannot learn seq2seq; give an encoder-decoder, such as a T5"),
    ("chat", "t5", "(t5), so it cannot learn chat; give a decoder, or make the task kind: seq2seq"),
    ("chat", "bert", "is an encoder (bert), which sees later tokens, so it cannot learn chat; give a decoder"),
    ("token-classification", "mamba", "(mamba), so it cannot learn token-classification; give a model of texts"),
    ("text-classification", "vit", "(vit), so it cannot learn text-classification; give a model of texts"),
    ("image-classification", "bert", "an encoder (bert), so it cannot learn image-classification; give a model of i"),
])  # fmt: skip
def test_a_model_of_another_kind_is_named_before_its_tokenizer_is_looked_at(kind, model, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    with pytest.raises(ConfigError) as caught:
        models_of_tasks.find_model(config(f"task={{kind: {kind}, train: x}}", f"model={tmp_path}"), kind)
    assert words in str(caught.value)


def test_more_tokens_than_positions_is_one_sentence():
    with pytest.raises(ConfigError, match="data.max_length 513 is more than the 512 positions"):
        prepare(config("data.max_length=513"))
