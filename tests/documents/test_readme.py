"""The README's example runs as it stands, only shorter; its links lead somewhere. Its commands: test_docs."""

from __future__ import annotations

import re
from pathlib import Path

import rankalloc as ra

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"<!-- tested:.*?-->\n```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    shorter = code.replace("max_steps=150", "max_steps=4, per_device_train_batch_size=2, disable_tqdm=True")
    assert shorter != code
    names: dict = {}
    exec(compile(shorter, "README.md", "exec"), names)
    assert sum(names["adapters"].ranks().values()) == 216
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    page = (tmp_path / "reports" / "run.html").read_text()
    assert "attention.self.query" in page
    assert sum(ra.RankTrace.load(tmp_path / "out" / "trace.json").final_ranks) == 216


def test_the_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_it_links_to_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
