"""How good or bad a sentence is, as people rated it: a regression task in JSONL files.

    pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d runs
    python -m studies.default.valence runs/vaderSentiment-0.5.zip [--output runs/valence]

Each of some 13,000 tweets, sentences of product reviews and sentences of editorials has the mean of twenty people's
ratings from -4 to 4 (Hutto and Gilbert, "VADER", ICWSM 2014; MIT). Writes train.jsonl, tune.jsonl and report.jsonl with
the columns text and label, byte for byte the same each time; a sentence that comes twice is kept once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rankalloc.errors import DataError
from rankalloc.files import write_text

SETS = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
SHARES = {"tune": 0.1, "report": 0.2}
_DAMAGED = (
    OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, StopIteration, KeyError, ValueError,
)  # fmt: skip
"""What an archive raises that is cut short, altered, or another one."""


def ratings(source: Path) -> dict[str, float]:
    """{sentence: mean rating} from the package's archive; DataError when it is something else."""
    try:
        with zipfile.ZipFile(source) as package:
            inner = next(name for name in package.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            content = package.read(inner)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            return dict(row for name in SETS for row in _rows(archive, name))
    except _DAMAGED as error:
        raise DataError(
            f"{source} holds no rated sentences; run: pip download --no-deps --no-binary :all: vaderSentiment==0.5"
        ) from error


def _rows(archive: tarfile.TarFile, name: str) -> Iterator[tuple[str, float]]:
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
    assert file is not None  # a plain file in this archive
    for line in file.read().decode("latin-1").splitlines():
        _, rating, text = line.split("\t", 2)
        yield text.strip(), round(float(rating), 4)


def convert(source: Path, output: Path) -> dict[str, int]:
    """Write the three files; returns the number of sentences of each split. The order is that of the text's hash."""
    rated = ratings(source)
    order = sorted(rated, key=lambda text: hashlib.sha256(text.encode()).digest())
    ends = {split: round(share * len(order)) for split, share in SHARES.items()}
    tune, report = ends["tune"], ends["tune"] + ends["report"]
    parts = {"train": order[report:], "tune": order[:tune], "report": order[tune:report]}
    for split, texts in parts.items():
        lines = (json.dumps({"text": text, "label": rated[text]}) for text in texts)
        write_text(output / f"{split}.jsonl", "\n".join(lines) + "\n")
    return {split: len(texts) for split, texts in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="vaderSentiment-0.5.zip")
    parser.add_argument("--output", type=Path, default=Path("runs/valence"), help="folder (default runs/valence)")
    args = parser.parse_args()
    print(", ".join(f"{count} {name}" for name, count in convert(args.source, args.output).items()))


if __name__ == "__main__":
    main()
