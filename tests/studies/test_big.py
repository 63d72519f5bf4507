"""studies/big: sizes are the anchors', every configuration runs dry, and data and metrics are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from rankalloc.cli import app
from rankalloc.errors import DataError
from rankalloc.experiments.config import load_config
from rankalloc.methods.planners.planning import layer_shapes
from studies import big
from studies.big.__main__ import main
from studies.big.data import PROMPT, SETS, TESTS, Asked
from studies.big.metrics import CHOICES, choice_match, number_match
from studies.big.shapes import LINEAR, MODELS, modules_of, table

from ..support.language import make_language_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = Path(big.__path__[0])
CONFIGS = {path.stem: load_config(path) for path in sorted(FOLDER.glob("*.yaml"))}
AUDITS = [name for name in CONFIGS if not name.startswith("sweep-")]
ONE_OF_EACH = ("gsm8k-1b", "sweep-metamath-3b")
"""Run dry in the short suite; the others take the same road."""
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# {configuration: the anchor's rank and modules}
ANCHORS = {
    "gsm8k-1b": (32, FIVE), "gsm8k-8b": (32, FIVE), "commonsense-1b": (32, LINEAR), "commonsense-8b": (32, FIVE),
    "metamath-3b": (32, ("q_proj", "v_proj")), "metamath-8b": (8, ("q_proj", "k_proj", "v_proj", "o_proj")),
}
REAL = {
    "meta-llama/Llama-3.2-1B": (2048, 16, 32, 8, 8192, True), "meta-llama/Llama-3.2-3B": (3072, 28, 24, 8, 8192, True),
    "meta-llama/Llama-3.1-8B": (4096, 32, 32, 8, 14336, False),
}


def write(path: Path, rows: list[dict], array: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)), encoding="utf-8")


def question(i: int) -> str:
    return f"Ann has {i} boats and buys {i}.  How many has she?"


def solved(i: int) -> dict:
    return {"question": question(i), "answer": f"She has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def chosen(i: int, kind: int) -> dict:
    words = CHOICES[kind]
    word = words[i % len(words)]
    return {"instruction": f"Which of {'/'.join(words)}, {i}?", "input": "", "output": f"the correct answer is {word}",
            "answer": word}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model, and a dozen rows of every set, as they are downloaded and as they are converted."""
    home = tmp_path_factory.mktemp("big")
    make_language_model(max_position_embeddings=2048).save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    maths = home / "maths"
    write(maths / "main" / "train.jsonl", [*map(solved, range(12)), solved(20)])
    write(maths / "main" / "test.jsonl", [*map(solved, range(20, 23)), {**solved(20), "answer": "#### 40"}])
    write(maths / "socratic" / "train.jsonl", [solved(99)])
    made = [
        {"type": "GSM_Rephrased", "query": f"{i} boats, and as many again?", "original_question": question(i).upper(),
         "response": f"Twice {i} is {2 * i}. The answer is: {2 * i}"}
        for i in (*range(12), 21)
    ]  # fmt: skip
    write(maths / "MetaMathQA-395K.json", [*made, {**made[0], "response": "long " * 400}], array=True)
    for name in TESTS:
        write(home / "choices" / "dataset" / name / "test.json", [chosen(100 + i, i % 5) for i in range(4)], array=True)
    rows = [chosen(i, i % 5) for i in range(12)]
    for size in ("15k", "170k"):
        write(home / "choices" / "ft-training_set" / f"commonsense_{size}.json", [*rows, chosen(101, 1)], array=True)
    for name, source in {"gsm8k": maths, "metamath": maths, "commonsense": home / "choices"}.items():
        SETS[name](source, home / "made", Asked(tune=3, each=2))
    return home


def test_parquet_is_read_as_json_lines_are(home, tmp_path):
    for split in ("train", "test"):
        rows = list(map(json.loads, (home / "maths" / "main" / f"{split}.jsonl").read_text("utf-8").splitlines()))
        Dataset.from_list(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    main(["data", "gsm8k", "--from", str(tmp_path), "--to", str(tmp_path), "--tune", "3"])
    for split in ("train", "tune", "report"):
        made = (tmp_path / "gsm8k" / f"{split}.jsonl").read_bytes()
        assert made == (home / "made" / "gsm8k" / f"{split}.jsonl").read_bytes()


def rows_of(home: Path, name: str, split: str) -> list[dict]:
    return list(map(json.loads, (home / "made" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("name", AUDITS)
def test_the_size_is_the_anchors(name):
    config, (rank, modules) = CONFIGS[name], ANCHORS[name.removesuffix("-4bit")]
    hidden, layers, heads, kv_heads, intermediate, tied = REAL[config.model_settings.name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=intermediate, vocab_size=128_256, tie_word_embeddings=tied,
        ))  # fmt: skip
    shapes = layer_shapes(model, rank, config.adapter.target_modules)
    assert config.budget.params == sum(shape.rank * shape.params_per_rank for shape in shapes)
    shape = MODELS[config.model_settings.name]
    assert config.budget.params == shape.lora_params(modules, rank) and set(modules_of(config)) == set(modules)
    assert shape.params == model.num_parameters() and config.adapter.rank == 2 * rank


@pytest.mark.parametrize("name", [name for name in AUDITS if name.endswith("-4bit")])
def test_the_same_in_four_bits_is_otherwise_the_same(name):
    plain = CONFIGS[name.removesuffix("-4bit")]
    assert CONFIGS[name] == plain.replaced({"name": name, "model.load_in_4bit": True})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_OF_EACH else pytest.mark.long) for name in CONFIGS]
)
def test_every_configuration_runs_dry(name, home):
    config = CONFIGS[name]
    data = home / "made" / Path(config.task.train).parent.name
    changes = {
        "model.name": home / "model", "budget": "{fraction: 0.5}", "training.epochs": "null", "training.steps": 40,
        **{f"task.{split}": data / f"{split}.jsonl" for split in ("train", "tune", "report")},
    }
    command = "audit" if name in AUDITS else "sweep"
    given = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, [command, str(FOLDER / f"{name}.yaml"), "--dry-run", "--json", *given])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    if command == "audit":
        arms = {arm["name"] for arm in told["arms"] if not arm["skipped"]}
        assert {"auto", "uniform", "twin", "shuffled", "post"} <= arms and "40 steps" in told["cost"]
    else:
        assert told["plan"]["metric"] == config.task.metric.partition(":")[2]


def test_no_question_is_in_two_splits(home):
    for name, rows in {"gsm8k": (9, 3, 4), "metamath": (9, 3, 4), "commonsense-15k": (9, 3, 16)}.items():
        splits = {split: rows_of(home, name, split) for split in ("train", "tune", "report")}
        assert tuple(map(len, splits.values())) == rows, name
        prompts = [{row["prompt"] for row in split} for split in splits.values()]
        assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    asked = PROMPT.replace("{question}", question(20))
    assert asked not in {row["prompt"] for row in rows_of(home, "gsm8k", "train")}
    # all that was made from a question that is tuned by is left out of MetaMathQA
    tuned = {row["prompt"] for row in rows_of(home, "metamath", "tune")}
    held = {i for i in range(12) if PROMPT.replace("{question}", question(i)) in tuned}
    assert {int(row["prompt"].split()[1]) for row in rows_of(home, "metamath", "train")} == set(range(12)) - held


def test_data_are_converted_alike_each_time(home, tmp_path):
    again = SETS["gsm8k"](home / "maths", tmp_path, Asked(tune=3))
    for split in ("train", "tune", "report"):
        made = (tmp_path / "gsm8k" / f"{split}.jsonl").read_bytes()
        assert made == (home / "made" / "gsm8k" / f"{split}.jsonl").read_bytes()
    assert rows_of(home, "gsm8k", "report")[1]["completion"] == " She has 21+21=42.\n#### 42"
    assert "9 train, 3 tune, 4 report (4 left out of train" in str(again[0])


@pytest.mark.parametrize("name, file, rows, says", [
    ("gsm8k", "train.jsonl", [{"problem": "1+1?", "solved": "2"}], "'question', 'answer', and this row has 'problem'"),
    ("gsm8k", "train.jsonl", [{"question": "1+1?", "answer": "two"}], "row 1: the answer ends with no number"),
    ("gsm8k", "other.jsonl", [solved(1)], "one train*.jsonl or train*.parquet below the folder"),
    ("metamath", "MetaMathQA-395K.json", [{"query": "1+1?", "response": "2"}], "'original_question', 'response'"),
    ("commonsense", "boolq/test.json", [{"question": "?", "answer": True}], "'instruction', 'output'"),
    ("commonsense", "boolq/test.json", [{**chosen(1, 0), "output": "yes"}], "row 1: the reference holds none"),
])  # fmt: skip
def test_other_columns_are_refused_in_one_sentence(name, file, rows, says, tmp_path):
    write(tmp_path / file, rows, array=file.endswith(".json"))
    with pytest.raises(DataError) as refused:
        SETS[name](tmp_path, tmp_path / "made", Asked())
    assert says in str(refused.value) and "\n" not in str(refused.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("answer, reference, right", [
    ("2 and 3 make 5.\n#### 5", "#### 5", True), ("#### 6", "#### 5", False), ("5", "#### 5", False),
    ("The answer is: 5", "#### 5", True), ("so the answer is 5.", "#### 5", True), ("", "#### 5", False),
    ("The final answer is: $5", "#### 5", True), ("####", "#### 5", False), ("#### .", "#### 5", False),
    ("#### -5", "#### -5", True), ("#### \N{MINUS SIGN}5", "#### -5", True), ("#### 5", "#### -5", False),
    ("#### 5.0", "#### 5", True), ("#### 5.25", "#### 5.25", True), (".5 it is: #### .5", "#### 0.5", True),
    ("#### 5.2", "#### 5.25", False), ("#### 1,234", "#### 1234", True), ("#### 12,34", "#### 1234", False),
    ("#### 1,234,567.5", "#### 1234567.5", True), ("The answer is: 3/4", "#### 0.75", True),
    ("#### 50%", "#### 50", True), ("The answer is: 4\nQuestion: ... The answer is: 7", "#### 7", True),
    ("#### 5\n\nNext", "#### 5", True), ("#### five", "#### 5", False), ("#### 3/0", "#### 3", False),
])  # fmt: skip
def test_numbers_are_matched_exactly(answer, reference, right):
    assert number_match([answer], [reference]) == [float(right)]


def test_choices_are_matched_by_the_first_word_of_the_kind():
    asked = "the correct answer is {}".format
    pairs = [("answer2", "answer2", 1), ("answer2", "answer1", 0), ("true", "true", 1), ("True", "true", 0),
             ("false or true", "true", 0), ("ending3", "ending3", 1), ("solution1 answer1", "answer1", 1),
             ("nothing", "option1", 0), ("answer6", "answer1", 0)]  # fmt: skip
    found = choice_match([asked(said) for said, _, _ in pairs], [asked(word) for _, word, _ in pairs])
    assert found == [float(right) for _, _, right in pairs]


@pytest.mark.parametrize("score", [number_match, choice_match])
def test_a_reference_without_an_answer_is_no_wrong_answer(score):
    with pytest.raises(ValueError, match="the reference h"):
        score(["#### 5"], ["no idea"])


def test_the_readme_has_the_table_of_sizes():
    assert table(CONFIGS.values()) in (FOLDER / "README.md").read_text(encoding="utf-8")
