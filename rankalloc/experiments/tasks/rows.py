"""The user's data files as rows: CSV, TSV and JSONL with named columns, plain text as paragraphs.

Every problem is one DataError that names the file, the line and the value.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PLAIN = ".txt"

# The csv module's own limit of 128 KiB is less than a long document.
_LONGEST_CELL = 2**27


@dataclass
class Row:
    """One example: its line in the file (the last one, if it spans several) and its values."""

    line: int
    values: dict[str, Any]


def read_rows(path: str | Path, columns: Iterable[str], plain_column: str | None = None) -> list[Row]:
    """All rows of a file, each with the named columns.

    Args:
        plain_column: the column for the paragraphs of a .txt file (the parts between blank lines; every line, if
            there are no blank ones); None when plain text does not fit the task.

    Raises:
        DataError: the file is missing, unreadable, of an unknown kind, empty or malformed, or lacks
            a column.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    known = [*DELIMITERS, *JSON_LINES, *([PLAIN] if plain_column else [])]
    if suffix not in known:
        raise DataError(f"data file {path} is of an unknown type; this kind of task reads {', '.join(known)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no data file at {path}") from None
    except OSError as error:
        raise DataError(f"could not read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the data file {path} is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise DataError(f"could not read the data file {str(path)!r}: {error}") from None
    if suffix == PLAIN:
        rows = list(_paragraphs(text, plain_column or ""))
    elif suffix in JSON_LINES:
        rows = list(_json_lines(path, text))
    else:
        rows = list(_cells(path, text, DELIMITERS[suffix]))
    if not rows:
        raise DataError(f"the data file {path} is empty; it needs a row for each example")
    for row in rows:
        for column in columns:
            if column not in row.values:
                names = list(row.values)
                raise DataError(
                    f"{path}, line {row.line}: no column {column!r}{did_you_mean(column, names)}; "
                    f"columns: {', '.join(map(repr, names))}"
                )
    return rows


def split_rows(
    rows: list[Row], shares: dict[str, float], key: Callable[[Row], str], labels: Callable[[Row], set[str]]
) -> dict[str, list[Row]]:
    """``rows`` as "train" and the splits named in ``shares`` (share of the distinct texts, at least one).

    Texts are assigned in the order of their SHA-256: the same file gives the same splits, equal texts are never in
    two splits, and rows keep their order. A text with a label that training would not see stays in training. A
    split that could not be filled is empty.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    order = sorted(groups, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    held: dict[str, list[str]] = {}
    start = 0
    for split, share in shares.items():
        size = max(1, round(share * len(order)))
        held[split] = order[start : start + size]
        start += size
    trained = order[start:]
    seen = {label for text in trained for i in groups[text] for label in labels(rows[i])}
    for split, texts in held.items():
        kept: list[str] = []
        for text in texts:
            own = {label for i in groups[text] for label in labels(rows[i])}
            (kept if own <= seen else trained).append(text)
            seen |= own
        held[split] = kept
    return {
        split: [rows[i] for i in sorted(i for text in texts for i in groups[text])]
        for split, texts in {"train": trained, **held}.items()
    }


def _paragraphs(text: str, column: str) -> Iterator[Row]:
    lines = text.splitlines()
    blank = any(not line.strip() for line in text.strip().splitlines())
    gathered: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            gathered.append(line.rstrip())
        if gathered and (not blank or not line.strip()):
            yield Row(number - (not line.strip()), {column: "\n".join(gathered)})
            gathered = []


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): U+2028 and the like may occur inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deep")
            raise DataError(f"{path}, line {number}: invalid JSON ({why})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: should be an object, and is a {type(values).__name__}")
        yield Row(number, values)


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names):
                    raise DataError(f"{path}, line {reader.line_num}: columns of the same name: {', '.join(names)}")
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} values for {len(names)} columns ({', '.join(names)})"
                )
            yield Row(reader.line_num, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: invalid {delimiter!r}-separated text ({error})") from None
    finally:
        csv.field_size_limit(limit)
