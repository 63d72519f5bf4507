"""Every code block of docs/ does what it says: Python runs and prints what is shown, commands and YAML are real."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

import rankalloc as ra
from rankalloc.experiments.config import load_config
from rankalloc.methods.allocators import ALLOCATORS
from tests.support.training import train_mlp

from .blocks import PAGES, ROOT, blocks, command_lines, parse
from .worlds import SHORTER, WORLDS

WITH_PYTHON = [page for page, text in PAGES.items() if page.startswith("docs/") and blocks(text, "python")]


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys) -> Iterator:
    """Run a page's Python blocks in order, in one namespace and an empty folder; the names they leave."""
    registries = (ra.METHODS, ra.SCORES, ra.ALLOCATORS, ra.RULES, ra.PLANNERS)
    before = [dict(registry) for registry in registries]
    monkeypatch.chdir(tmp_path)

    def run(page: str) -> dict:
        names: dict = {"printed": []}
        for index, block in enumerate(blocks(PAGES[page], "python")):
            names |= WORLDS.get(page, {}).get(index, lambda folder: {})(tmp_path)
            code = block.code
            for text, shorter in SHORTER.get(page, {}).items():
                code = code.replace(text, shorter)
            capsys.readouterr()
            exec(compile(code, f"{page}, block {index}", "exec"), names)
            names["printed"].append(capsys.readouterr().out)
            if block.output is not None:
                assert names["printed"][-1] == block.output, f"{page}, block {index}"
        return names

    yield run
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p not in ("docs/extending.md", "docs/composing.md")])
def test_the_python_of_a_page_runs_and_prints_what_it_shows(page, run_page):
    names = run_page(page)
    assert names["printed"]


def test_a_score_from_outside_takes_fifteen_lines_and_works(run_page):
    page = "docs/extending.md"
    score = blocks(PAGES[page], "python")[0].code
    assert len([line for line in score.splitlines() if line.strip()]) <= 15
    names = run_page(page)
    train_mlp(
        names["model"], names["controller"], torch.optim.AdamW(names["adapters"].parameters(), lr=1e-2), 40
    )
    trace = names["controller"].finish()
    assert sum(names["adapters"].ranks().values()) == 6 and trace.scores.score == "squared"
    kept = ALLOCATORS["deep-first"]([torch.zeros(3).numpy()] * 3, ra.Demand(4, (1,) * 3, (0,) * 3, (3,) * 3))
    assert [int(mask.sum()) for mask in kept] == [0, 1, 3]
    assert sum(names["plan"].values()) == 6 and names["plan"]["2"] >= names["plan"]["4"]


def test_what_a_page_registers_is_gone_afterwards():
    assert "squared" not in ra.SCORES and "deep-first" not in ra.ALLOCATORS and "weight-norm" not in ra.PLANNERS


def test_an_adapter_keeps_out_of_anothers_way(run_page):
    (printed,) = run_page("docs/composing.md")["printed"]
    angles = [int(angle) for angle in re.findall(r"\d+(?=[,\]])", printed)]
    assert len(angles) > 4 and min(angles) > 70


def test_the_average_that_follows_is_saved(run_page):
    from tests.support.models import make_mlp

    run_page("docs/processes.md")
    assert sum(ra.load(make_mlp(), "ema").ranks().values()) == 6


@pytest.mark.parametrize("page", SHORTER)
def test_what_is_shortened_is_there(page):
    assert all(text in PAGES[page] for text in SHORTER[page])


STUDIES = {f"studies/{p.parent.name}": p.read_text("utf-8") for p in sorted(ROOT.glob("studies/*/README.md"))}
COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)}"[:90])
    for page, text in (PAGES | STUDIES).items() for words in command_lines(text) if words[0] == "rankalloc"
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_is_one_that_the_program_takes(words):
    assert parse(words).split()[0] == "rankalloc"


@pytest.mark.parametrize("line", [
    "rankalloc trian x.yaml", "rankalloc train x.yaml --no-such-option", "rankalloc shrink", "rankalloc ls nothing",
    "rankalloc shrink a/ b/ -o c/", "rankalloc sweep x.yaml --trials many",
])
def test_a_wrong_command_line_would_be_seen(line):
    with pytest.raises(Exception, match=r"(?i)no such|missing|unexpected|invalid|valid integer"):
        parse(line.split())


INLINE = [
    pytest.param(code, id=code) for code in sorted({
        code for text in PAGES.values() for code in re.findall(r"`(rankalloc [a-z][^`]*)`", text)
    })
]


@pytest.mark.parametrize("code", INLINE)
def test_a_command_named_in_a_sentence_exists(code):
    words = code.split()
    try:
        parse(words)
    except Exception as error:  # a name alone (`rankalloc shrink`) leaves its arguments out
        assert "Missing" in f"{type(error).__name__}: {error}", code


def test_other_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, text in PAGES.items():
        for words in command_lines(text):
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.M), (page, words)
            if words[:2] == ["python", "-m"] and not words[2].startswith("studies."):
                assert importlib.util.find_spec(words[2]), (page, words)


@pytest.mark.parametrize(
    "text", [pytest.param(b.code, id=page) for page, text in PAGES.items() for b in blocks(text, "yaml")]
)
def test_yaml_is_a_configuration(text, tmp_path):
    (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
    load_config(tmp_path / "page.yaml")
