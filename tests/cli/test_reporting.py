"""``rankalloc report``: pages, comparisons, short forms on stdout, figures, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from tests.support.models import make_mlp, randomize
from tests.support.report_odd_samples import one_layer


def run(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)], prog_name="rankalloc")


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Folders ``a`` and ``b`` of a run each, with two figures, in the current folder."""
    nothing = {"allocations": [], "scores": None, "singular_values": None, "logs": []}
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        one_layer().model_copy(update={"name": name, **nothing}).save(Path(name) / "trace.json")


def test_two_runs_side_by_side(two):
    done = run("a", "--compare", "b")
    assert done.exit_code == 0 and done.stdout == "wrote a/comparison.html\n"
    assert "<h1>a and b</h1>" in Path("a/comparison.html").read_text() and not Path("a/report.html").exists()
    assert json.loads(Path("a/comparison.json").read_text())["other"]["trace"]["name"] == "b"


def test_short_forms_go_to_stdout_or_to_a_file(two):
    text, data = run("a", "--format", "md"), run("a", "--compare", "b", "--format", "json")
    assert text.stdout.startswith("## a\n\n**The budget was ") and text.stdout.endswith("</details>\n")
    assert json.loads(data.stdout)["comparison"]["names"] == ["a", "b"]
    assert [path.name for path in Path("a").iterdir()] == ["trace.json"]
    assert run("a", "-o", "a.md").stdout == "wrote a.md\n" and Path("a.md").read_text() == text.stdout


def test_figures_go_to_a_folder_of_their_own(two):
    from rankalloc.report.paper import FORMATS

    done = run("a", "-o", "a.html", "--figures", "figures", "--title", "T")
    assert done.exit_code == 0 and done.stdout == "wrote a.html\nwrote the figures to figures\n"
    names = {path.name for path in Path("figures").iterdir()}
    assert {f"map-{end}.{form}" for end in ("single", "double") for form in FORMATS} <= names
    assert all(name.split("-")[0].isidentifier() for name in names)


def test_figures_alone_write_no_page(two):
    done = run("a", "--figures", "figures")
    assert done.exit_code == 0 and done.stdout == "wrote the figures to figures\n"
    assert len(list(Path("figures").iterdir())) > 0 and [path.name for path in Path("a").iterdir()] == ["trace.json"]


def test_an_adapter_that_was_checked_and_what_was_cut_from_it(tmp_path, monkeypatch):
    """Real records: what ``check --json`` prints, and the folder that ``shrink`` writes."""
    monkeypatch.chdir(tmp_path)
    adapters = ra.attach(make_mlp(), rank=4, init="lora")
    randomize(adapters)
    ra.save(adapters, "adapter")
    ra.shrink("adapter", ra.RankBudget(fraction=0.5), "small")
    Path("checked.json").write_text(json.dumps(ra.check("adapter").record()))
    assert run("checked.json", "-o", "page.html").exit_code == 0 and "Adapter check" in Path("page.html").read_text()
    assert run("small").stdout == "wrote small/report.html\n"
    found = json.loads(run("checked.json", "--compare", "small", "--format", "json").stdout)
    assert found["kind"] == "comparison" and {x["first"] for x in found["comparison"]["layers"]} == {4}
    kept = json.loads(Path("small/shrink.json").read_text())["layers"]
    assert [x["second"] for x in found["comparison"]["layers"]] == [layer["rank"] for layer in kept]
    assert found["verdict"]["sentence"].startswith("Not like with like: checked is")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", '{"peft_type": "LORA"}', "no record of its training; to look at it: rankalloc check x"),
        ("audit.db", "", "an audit that has no record yet, so there is nothing to report on; go on with rankalloc "
         "audit x/config.yaml --output x"),
        ("study.db", "", "go on with rankalloc sweep x/config.yaml --output x"),
        ("checkpoint-5", None, "go on with rankalloc train x/config.yaml --resume --output x"),
        ("notes.txt", "", "nothing to report on in x: it has no audit.json, sweep.json, trace.json, shrink.json, "),
    ],
)
def test_a_folder_without_a_record_says_what_it_is_and_how_to_go_on(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("x/config.yaml").write_text("name: a\n")
    Path("x", name).mkdir() if content is None else Path("x", name).write_text(content)
    done = run("x")
    assert done.exit_code == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(list(Path("x").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", '{"peft_type": "LORA"}', "to look at the adapter: rankalloc check ."),
        ("adapter_model.safetensors", "", "to look at an adapter: rankalloc check adapter_model.safetensors"),
        ("config.json", '{"model_type": "bert"}', "is a model's configuration, which no report is made from"),
        ("config.yaml", "name: a", "is a configuration and not a record"),
        ("x.json", '{"a": 1}', "is no record that rankalloc wrote"),
        ("x.json", '"words"', "holds text, not an object"),
        ("audit.json", '{"arms": [', "may be damaged or no audit's record at all"),
        ("sweep.json", "", "may be damaged or no sweep's record at all"),
        ("trace.json", '{"version": 1, "layers"', "may be damaged or no run's record at all"),
        ("shrink.json", "{", "may be damaged or no cut's record at all"),
    ],
)
def test_a_file_that_is_no_record_says_what_it_is(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    done = run(name)
    assert done.exit_code == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == [name]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["a", "--format", "pdf"], 2, "there is no format 'pdf'; a report is written as html, md, json"),
        (["a", "--compare", "c"], 1, "nothing to report on at c"),
        (["a", "-o", "x.pdf"], 1, "ending in .html, .md or .json"),
        (["a", "-o", "x.html", "--format", "md"], 1, "x.html ends in .html, and the format is md; name it .md"),
        (["a", "-o", "a/trace.json"], 1, "a/trace.json is there and is no report"),
        (["a", "--figures", "a/trace.json"], 1, "is a file; give --figures a folder"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(two, words, code, sentence):
    before = sorted(Path().rglob("*"))
    done = run(*words)
    assert done.exit_code == code and sentence in done.stderr and "Traceback" not in done.stderr
    assert sorted(Path().rglob("*")) == before
