"""The user's data, read by the ``datasets`` library: files, folders, sets that were saved, and sets on the hub.

What it reads is cached by it, as Arrow, in its own folder. Every problem is one DataError that names the file and,
where it is known, the line.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from ...errors import DataError, did_you_mean
from ..file_task import FileTask
from ..task_names import MEDIA_KINDS
from .faults import one_sentence, quiet_datasets
from .text_files import DELIMITERS, binary_kind, check_columns, json_rows, paragraphs, read_start, read_text

JSON = (".jsonl", ".ndjson", ".json")
PLAIN = ".txt"
_BINARY = {".parquet": ("parquet", "Parquet"), ".arrow": ("arrow", "Arrow")}
_KINDS = {**dict.fromkeys(JSON, "json"), **dict.fromkeys(DELIMITERS, "csv"), **{name: name for name in _BINARY}}
_SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_SAVED = ("state.json", "dataset_dict.json")
_OTHER_NAMES = {"tune": ("validation", "valid", "dev", "tune"), "report": ("test", "report")}
_SPLIT_OF_SET = re.compile(r"(.+?)\[([^\[\]]+(?:\[[^\[\]]*\])?)\]")


@dataclass
class Table:
    """A data set, and where its rows are for people.

    Attributes:
        rows: a ``datasets.Dataset``, or an ``IterableDataset`` where it is streamed.
        source: the file, folder or set, for people.
        columns: the names of its columns.
        lines: each row's line in the file; None where rows are counted.
        notes: remarks on how it was read.
        decimal_comma: whether "1,5" is one and a half, as the columns are parted by another sign.
        first: how many rows of the set come before its own.
    """

    rows: Any
    source: str
    columns: list[str]
    lines: Sequence[int] | None = None
    notes: list[str] = field(default_factory=list)
    decimal_comma: bool = False
    first: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Its rows. What a stream finds wrong while it is read is one DataError, too."""
        with one_sentence(self.source):
            try:
                yield from self.rows
            except (OSError, ValueError, TypeError, KeyError, RuntimeError, datasets.exceptions.DatasetsError):
                path = Path(self.source)
                if path.suffix.lower() in JSON and path.is_file():
                    json_rows(path, read_text(path, None)[0])  # names the line
                raise

    def where(self, index: int) -> str:
        """The place of a row."""
        return f"{self.source}, {'row' if self.lines is None else 'line'} {self.number(index)}"

    def number(self, index: int) -> int:
        """A row's line, or its number from 1."""
        return self.first + index + 1 if self.lines is None else self.lines[self.first + index]


def read_tables(task: FileTask, needed: Sequence[str]) -> dict[str, Table]:
    """The tables of "train" and of those of "tune" and "report" that the task or its set has.

    Args:
        needed: columns that every table must have.

    Raises:
        DataError: a file is missing, unreadable, of an unknown kind, empty or malformed, or lacks a column; a set
            cannot be reached, or does not have the split.
    """
    found = _sets_of(task, task.train, needed)
    tables = {"train": _one(found, task.train, ("train",))}
    for split, names in _OTHER_NAMES.items():
        if (given := getattr(task, split)) is not None:
            tables[split] = _one(_sets_of(task, given, needed), given, (*names, "train"))
        elif (own := next((found[name] for name in names if name in found), None)) is not None:
            tables[split] = own
            tables["train"].notes.append(f"the {split} split is the set's own {own.source.rpartition('[')[2]}"[:-1])
    for table in tables.values():
        table.rows = _undecoded(table.rows)
        for column in needed:
            if column not in table.columns:
                first = f", line {table.number(0)}" if table.lines else ""
                raise DataError(
                    f"{table.source}{first}: no column {column!r}{did_you_mean(column, table.columns)}; "
                    f"columns: {', '.join(map(repr, table.columns))}"
                )
    return tables


def _one(found: dict[str, Table], source: str, names: Sequence[str]) -> Table:
    for name in names:
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(f"{source} has the splits {', '.join(found)}; say which, as in {source}[{next(iter(found))}]")


def _sets_of(task: FileTask, source: str, needed: Sequence[str]) -> dict[str, Table]:
    """The tables of a file (one, called "train"), a folder or a set, by the names of their splits."""
    split = None
    if not _exists(source) and (parts := _SPLIT_OF_SET.fullmatch(source)) is not None:
        source, split = parts.groups()
    path = Path(source)
    if _exists(source) and not path.is_dir():
        table = _file(task, path, needed)
        return {"train": table if split is None else _part_of(table, split)}
    # A path is absolute since the configuration was loaded; what is not is the name of a set on the hub.
    if path.is_absolute() and not _exists(source):
        raise DataError(f"no data file at {path}")
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        with one_sentence(source), quiet_datasets():
            loaded = datasets.load_from_disk(source)
            if task.streaming:
                loaded = {name: one.to_iterable_dataset() for name, one in loaded.items()} \
                    if isinstance(loaded, dict) else loaded.to_iterable_dataset()
    else:
        with one_sentence(source), quiet_datasets():
            loaded = _loaded(task, path if path.is_dir() else None, source)
    sets = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if split is not None:
        rows, first = _part(sets, source, split)
        return {split: replace(_table(rows, f"{source}[{split}]"), first=first)}
    return {name: _table(rows, source if len(sets) == 1 else f"{source}[{name}]") for name, rows in sets.items()}


def _loaded(task: FileTask, folder: Path | None, source: str) -> Any:
    if folder is None:
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, streaming=task.streaming)
    if task.kind in MEDIA_KINDS and not any(folder.rglob("*.parquet")) and not any(folder.rglob("*.arrow")):
        return _sounds(folder) if task.kind == "audio-classification" else datasets.load_dataset(
            "imagefolder", data_dir=str(folder)
        )  # fmt: skip
    kinds = {path.suffix.lower() for path in folder.rglob("*") if path.suffix.lower() in _KINDS}
    if len({_KINDS[kind] for kind in kinds}) > 1:
        raise DataError(
            f"the data folder {folder} mixes {' and '.join(sorted(kinds))} files, of which only some would be read; "
            "keep one kind in it, or give task.train a file"
        )
    options: dict[str, Any] = {}
    if any(folder.glob("*.csv")):  # a cell that says NA is no gap
        options = {"na_filter": False, "sep": task.delimiter or ",", "encoding": task.encoding}
    return datasets.load_dataset(str(folder), streaming=task.streaming, **options)


def _sounds(folder: Path) -> dict[str, datasets.Dataset]:
    """A folder of sounds as ``datasets`` reads one of images: the class is the folder that a file is in, below
    "train", "validation" and "test" where there are such. Its own reader needs a decoder even to look."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).parts
        if path.suffix.lower() in _SOUNDS and len(place) > 1:
            split = place[0] if len(place) > 2 and place[0] in ("train", "validation", "test") else "train"
            found.setdefault(split, []).append((str(path), place[-2]))
    if not found:
        raise DataError(f"the data folder {folder} holds no sounds ({', '.join(_SOUNDS)}) in folders, one a class")
    return {
        split: datasets.Dataset.from_dict({"audio": [path for path, _ in rows], "label": [name for _, name in rows]})
        for split, rows in found.items()
    }


def _part_of(table: Table, split: str) -> Table:
    """A part of a file, ``train[:100]`` or ``:100`` for short."""
    split = f"train[{split}]" if ":" in split and "[" not in split else split
    rows, first = _part({"train": table.rows}, table.source, split)
    return replace(table, rows=rows, first=first)


def _part(sets: dict[str, Any], source: str, split: str) -> tuple[Any, int]:
    """A split of loaded sets, as ``datasets`` writes it: ``test``, or ``train[:100]`` of a set that is not streamed;
    and how many rows of the split come before it."""
    name, bracket, _ = split.partition("[")
    if name not in sets:
        raise DataError(f"{source} has no split {name!r}{did_you_mean(name, sets)}; splits: {', '.join(sets)}")
    if not bracket:
        return sets[name], 0
    if not isinstance(sets[name], datasets.Dataset):
        raise DataError(f"{source} is streamed, and a part of a split ({split}) is not; give the whole split")
    try:
        part = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(sets[name])})[0]
    except (ValueError, AssertionError):
        raise DataError(f"{split!r} is no part of the split {name!r} of {source}; as in {name}[:100]") from None
    first, end = part.from_ or 0, len(sets[name]) if part.to is None else part.to
    if first >= end:
        raise DataError(f"{source} has no rows in {split!r}; its split {name!r} has {len(sets[name])}")
    return sets[name].select(range(first, end)), first


def _file(task: FileTask, path: Path, needed: Sequence[str]) -> Table:
    suffix = path.suffix.lower()
    known = [*DELIMITERS, *JSON, *_BINARY, *([PLAIN] if task.kind == "causal-lm" else [])]
    if suffix not in known or task.kind in MEDIA_KINDS and suffix not in _BINARY:
        known = list(_BINARY) if task.kind in MEDIA_KINDS else known
        also = ", and folders of images or sounds" if task.kind in MEDIA_KINDS else ""
        raise DataError(f"data file {path} is of an unknown type; this kind of task reads {', '.join(known)}{also}")
    if not read_start(path, 1):
        raise DataError(f"the data file {path} is empty; it needs a row for each example")
    if suffix in _BINARY:
        builder, name = _BINARY[suffix]
        if suffix == ".parquet" and binary_kind(path) != name:
            raise DataError(f"the data file {path} is no {name} file, or is damaged: it does not begin like one")
        with one_sentence(str(path)), quiet_datasets():
            return _table(_builder(task, builder, path), str(path))
    text, encoding = read_text(path, task.encoding)
    if suffix == PLAIN:
        found = list(paragraphs(text))
        rows = datasets.Dataset.from_dict({task.text or "text": [part for _, part in found]})
        return _table(rows.to_iterable_dataset() if task.streaming else rows, str(path), [line for line, _ in found])
    if suffix in JSON:
        return _json(task, path, text, encoding)
    columns = check_columns(path, text, needed, task.delimiter)
    strings = datasets.Features({name: datasets.Value("string") for name in columns.names})
    with one_sentence(str(path)), quiet_datasets():
        rows = _builder(
            task, "csv", path, sep=columns.delimiter, encoding=encoding, na_filter=False, features=strings, header=0,
            names=columns.names,
        ) if columns.lines else datasets.Dataset.from_dict({name: [] for name in columns.names})  # fmt: skip
    table = _table(rows, str(path), columns.lines)
    if columns.delimiter != DELIMITERS[path.suffix.lower()]:
        table.decimal_comma = columns.delimiter != ","
        if task.delimiter is None:
            table.notes.append(f"{path.name} was read with {columns.delimiter!r} between its columns")
    return table


def _json(task: FileTask, path: Path, text: str, encoding: str) -> Table:
    lines = [number for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = None
    if encoding == "utf-8" and not text.lstrip().startswith("["):
        # Whatever it fails of, the lines are looked at then.
        with contextlib.suppress(Exception), quiet_datasets():
            rows = _builder(task, "json", path)
    as_written = rows is not None and "timestamp[" not in str(rows.features)  # texts that look like dates become dates
    if not as_written or (isinstance(rows, datasets.Dataset) and len(rows) != len(lines)):
        values, numbered = json_rows(path, text)
        lines = numbered or []
        with one_sentence(str(path)):
            rows = datasets.Dataset.from_list(values, on_mixed_types="use_json")
        rows = rows.to_iterable_dataset() if task.streaming and values else rows
    return _table(rows, str(path), lines or None)


def _builder(task: FileTask, name: str, path: Path, **options: Any) -> Any:
    # datasets knows a cached file by its path and time; a copy that keeps the time would be taken for the old one.
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return datasets.load_dataset(
        name, name=content, data_files=str(path), split="train", streaming=task.streaming, **options
    )


def _table(rows: Any, source: str, lines: Sequence[int] | None = None) -> Table:
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        raise DataError(f"{source} holds a {type(rows).__name__}, which is no data set")
    columns = rows.column_names
    if isinstance(rows, datasets.Dataset):
        if not len(rows):
            what = "data file" if Path(source).is_file() else "data set"
            raise DataError(f"the {what} {source} is empty; it needs a row for each example")
    elif columns is None:
        first = next(iter(Table(rows, source, [])), None)
        if first is None:
            raise DataError(f"the data set {source} is empty; it needs a row for each example")
        columns = list(first)
    return Table(rows, source, list(columns), lines)


def _undecoded(rows: Any) -> Any:
    """Rows whose images and sounds are their files' content: to decode them is for whom it may concern."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):
        return False
