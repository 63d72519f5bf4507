"""Downloaded sets as the JSONL files that the configurations read, with the columns prompt and completion.

    gsm8k        question, answer ("... #### 18"): a train and a test file, .jsonl or .parquet
    metamath     MetaMathQA-395K.json (type, query, original_question, response), and gsm8k's two files
    commonsense  LLM-Adapters: commonsense_15k.json, commonsense_170k.json, and test.json of eight sets (instruction,
                 input, output, answer)

The files are train.jsonl, tune.jsonl and report.jsonl. report is the official test. tune is a part of the official
train set, by question; a question that is in tune or in the official test is left out of train, and of MetaMathQA
everything that was made from it. Which questions are in tune is decided by the SHA-256 of their text, so the same
files give the same splits, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankalloc.errors import DataError
from rankalloc.files import write_text

from .metrics import choice_in, number_in

PROMPT = "Question: {question}\nAnswer:"
LONGEST = 1300
"""Characters of a query and its response; PEFT's benchmark leaves longer ones out, as they exceed its 768 tokens."""
TESTS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")


@dataclass(frozen=True)
class Asked:
    """How a set is converted.

    Attributes:
        tune: questions that are held out of train.
        each: questions kept of each commonsense test, 0 for all.
        template: the prompt of a mathematical question, with {question}.
    """

    tune: int = 500
    each: int = 500
    template: str = PROMPT


@dataclass(frozen=True)
class Example:
    """What is written of a row, and the question it goes with, blanks and case apart."""

    prompt: str
    completion: str
    question: str


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, the rows of each split, and how many rows of train were left out."""

    folder: Path
    rows: dict[str, int]
    left_out: int

    def __str__(self) -> str:
        amounts = ", ".join(f"{amount:,} {split}" for split, amount in self.rows.items())
        why = "left out of train: their questions are in tune or in the test"
        return f"{self.folder}: {amounts} ({self.left_out:,} {why})"


def gsm8k(source: Path, to: Path, asked: Asked) -> list[Converted]:
    """GSM8K, its calculator's marks (<<48/2=24>>) removed."""
    train, test = _gsm8k(source, asked.template)
    return [_written(to / "gsm8k", train, _held(train, test, asked.tune), test)]


def metamath(source: Path, to: Path, asked: Asked) -> list[Converted]:
    """MetaMathQA to train, questions of GSM8K's train set to tune, GSM8K's test to report."""
    found = sorted(source.rglob("MetaMathQA-395K.json")) or sorted(source.rglob("MetaMathQA*.json"))
    if not found:
        raise DataError(f"{source} holds no MetaMathQA-395K.json")
    made = [
        _mathematical(asked.template, row["query"], row["response"], row["original_question"])
        for row in _rows(found[0], ("query", "original_question", "response"))
        if len(row["query"]) + 1 + len(row["response"]) <= LONGEST
    ]
    train, test = _gsm8k(source, asked.template)
    return [_written(to / "metamath", made, _held(train, test, asked.tune), test)]


def commonsense(source: Path, to: Path, asked: Asked) -> list[Converted]:
    """The 15k and the 170k set, those that are there, each with the same part of the eight tests: with as many
    questions of each, the mean over questions is the mean over sets."""
    tests = [_instructions(_test_of(source, name)) for name in TESTS]
    every = [row for test in tests for row in test]
    report = [row for test in tests for row in (_first(test, asked.each) if asked.each else test)]
    done = []
    for size in ("15k", "170k"):
        for path in sorted(source.rglob(f"commonsense_{size}.json"))[:1]:
            train = _instructions(path)
            done.append(_written(to / f"commonsense-{size}", train, _held(train, every, asked.tune), report, every))
    if not done:
        raise DataError(f"{source} holds neither commonsense_15k.json nor commonsense_170k.json")
    return done


SETS: dict[str, Callable[[Path, Path, Asked], list[Converted]]] = {
    "gsm8k": gsm8k, "commonsense": commonsense, "metamath": metamath,
}  # fmt: skip


def _written(
    folder: Path, train: list[Example], tune: list[Example], report: list[Example], test: Iterable[Example] = ()
) -> Converted:
    """Write the three files. ``test``: more questions that train must not have, beside those of tune and report."""
    known = {row.question for rows in (tune, report, test) for row in rows}
    kept = [row for row in train if row.question not in known]
    splits = {"train": kept, "tune": tune, "report": report}
    if not all(splits.values()):
        empty = " and ".join(split for split, rows in splits.items() if not rows)
        raise DataError(f"nothing is left for {empty} in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in rows]
        write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    return Converted(folder, {split: len(rows) for split, rows in splits.items()}, len(train) - len(kept))


def _held(train: list[Example], test: list[Example], amount: int) -> list[Example]:
    """The questions of train that are held out to tune by, one row of each; none of them is in the test."""
    known = {row.question for row in test}
    return _first([row for row in train if row.question not in known], amount)


def _first(rows: list[Example], amount: int) -> list[Example]:
    """The first ``amount`` questions by their hashes, one row of each, in the order of ``rows``."""
    one: dict[str, Example] = {}
    for row in rows:
        one.setdefault(row.question, row)
    chosen = set(sorted(one, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())[:amount])
    return [row for question, row in one.items() if question in chosen]


def _gsm8k(source: Path, template: str) -> tuple[list[Example], list[Example]]:
    """The train and the test set."""
    train = _questions(_split_file(source, "train"), template)
    return train, _questions(_split_file(source, "test"), template)


def _split_file(source: Path, split: str) -> Path:
    found = [
        path for path in sorted(source.rglob(f"{split}*"))
        if path.suffix in (".jsonl", ".parquet") and "socratic" not in str(path.relative_to(source))
    ]  # fmt: skip
    if len(found) != 1:
        has = ", ".join(str(path.relative_to(source)) for path in found) or "none"
        raise DataError(f"GSM8K is one {split}*.jsonl or {split}*.parquet below the folder, and {source} has {has}")
    return found[0]


def _questions(path: Path, template: str) -> list[Example]:
    made = []
    for number, row in enumerate(_rows(path, ("question", "answer")), start=1):
        if number_in(row["answer"]) is None:
            raise DataError(f"{path}, row {number}: the answer ends with no number after ####: {row['answer'][-60:]!r}")
        answer = re.sub(r"<<[^<>]*>>", "", row["answer"])
        made.append(_mathematical(template, row["question"], answer, row["question"]))
    return made


def _mathematical(template: str, question: str, answer: str, about: str) -> Example:
    return Example(template.replace("{question}", question), f" {answer}", _key(about))


def _test_of(source: Path, name: str) -> Path:
    places = (source / "dataset" / name / "test.json", source / name / "test.json")
    for path in places:
        if path.is_file():
            return path
    raise DataError(f"no file at {places[0]}; give LLM-Adapters' folder, which holds dataset/ and ft-training_set/")


def _instructions(path: Path) -> list[Example]:
    made = []
    for number, row in enumerate(_rows(path, ("instruction", "output")), start=1):
        try:
            choice_in(row["output"])
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from None
        asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        made.append(Example(f"{asked}\n\n", row["output"].strip(), _key(asked)))
    return made


def _rows(path: Path, columns: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a JSON array, of JSON Lines or of Parquet, that hold text in all ``columns``.

    Raises:
        DataError: the file cannot be read, or its rows have other columns.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8")
            lines = [text] if path.suffix == ".json" else [line for line in text.split("\n") if line.strip()]
            rows = [json.loads(line) for line in lines]
            rows = rows[0] if path.suffix == ".json" else rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} should hold a list of rows, and holds none")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            has = ", ".join(map(repr, row)) if isinstance(row, dict) else repr(row)[:60]
            wanted = ", ".join(map(repr, columns))
            raise DataError(f"{path}, row {number}: the set has text in the columns {wanted}, and this row has {has}")
    return rows


def _key(text: str) -> str:
    return " ".join(text.casefold().split())
