"""Markdown tables, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a cell is escaped."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def interval(low: float, high: float) -> str:
    """The two ends of an interval of differences, with their signs."""
    return f"{low:+.4f} to {high:+.4f}"


def p_text(p_value: float) -> str:
    """A p-value in three digits."""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
