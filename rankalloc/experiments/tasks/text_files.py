"""What a text file of the user's is before the ``datasets`` library reads it: its encoding, what parts its columns, the
line of each row, and which line is malformed. Plain text is read here, as paragraphs.

pandas, which ``datasets`` reads CSV with, drops values of rows that are too long, fills rows that are too short, takes
"NA" for nothing, and knows no lines: files are checked first, and mistakes are told by line.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHERS = (",", ";", "\t", "|")
_NOT_BLANK = re.compile(r"\S")

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_BINARY = (
    (b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), (b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip or Excel"),
    (b"SQLite format 3", "SQLite"), (b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"%PDF", "PDF"),
)  # fmt: skip

# The csv module's own limit of 128 KiB is less than a long document.
_LONGEST_CELL = 2**27


@dataclass(frozen=True)
class Columns:
    """The header of a file of separated values and, for each row, its line (the last one, if it spans several)."""

    names: list[str]
    delimiter: str
    lines: list[int]


def binary_kind(path: Path) -> str | None:
    """The name of the binary format that a file begins like; None for text."""
    start = read_start(path, 16)
    return next((name for mark, name in _BINARY if start.startswith(mark)), None)


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a file. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError:
        raise DataError(f"no data file at {path}") from None
    except OSError as error:
        raise DataError(f"could not read the data file {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"could not read the data file {str(path)!r}: {error}") from None


def read_text(path: Path, encoding: str | None) -> tuple[str, str]:
    """A file's text and its encoding: the one given, or what its first bytes name, or else UTF-8.

    Raises:
        DataError: it is unreadable, binary, or in another encoding; other 8-bit encodings cannot be told apart.
    """
    start = read_start(path, 16)
    if (kind := binary_kind(path)) is not None:
        raise DataError(f"the data file {path} is no text: it begins like a file of {kind}")
    found = encoding or next((name for mark, name in _MARKS if start.startswith(mark)), None) or _unmarked(start)
    try:
        text = path.read_bytes().decode(found)
    except LookupError:
        raise DataError(f"task.encoding {found!r} is unknown; known are utf-8, utf-16, cp1252 and latin-1") from None
    except UnicodeDecodeError as error:
        if encoding:
            raise DataError(f"the data file {path} is not {encoding} text (byte {error.start})") from None
        hint = "utf-16" if b"\0" in start else "cp1252 (Windows, Western Europe)"
        raise DataError(
            f"the data file {path} is not UTF-8 text (byte {error.start}); say what it is, as in task.encoding={hint}"
        ) from None
    if "\0" in text[:16]:
        raise DataError(f"the data file {path} holds zero bytes as {found}; say what it is (task.encoding=utf-16-le)")
    return text.replace("\r\n", "\n"), found


def _unmarked(start: bytes) -> str:
    """The encoding of a text that does not begin with its mark: UTF-16 where every second byte is zero."""
    if len(start) > 3 and b"\0" in start:
        for name, zero, other in (("utf-16-le", 1, 0), ("utf-16-be", 0, 1)):
            if not any(start[zero::2]) and all(start[other::2]):
                return name
    return "utf-8"


def check_columns(path: Path, text: str, wanted: Iterable[str], delimiter: str | None) -> Columns:
    """The columns of separated values, every row of which has a value for each.

    Args:
        wanted: the columns that are needed. Where the suffix's own delimiter does not give them, and exactly one other
            does, it is that one.
        delimiter: the user's own choice.

    Raises:
        DataError: the file is JSON, a row has too many or too few values, or two columns have one name.
    """
    if text.lstrip()[:1] in ("{", "[") and _is_json(text.lstrip().split("\n", 1)[0]):
        raise DataError(f"{path} holds JSON, not separated values; name it {path.stem}.jsonl")
    own = delimiter or DELIMITERS[path.suffix.lower()]
    if len(own) != 1:
        raise DataError(f"task.delimiter should be one character, got {own!r}")
    wanted = set(wanted)
    if delimiter is None and (not wanted <= set(_header(text, own)) or (not wanted and len(_header(text, own)) == 1)):
        others = [
            one for one in _OTHERS
            if one != own and wanted <= set(_header(text, one)) and len(_header(text, one)) > 1 - bool(wanted)
        ]
        own = others[0] if len(others) == 1 else own
    names: list[str] | None = None
    lines: list[int] = []
    wrong: list[tuple[int, int]] = []
    for line, cells in _records(path, text, own):
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise DataError(f"{path}, line {line}: columns of the same name: {', '.join(names)}")
        elif len(cells) != len(names):
            wrong.append((line, len(cells)))
        else:
            lines.append(line)
    if wrong:
        (line, found), columns = wrong[0], names or []
        quoted = f"; a value that holds {own!r} is written in quotes" if found > len(columns) else ""
        more = also([line for line, _ in wrong[1:]], "line")
        raise DataError(
            f"{path}, line {line}: {found} values for {len(columns)} columns ({', '.join(columns)}){quoted}{more}"
        )
    return Columns(names or [], own, lines)


def also(others: list[int], what: str) -> str:
    """That other lines or rows are wrong, too, and the first of them; empty where there are none."""
    if not others:
        return ""
    listed = ", ".join(map(str, others[:5])) + (" ..." if len(others) > 5 else "")
    return f"; and {len(others)} more {'is' if len(others) == 1 else 'are'} wrong ({what} {listed})"


def json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not blank, and its object. Raises DataError with the line of a mistake."""
    # Not splitlines(): U+2028 and the like may occur inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deep" if isinstance(error, RecursionError) else error)
            raise DataError(f"{path}, line {number}: invalid JSON ({why})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: should be an object, and is a {type(values).__name__}")
        yield number, values


def json_rows(path: Path, text: str) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The rows of a JSON file, a list of objects or an object a line, and their lines (None in a list).

    Raises:
        DataError: it is neither, or malformed.
    """
    whole: Any = None
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if path.suffix.lower() == ".json":
                why, line = getattr(error, "msg", "nested too deep"), getattr(error, "lineno", 1)
                raise DataError(f"{path}, line {line}: invalid JSON ({why})") from None
        if isinstance(whole, list) and all(isinstance(values, dict) for values in whole):
            return whole, None
    if not _is_json(text.lstrip().split("\n", 1)[0]) and (spread := _spread_objects(text)) is not None:
        return spread
    found = list(json_lines(path, text))
    return [values for _, values in found], [line for line, _ in found]


def _spread_objects(text: str) -> tuple[list[dict[str, Any]], list[int]] | None:
    """Objects of several lines each, one after the other, and the lines they begin in; None for any other text."""
    decoder, rows, lines, at, line = json.JSONDecoder(), list[dict[str, Any]](), list[int](), 0, 1
    while True:
        start = _NOT_BLANK.search(text, at)
        if start is None:
            return rows, lines
        line += text.count("\n", at, start.start())
        try:
            values, at = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        rows.append(values)
        lines.append(line)
        line += text.count("\n", start.start(), at)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The parts between blank lines, or every line where there are no blank ones, and the last line of each."""
    lines = text.splitlines()
    blank = any(not line.strip() for line in text.strip().splitlines())
    gathered: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            gathered.append(line.rstrip())
        if gathered and (not blank or not line.strip()):
            yield number - (not line.strip()), "\n".join(gathered)
            gathered = []


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next((cells for _, cells in _records(Path(), text, delimiter)), [])
    except DataError:
        return []


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record that is not blank; the header's cells are stripped."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in itertools.count():
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells] if not record else cells
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: invalid {delimiter!r}-separated text ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
