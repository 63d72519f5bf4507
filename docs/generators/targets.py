"""The tables of docs/targets.md: what ``rankalloc ls targets`` says of every architecture that the tests know.

``python -m docs.generators.targets`` writes the page again; what stands above its tables is written by hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rankalloc.cli.layers import Adaptable, adaptable
from rankalloc.cli.output import percent
from tests.support.architectures import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[1] / "targets.md"
MARK = "<!-- The tables below are made by: python -m docs.generators.targets -->\n"


def page() -> str:
    """The page as it should be: its own introduction, and a section for each family of models, in which those that
    are adapted alike share a table."""
    families: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for name, architecture in ARCHITECTURES.items():
        found = found_in(architecture)
        alike = families.setdefault(architecture.family, {}).setdefault("\n".join(body(found)), [])
        alike.append((name, found.architecture))
    lines = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK]
    for family, tables in families.items():
        lines += [f"## {family}", ""]
        for table, models in tables.items():
            names, classes = zip(*models, strict=True)
            lines += [f"### {', '.join(names)}", "", _listed(classes), "", table]
    return "\n".join(lines)


def found_in(architecture: Architecture) -> Adaptable:
    """What the command finds in the architecture's config.json."""
    with tempfile.TemporaryDirectory() as folder:
        architecture.config().save_pretrained(folder)
        return adaptable(folder)


def body(found: Adaptable) -> Iterator[str]:
    """The lines of a model's table, with what is said beside it."""
    yield from ("| | layers | | shape |", "| --- | ---: | --- | --- |", *_rows(found), "")
    for note in found.notes:
        yield from (f"{note[0].upper()}{note[1:]}.", "")
    if found.coverage is not None:
        yield from (f"Coverage: {percent(found.coverage)} of the linear weights.", "")


def _rows(found: Adaptable) -> Iterator[str]:
    shapes: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for group in found.groups:
        shapes.setdefault(("adapted", f"{group.d_in} → {group.d_out}"), []).append((group.suffix, group.layers))
    for name, parameters in found.heads.items():
        shapes.setdefault(("trained whole", f"{parameters:,} parameters"), []).append((name, 1))
    for left in found.frozen:
        shape = " × ".join(map(str, left.shape))
        shapes.setdefault((f"frozen: {left.why}", shape), []).append((left.suffix, left.weights))
    for (fate, shape), members in shapes.items():
        names, amounts = zip(*members, strict=True)
        yield f"| {fate} | {sum(amounts)} | {_listed(names)} | {shape} |"


def _listed(suffixes: Iterable[str]) -> str:
    return ", ".join(f"`{suffix}`" for suffix in dict.fromkeys(suffixes))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
