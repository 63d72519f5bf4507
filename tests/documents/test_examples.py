"""The examples in the public docstrings run and show what they say; the public names exist and are light."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankalloc

ROOT = Path(rankalloc.__file__).parent


def modules_with_examples():
    """Names of the modules whose docstrings hold examples, found without importing them."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        if any(">>>" in (ast.get_docstring(n) or "") for n in nodes):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__")


MAIN = {
    "rankalloc.adapters.adapter", "rankalloc.adapters.attaching", "rankalloc.budget", "rankalloc.training.callback",
    "rankalloc.training.controller",
}
WITH_EXAMPLES = list(modules_with_examples())


def test_the_main_names_have_examples():
    assert set(WITH_EXAMPLES) >= MAIN


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(importlib.import_module(name), verbose=False)
    assert not failed and (tried or name not in MAIN)


def test_the_public_names_exist():
    wanted = {
        "attach", "RankBudget", "RankCallback", "RankController", "save", "load", "merge", "detach", "write_report",
        "RankTrace", "METHODS",
    }
    assert wanted <= set(rankalloc.__all__) and wanted <= set(dir(rankalloc))
    for name in wanted - {"write_report"}:
        assert getattr(rankalloc, name) is not None
    with pytest.raises(AttributeError, match="'atach'"):
        _ = rankalloc.atach


@pytest.mark.parametrize(
    "code",
    ["import rankalloc", "import rankalloc; rankalloc.METHODS; rankalloc.RankBudget(ranks=3); rankalloc.RankTrace"],
    ids=["the package", "its light names"],
)
def test_importing_is_light(code):
    heavy = ("torch", "transformers", "optuna", "matplotlib", "wandb", "scipy")
    code += f"; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
