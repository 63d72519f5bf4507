"""The methods a user names. Torch-free, so that ``rankalloc ls methods`` and the configuration can read
it without paying for torch. A new one is one line here or, from outside, ``METHODS["mine"] = Method(...)``."""

from __future__ import annotations

from ..errors import ConfigError, unknown
from .base import ANY_METHOD, PLACEMENTS, Method
from .before import BEFORE
from .during import DURING

METHODS: dict[str, Method] = {method.name: method for method in (*DURING, *BEFORE)}

__all__ = ["ANY_METHOD", "METHODS", "PLACEMENTS", "Method", "find_method", "methods_table"]


def methods_table() -> str:
    """All methods as a Markdown table: that of the method reference."""
    rows = [("method", "what it does", "cost", "source"), ("---",) * 4]
    rows += [(f"`{m.name}`", m.summary, m.cost, m.source) for m in METHODS.values()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def find_method(name: str) -> Method:
    """The method of this name; a ConfigError with the nearest name when there is none."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]
