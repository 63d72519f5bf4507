"""The configuration: layers of defaults, YAML and overrides, and every mistake at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankalloc.errors import ConfigError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.file_task import FileTask
from rankalloc.experiments.sweep_section import FloatRange, IntRange


def mistakes(*overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_complete_and_give_one_budget_unit():
    config = load_config(None)
    assert (config.task, config.method) == ("punctuation", "auto")
    assert (config.adapter.rank, config.adapter.alpha) == (12, 24.0)
    assert config.budget.fraction == 0.5 and config.budget.ranks is None
    assert config.training.steps == 150 and config.training.epochs is None
    assert config.searched_methods == ["auto", "uniform"]
    assert config.folder.as_posix() == "runs/run"


def test_yaml_beats_defaults_and_overrides_beat_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: first\nadapter: {rank: 4, alpha: 8}\ntraining:\n")
    config = load_config(path, ["adapter.rank=6", "training.learning_rate=4e-3", "method_options.beta1=0.9"])
    assert (config.name, config.adapter.rank, config.adapter.alpha) == ("first", 6, 8.0)
    assert config.training.learning_rate == 4e-3
    assert config.training.steps == 150
    assert config.method_options == {"beta1": 0.9}


def test_scientific_notation_that_yaml_calls_text_is_a_number(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("training: {learning_rate: 4e-3}\nsweep: {search: {learning_rate: [1e-3, 5e-3]}}\n")
    config = load_config(path)
    assert config.training.learning_rate == 0.004
    assert config.sweep.search.learning_rate == [0.001, 0.005]


@pytest.mark.parametrize("unit, amount", [("ranks", 100), ("params", 5000), ("bytes", 20000), ("fraction", 0.25)])
def test_a_given_budget_unit_replaces_the_default_one(unit, amount):
    budget = load_config(None, [f"budget.{unit}={amount}"]).budget
    units = ("ranks", "params", "bytes", "fraction")
    assert {u: getattr(budget, u) for u in units if getattr(budget, u) is not None} == {unit: amount}


def test_epochs_replace_steps():
    assert load_config(None, ["training.epochs=2"]).training.steps is None
    assert "training.steps" in mistakes("training.epochs=2", "training.steps=3")[0]


def test_all_mistakes_come_at_once_with_path_value_and_nearest_name():
    lines = mistakes(
        "adaptor.rank=3", "adapter.rnk=4", "adapter.alpha=0", "training.learning_rate=quick", "tracking=wandbb",
        "method=adalra", "task=punctuaton", "seed=true", "name=../up", "nonsense",
        "sweep.search.method=[adalora, unifrm]", "sweep.search.rank=[0, 2]", "sweep.search.budget.hihg=1",
    )  # fmt: skip
    expected = [
        "adaptor: unknown key 'adaptor' (did you mean 'adapter'?)",
        "adapter.rnk: unknown key 'rnk' (did you mean 'rank'?)",
        "adapter.alpha: should be above 0, got 0",
        "training.learning_rate: should be a number, got 'quick'",
        "tracking: unknown choice 'wandbb' (did you mean 'wandb'?)",
        "method: unknown method 'adalra' (did you mean 'adalora'?)",
        "task: unknown task 'punctuaton' (did you mean 'punctuation'?)",
        "seed: should be a number, got True",
        "name: should be one plain folder name (letters, digits, . _ - +), got '../up'",
        "'nonsense' is not an override",
        "sweep.search.rank.0: should be at least 1, got 0",
        "sweep.search.budget.hihg: unknown key 'hihg' (did you mean 'high'?)",
        "sweep.search.method: unknown method 'unifrm' (did you mean 'uniform'?)",
    ]
    for start in expected:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    "override, path",
    [
        ("adapter.rank=0", "adapter.rank"),
        ("adapter.rank=1.5", "adapter.rank"),
        ("adapter.dropout=1", "adapter.dropout"),
        ("adapter.target_modules=[]", "adapter.target_modules"),
        ("adapter.target_modules={a: b}", "adapter.target_modules"),
        ("budget.fraction=0", "budget.fraction"),
        ("budget.fraction=1.1", "budget.fraction"),
        ("budget.min_rank=20", "budget"),
        ("budget.every=0", "budget.every"),
        ("budget.freeze=0.95", "budget.freeze"),
        ("budget.shape=qubic", "budget.shape"),
        ("budget=0.5", "budget"),
        ("training.steps=0", "training.steps"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.scheduler=linnear", "training.scheduler"),
        ("data.limit_train=0", "data.limit_train"),
        ("sweep.trials=0", "sweep.trials"),
        ("sweep.search.rank=[]", "sweep.search.rank"),
        ("sweep.search.rank.low=20", "sweep.search.rank.high"),
        ("sweep.search.alpha.low=129", "sweep.search.alpha.high"),
        ("sweep.search.alpha={low: 0, high: 4, log: true}", "sweep.search.alpha.log"),
        ("sweep.search.alpha={low: 1, high: 4, log: true, step: 1}", "sweep.search.alpha.step"),
        ("sweep.search.budget={low: 0.5, high: 2}", "sweep.search.budget"),
        ("sweep.search.budget=0", "sweep.search.budget"),
        ("seed=-1", "seed"),
        ("name=.", "name"),
        ("name=a/b", "name"),
    ],
)
def test_values_out_of_range_are_named(override, path):
    lines = mistakes(override)
    assert any(line.startswith(f"{path}: ") for line in lines), lines


def test_two_budget_units_are_named_with_their_values():
    (line,) = mistakes("budget.ranks=40", "budget.fraction=0.3")
    assert "ranks 40 and fraction 0.3" in line


def test_search_dimensions_are_values_choices_or_ranges():
    search = load_config(
        None,
        ["sweep.search.rank={low: 2, high: 8, step: 2}", "sweep.search.alpha.low=2", "sweep.search.budget=0.5",
         "sweep.search.learning_rate=[1e-3, 2e-3]", "sweep.search.method=uniform"],
    ).sweep.search  # fmt: skip
    assert search.rank == IntRange(low=2, high=8, step=2)
    assert search.alpha == FloatRange(low=2, high=128, log=True)
    assert (search.budget, search.learning_rate, search.method) == (0.5, [1e-3, 2e-3], "uniform")
    assert load_config(None, ["method=uniform"]).searched_methods == ["uniform"]


def test_an_override_turns_the_task_into_a_mapping():
    config = load_config(None, ["task.kind=token-classification", "task.train=a.csv", "model=some/model"])
    assert isinstance(config.task, FileTask)
    assert (config.task.text, config.task.label) == ("tokens", "labels")


def test_a_file_task_needs_a_model_and_sensible_shares():
    lines = mistakes("task.kind=regression", "task.train=a.csv")
    assert lines == ["model: a task from a file needs one: a local folder or a hub id, got None"]
    lines = mistakes("task.kind=causal-lm", "task.train=a.txt", "task.tune_share=0.6", "task.report_share=0.5")
    assert lines[0].startswith("task.report_share: ")
    lines = mistakes("task.kind=regresion", "task.trian=a.csv", "model=x")
    assert [line.split(":")[0] for line in lines] == ["task.kind", "task.train", "task.trian"]


def test_paths_in_yaml_are_relative_to_it_and_in_overrides_to_the_current_folder(tmp_path, monkeypatch):
    folder, here = tmp_path / "study", tmp_path / "here"
    (folder / "tiny").mkdir(parents=True)
    here.mkdir()
    path = folder / "a.yaml"
    path.write_text("task: {kind: regression, train: data/a.csv, tune: b.csv}\nmodel: tiny\n")
    monkeypatch.chdir(here)
    config = load_config(path, ["task.tune=c.csv"])
    assert config.task.train == str(folder / "data/a.csv")
    assert config.task.tune == str(here / "c.csv")
    assert config.model == str(folder / "tiny")
    assert load_config(path, ["model=org/name"]).model == "org/name"
    assert load_config(path, ["model=./near"]).model == str(here / "near")


def test_the_resolved_config_round_trips_from_another_folder(tmp_path, monkeypatch):
    overrides = [
        "task.kind=causal-lm", "task.train=a.txt", "model=org/name", "budget.params=900", "training.epochs=1.5",
        "sweep.search.rank={low: 1, high: 9}", "training.learning_rate=1e-5", "name=Größe 2",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = load_config(None, overrides)
    saved = tmp_path / "runs" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config
    assert load_config(None).replaced({}) == load_config(None)


def test_replaced_validates_the_new_values():
    config = load_config(None).replaced({"adapter.rank": 5, "budget.fraction": None, "budget.ranks": 30})
    assert (config.adapter.rank, config.budget.ranks, config.budget.fraction) == (5, 30, None)
    with pytest.raises(ConfigError, match="adapter.rank: .* got 0"):
        config.replaced({"adapter.rank": 0})


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name: a\ntraining: [1,\n", "not valid YAML at line 3"),
        (b"a: b: c\n", "not valid YAML at line 1"),
        (b"- a\n- b\n", "holds a list"),
        (b"a,b\n1,2\n", "holds text"),
        (b'{"text": 1}\n{"text": 2}\n', "not valid YAML at line 2"),
        (b'{"version": 1, "layers": [', "not valid YAML"),
        (b"\n", "is empty; leave it out"),
        (bytes(range(256)), "not UTF-8"),
        (b'\x20\x00\x00\x00\x00\x00\x00\x00{"a": {}}', "not valid YAML"),
        (b'{"version": 1, "layers": [], "budget": {}, "scaling": 1.0}', "is the record of a run and not a config"),
        (b'{"version": 1, "trials": [], "space": {}}', "is the record of a sweep and not a configuration"),
        (b'{"version": 1, "arms": [], "comparisons": [], "looks": []}', "is the record of an audit and not"),
        (b'{"trace": null, "sweep": null, "control": null}', "is the data of a report and not"),
        (b'{"peft_type": "LORA", "r": 8}', "is an adapter's configuration and not"),
        (b'{"model_type": "bert"}', "is a model's configuration and not"),
        (b"name: \xff\n", "not UTF-8"),
        (b"name: \x07\n", "not valid YAML"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    (line,) = mistakes(path=path)
    assert words in line and str(path) in line


def test_a_missing_file_or_a_folder_is_one_sentence(tmp_path):
    assert mistakes(path=tmp_path / "none.yaml") == [f"no configuration file at {tmp_path / 'none.yaml'}"]
    assert mistakes(path=tmp_path) == [f"the configuration {tmp_path} is a folder; give a YAML file"]
    (tmp_path / "config.yaml").write_text("# all defaults\n")
    assert mistakes(path=tmp_path)[0].endswith(f"give {tmp_path / 'config.yaml'}, which it holds")
    load_config(tmp_path / "config.yaml")
    (tmp_path / "trace.json").write_text('{"layers": [], "budget": {}, "scaling": 1}')
    assert mistakes(path=tmp_path / "trace.json")[0].endswith(f"belongs to it is {tmp_path / 'config.yaml'}")


def test_an_override_that_is_no_yaml_names_itself():
    assert mistakes("name=[1") == ["name: '[1' is not a valid YAML value; quote it if it is text"]
    assert "is not an override" in mistakes("a..b=1")[0]


def test_loading_does_not_pay_for_torch():
    imports = "import sys; from rankalloc.experiments.config import load_config"
    code = f"{imports}; load_config(None); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(("override", "said"), [
    ("training.steps=2.5", "training.steps: should be a whole number, got 2.5"),
    ("budget.ranks=many", "budget.ranks: should be a whole number, got 'many'"),
    ("training.steps=[3]", "training.steps: should be a whole number, got [3]"),
    ("data.max_length=1", "data.max_length: should be at least 2, got 1"),
    ("adapter.dropout=1", "adapter.dropout: should be below 1, got 1"),
    ("training.learning_rate=.inf", "training.learning_rate: should be a finite number, got inf"),
    ("seed=4294967296", "seed: should be below 4294967296, got 4294967296"),
    ("sweep.search.rank=[]", "sweep.search.rank: should hold at least one value, got []"),
    ("trust_remote_code=often", "trust_remote_code: should be true or false, got 'often'"),
    ("adapter.modules_to_save=3", "adapter.modules_to_save: should be a list, got 3"),
])  # fmt: skip
def test_a_mistake_is_told_in_plain_words(override, said):
    assert mistakes(override) == [said]
