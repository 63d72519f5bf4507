"""``export``, ``import`` and ``extract`` on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app, progress
from rankalloc.cli.conversions import COMMANDS
from rankalloc.posthoc.checkpoints import Checkpoint
from tests.support.models import logits_of, make_llama, randomize


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc")


@pytest.fixture
def saved(tmp_path):
    model = make_llama()
    adapters = ra.attach(model, rank=3)
    randomize(adapters)
    ra.save(adapters, tmp_path / "a")
    make_llama().save_pretrained(tmp_path / "base")
    return tmp_path, logits_of(model), ra.merge(adapters)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_examples(name):
    done = run(name, "--help")
    assert done.exit_code == 0
    assert done.stdout.split("Examples:\n")[1].strip().startswith(f"rankalloc {name}")


def test_export_import_and_extract(saved):
    folder, expected, merged = saved
    done = run("export", folder / "a", "-o", folder / "b", "--pad-to", "8")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "b" / "adapter_config.json").read_text())["r"] == 8
    done = run("export", folder / "b", "-o", folder / "k.safetensors", "--format", "kohya", "--prefix", "lora_te")
    assert done.exit_code == 0, done.output
    done = run("import", folder / "k.safetensors", "--base", folder / "base", "-o", folder / "c")
    assert done.exit_code == 0 and "14 layers" in done.stdout
    merged.save_pretrained(folder / "tuned")
    words = ["extract", folder / "base", folder / "tuned", "--ranks", "42", "--rank", "4", "-o", folder / "d"]
    done = run(*words)
    assert done.exit_code == 0 and "100.0% of the change" in done.stdout
    assert json.loads(run(*words, "--json").stdout)["params"] == 42 // 14 * sum(
        layer.params_per_rank for layer in ra.attach(make_llama(), rank=1)
    )
    for name in "bcd":
        model = make_llama()
        ra.load(model, folder / name)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_a_long_extraction_says_how_far_it_is(saved, monkeypatch):
    folder, _, merged = saved
    merged.save_pretrained(folder / "tuned")
    words = ["extract", folder / "base", folder / "tuned", "--ranks", "42", "--rank", "4", "-o", folder / "d"]
    assert "tensor" not in run(*words).stderr
    monkeypatch.setattr(progress, "_INTERVAL", 0)
    done = run(*words, "--json")
    tensors = len(Checkpoint(folder / "base").shapes)
    lines = [line for line in done.stderr.splitlines() if "  tensor " in line]
    assert len(lines) == tensors and lines[1].startswith(f"1/{tensors}  tensor model.")
    assert json.loads(done.stdout)["params"]


@pytest.mark.parametrize(
    "words, code",
    [
        (["export", "nowhere", "-o", "out"], 1), (["export", "a", "-o", "out", "--layout", "wide"], 2),
        (["export", "a"], 2), (["import", "nowhere.safetensors", "--base", "base", "-o", "out"], 1),
        (["import", "x.safetensors", "--base", "./nowhere", "-o", "out"], 2),
        (["extract", "base", "nowhere", "--ranks", "3", "-o", "out"], 1), (["extract", "base", "base", "-o", "out"], 2),
        (["extract", "base", "base", "--ranks", "3", "--params", "9", "-o", "out"], 2),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(saved, words, code, monkeypatch):
    monkeypatch.chdir(saved[0])
    done = run(*words)
    assert done.exit_code == code and done.stdout == "" and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]) == 1
    assert not (saved[0] / "out").exists()
