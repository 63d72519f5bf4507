"""Data as users have it: what spreadsheets and pandas write, folders, saved sets, the hub, streams, images, sounds."""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from scipy.io import wavfile

from rankalloc.errors import ConfigError, DataError
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.experiments.tasks.cells import Mistake, listed, words_in
from tests.support.language import conversations, save_language_model, texts
from tests.support.task_files import SENTENCES, config, file_config, write_rows

ROWS = [{"text": s, "label": i % 2} for i, s in enumerate(SENTENCES)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return prepare(file_config("text-classification", write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", ROWS)))


def lines(separator=",", labels=("0", "1"), header="text{}label\n"):
    return header.format(separator) + "".join(f"{s}{separator}{labels[i % 2]}\n" for i, s in enumerate(SENTENCES))


@pytest.mark.parametrize(
    "name, content, sets",
    [
        ("floats.csv", lines(labels=("0.0", "1.0")), ()),
        ("semicolons.csv", lines(";"), ()),
        ("unmarked.csv", lines().encode("utf-16-be"), ()),
        ("indented.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), ()),
        ("tabs.csv", lines("\t"), ()),
        ("bars.tsv", lines("|"), ("task.delimiter='|'",)),
        ("marked.csv", lines().encode("utf-8-sig"), ()),
        ("utf16.csv", lines().encode("utf-16"), ()),
        ("windows.csv", lines().replace("\n", "\r\n").encode("cp1252"), ("task.encoding=cp1252",)),
        ("array.json", json.dumps(ROWS, indent=1), ()),
        ("lines.json", "".join(json.dumps(row) + "\n" for row in ROWS), ()),
        ("utf16.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16"), ()),
        ("floats.jsonl", "".join(json.dumps({**row, "label": float(row["label"])}) + "\n" for row in ROWS), ()),
    ],
)
def test_what_spreadsheets_and_pandas_write_is_the_same_data(tmp_path, expected, name, content, sets):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = prepare(file_config("text-classification", path, *sets))
    assert found.splits == expected.splits and found.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "kind, name, content, words",
    [
        ("text-classification", "a.csv", lines().encode() + b"ol\xe9,1\n", "task.encoding=cp1252"),
        ("text-classification", "a.csv", lines(labels=("0,5", "1,5"), separator=";"), "use kind: regression"),
        ("text-classification", "a.csv", lines(labels=("nan", "1")), "line 2: 'label' should be a class"),
        ("text-classification", "a.csv", json.dumps(ROWS), "holds JSON, not separated values; name it a.jsonl"),
        ("text-classification", "a.csv", b"PAR1" + bytes(20), "begins like a file of Parquet"),
        ("text-classification", "a.jsonl", lines(), "line 1: invalid JSON"),
        ("text-classification", "a.json", '[{"text": "a"},\n {"text": }]', "line 2: invalid JSON"),
        ("text-classification", "a.parquet", b"PAR1" + bytes(20), "cannot be read"),
        ("text-classification", "a.arrow", b"x" * 50, "cannot be read"),
        ("text-classification", "a.jsonl", '{"text": ["a"], "label": 1}\n', "list of words is for kind: token-class"),
        ("text-classification", "a.jsonl", '{"text": "a", "label": 1}\n{"body": "a", "label": 1}\n', "line 2: 'text'"),
        ("regression", "a.csv", lines(labels=('"0,5"', '"1,5"')), "write decimals with a point"),
        ("token-classification", "a.csv", "tokens,labels\n\"['a' 'b\",X\n", "2 tokens and 1 labels"),
        ("token-classification", "a.csv", "tokens,labels\na b,\"['X', Y]\"\n", "looks like a list and cannot be read"),
    ],
)
def test_what_is_in_doubt_is_one_sentence(tmp_path, kind, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        prepare(file_config(kind, path))
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(lines() + ",1\nhi,\nho,\n")
    with pytest.raises(DataError, match=r"line 38: 'text' .*; and 2 more are wrong \(line 39, 40\)"):
        prepare(file_config("text-classification", path))


def test_cells_that_say_na_are_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(lines(labels=("NA", "None")))
    assert prepare(file_config("text-classification", path)).labels == ["NA", "None"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_changed_file_with_its_old_time_is_read_anew(tmp_path, suffix):
    found = []
    for word in ("Anna", "Otto"):
        rows = datasets.Dataset.from_list([{**row, "text": row["text"].replace("Anna", word)} for row in ROWS])
        path = tmp_path / f"a.{suffix}"
        {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[suffix](path)
        os.utime(path, (1e9, 1e9))
        found.append(prepare(file_config("text-classification", path)).fingerprint)
    assert found[0] != found[1]


def test_decimal_commas_where_columns_are_parted_otherwise(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(lines(";", labels=("0,5", "-1,25")))
    assert {row["labels"] for row in prepare(file_config("regression", path)).splits["train"]} == {0.5, -1.25}


@pytest.mark.parametrize("cell", [
    "B-X I-X", "['B-X', 'I-X']", '["B-X", "I-X"]', "['B-X' 'I-X']", " [ 'B-X' , \"I-X\" ] ",
])  # fmt: skip
def test_lists_in_cells_are_read_as_who_wrote_them_meant(cell):
    assert words_in(cell, "labels") == ["B-X", "I-X"]


MESSAGES = [{"role": "user", "content": "it's [a] 'b'"}, {"role": "assistant", "content": 'say "x"'}]


@pytest.mark.parametrize("cell, meant", [
    ("[0 1 0]", [0, 1, 0]), ("[ 1. 2.]", [1.0, 2.0]), ("[True False]", [True, False]),
    (str(MESSAGES), MESSAGES), (str(MESSAGES).replace("}, {", "}\n {"), MESSAGES), (str(MESSAGES[:1]), MESSAGES[:1]),
    (json.dumps(MESSAGES), MESSAGES), ("[['a' 'b']\n ['c' 'd']]", [["a", "b"], ["c", "d"]]),
])  # fmt: skip
def test_lists_of_numbers_and_of_messages_are_read_too(cell, meant):
    """As Python's str(), pandas' to_csv (of lists and of numpy's arrays) and json.dumps write them."""
    assert listed(cell) == meant


@pytest.mark.parametrize("cell", [
    "['B-X', I-X]", "['a', __import__('os')]", "[" * 9000 + "'a'" + "]" * 9000, "['a' ... 'b']",
], ids=["unquoted", "code", "deep", "cut"])  # fmt: skip
def test_lists_in_cells_are_never_guessed_or_run(cell):
    with pytest.raises(Mistake, match="looks like a list|should be a list"):
        words_in(cell, "labels")


def test_words_in_brackets_are_words():
    assert words_in("[ sic ]", "tokens") == ["[", "sic", "]"]


def test_folders_files_and_saved_sets_are_the_same_data(tmp_path, expected):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.select(range(20)).to_parquet(tmp_path / "parquet" / "part-0.parquet")
    rows.select(range(20, 36)).to_parquet(tmp_path / "parquet" / "part-1.parquet")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text(lines())
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "one.arrow")
    for name in ("saved", "parquet", "parquet/part-0.parquet", "csv", "one.arrow"):
        found = prepare(file_config("text-classification", tmp_path / name))
        assert name.endswith("0.parquet") or (found.splits, found.fingerprint) == (
            expected.splits, expected.fingerprint
        ), name  # fmt: skip


def test_a_sets_own_splits_are_used(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    parts = {"train": rows.select(range(20)), "validation": rows.select(range(20, 26)), "test": rows.select([30, 31])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    found = prepare(file_config("text-classification", tmp_path / "set"))
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 20, "tune": 6, "report": 2}
    assert found.labels == ["no", "yes"] and "the tune split is the set's own validation" in found.notes
    given = file_config("text-classification", f"{tmp_path}/set[train[:10]]", f"task.tune='{tmp_path}/set[test]'")
    assert {split: len(rows) for split, rows in prepare(given).splits.items()} == {"train": 9, "tune": 2, "report": 1}
    with pytest.raises(DataError, match=r"no split 'tests' \(did you mean 'test'\?\)"):
        prepare(file_config("text-classification", f"{tmp_path}/set[tests]"))


def test_a_part_of_a_file_is_that_part_and_its_lines_are_the_files(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)

    def rows_of(part, *sets):
        given = file_config("text-classification", f"{path}[{part}]", *sets, f"task.tune={path}", f"task.report={path}")
        return len(prepare(given).splits["train"])

    sizes = {"train[:20]": 20, ":20": 20, "train[50%:]": 18, "train[-4:]": 4, "train": 36}
    assert {part: rows_of(part) for part in sizes} == sizes
    for part, words in (
        ("nosuch", "no split 'nosuch'; splits: train"), ("test[:3]", "no split 'test'"), ("train[40:50]", "no rows in"),
        ("train[x]", "is no part of the split"), ("train[:0]", "no rows in"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            rows_of(part)
    with pytest.raises(DataError, match="is streamed, and a part of a split"):
        prepare(file_config("causal-lm", f"{path}[train[:5]]", "task.streaming=true"))
    write_rows(path, [*ROWS[:30], {"text": "", "label": 1}, *ROWS[30:]])
    with pytest.raises(DataError, match="a.jsonl, line 31: 'text'"):
        rows_of("train[25:]")


def test_a_folder_of_several_kinds_of_files_is_one_sentence(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text(lines())
    (tmp_path / "README.md").write_text("data")
    with pytest.raises(DataError, match="mixes .csv and .jsonl files, of which only some would be read"):
        prepare(file_config("text-classification", tmp_path))


@pytest.mark.parametrize("source", ["some-org/some-set", "some-org/some-set:en", "some-org/some-set[train]"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(source, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'some-org/some-set.*' is no local file or folder and could not be read from"):
        prepare(config("task.kind=text-classification", f"task.train='{source}'", "model=x"))


def test_nothing_readable_in_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the data folder .*empty cannot be read"):
        prepare(file_config("text-classification", tmp_path / "empty"))
    with pytest.raises(DataError, match="no data file at"):
        prepare(file_config("text-classification", tmp_path / "nowhere" / "else"))


@pytest.mark.parametrize("kind, rows", [("chat", conversations), ("causal-lm", texts)])
def test_a_stream_gives_the_features_of_the_file(tmp_path, model, kind, rows):
    path = write_rows(tmp_path / "a.jsonl", rows(40))
    sets = ("data.max_length=40", "data.limit_tune=4", "data.limit_report=5")
    whole = prepare(file_config(kind, path, *sets, f"task.tune={path}", f"task.report={path}", model=model))
    streamed = prepare(file_config(kind, path, *sets, "task.streaming=true", model=model))
    assert streamed.streaming and not whole.streaming
    rows_of_a_pass = 31 if kind == "chat" else 4
    first, again = (list(islice(streamed.splits["train"], rows_of_a_pass)) for _ in range(2))
    assert first == again and sum("stream" in note for note in streamed.notes) == 2
    if kind == "chat":
        key = lambda row: (row["input_ids"], row["labels"])  # noqa: E731
        assert sorted(map(key, first)) == sorted(map(key, whole.splits["train"][9:]))
    with pytest.raises(ConfigError, match="has no end"):
        evaluate(streamed, streamed.build_model(), "train", 4)


def test_a_bad_row_of_a_stream_is_named_when_it_comes(tmp_path, model):
    rows = conversations(400)
    rows[350]["messages"][1]["content"] = ""
    path = write_rows(tmp_path / "a.jsonl", rows)
    sets = ("data.max_length=40", "data.limit_tune=4", "data.limit_report=5", "task.streaming=true")
    task = prepare(file_config("chat", path, *sets, model=model))
    with pytest.raises(DataError, match="a.jsonl, line 351: turn 2 of 'messages' is empty"):
        list(islice(task.splits["train"], 400))
    with pytest.raises(DataError, match="ends within the first 400 rows"):
        prepare(file_config("chat", write_rows(path, rows[:300]), "task.streaming=true", model=model))


@pytest.mark.parametrize("spoil, words", [
    (lambda text: text[:-30], "a.jsonl, line 60: invalid JSON"),
    (lambda text: text.replace("w1", "\xe9", 1).encode("latin-1"), "a.jsonl is not UTF-8 text"),
    (lambda text: text + '{"text": {"a": 1}}\n', "a.jsonl cannot be read|should be text"),
], ids=["cut", "another encoding", "another type"])  # fmt: skip
def test_what_is_wrong_with_a_streamed_file_is_one_sentence_whenever_it_comes(tmp_path, model, spoil, words):
    path = write_rows(tmp_path / "a.jsonl", texts(60))
    spoilt = spoil(path.read_text())
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    sets = ("data.max_length=40", "data.limit_tune=4", "data.limit_report=5", "task.streaming=true")
    with pytest.raises(DataError, match=words) as caught:
        list(islice(prepare(file_config("causal-lm", path, *sets, model=model)).splits["train"], 20))
    assert "\n" not in str(caught.value)


def test_images_in_folders(tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )).save_pretrained(tmp_path / "vit")  # fmt: skip
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), tuple(c + i for c in colour)).save(tmp_path / "images" / name / f"{i}.png")
    task = prepare(file_config("image-classification", tmp_path / "images", model=tmp_path / "vit"))
    assert task.labels == ["blue", "red"] and set(evaluate(task, task.build_model(), "tune", 4).metrics) >= {"accuracy"}
    batch = task.collator(task.splits["train"][:3])
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["labels"].shape == (3,)
    colours = batch["pixel_values"].mean((2, 3))
    assert ((colours[:, 0] > colours[:, 2]) == (batch["labels"] == 1)).all()
    (tmp_path / "images" / "red" / "9.png").write_bytes(b"no image")
    broken = prepare(file_config("image-classification", tmp_path / "images", model=tmp_path / "vit"))
    with pytest.raises(DataError, match="cannot be decoded"):
        [row for split in broken.splits.values() for row in split]


def test_sounds_in_folders(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(32, 32),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        vocab_size=8, classifier_proj_size=16,
    )).save_pretrained(tmp_path / "model")  # fmt: skip
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "model")
    for name, pitch in (("high", 900), ("low", 200)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(6):
            wave = np.sin(np.arange(1600 + 100 * i) / 16000 * 2 * np.pi * (pitch + i))
            wavfile.write(tmp_path / "sounds" / name / f"{i}.wav", 16000, (wave * 20000).astype(np.int16))
    task = prepare(file_config("audio-classification", tmp_path / "sounds", model=tmp_path / "model"))
    assert task.labels == ["high", "low"]
    lengths = {len(row["input_values"]) for row in task.splits["train"]}
    assert lengths <= {800 + 50 * i for i in range(6)} and len(lengths) > 1
    record = evaluate(task, task.build_model(), "train", 4)
    assert 0 <= record.metrics["accuracy"] <= 1 and torch.isfinite(torch.tensor(record.metrics["loss"]))
