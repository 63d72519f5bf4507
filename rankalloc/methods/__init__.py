"""How ranks are chosen: the methods that a user names, and the four kinds of parts they are made of.

    score → budget → allocate → apply

- :mod:`.scores` rate each triplet while a model trains; :mod:`.planners` rate layers before it does.
- :mod:`.allocators` turn ratings and a budget into the triplets to keep. They are pure functions and know no model.
- :mod:`.rules` say how ranks move around the optimizer's steps: most only shrink, some grow or move.
- A :class:`Method` names one of each. :mod:`.during` lists those that choose while training, :mod:`.before` those that
  choose before; :mod:`.requirements` says which parametrisations a method can train.

Each part is one file and one line in the registry of its folder. A method is one line here or, from outside,
``METHODS["mine"] = Method(...)``. This module does not import torch, so that ``rankalloc ls methods`` and the
configuration can read it quickly.
"""

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
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(unknown("method", str(name), METHODS))
    return METHODS[name]
