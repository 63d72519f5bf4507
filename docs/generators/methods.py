"""The method reference: the registries of methods and of what they are made from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from rankalloc.methods import METHODS, Method, methods_table
from rankalloc.methods.allocators import ALLOCATORS
from rankalloc.methods.planners import PLANNERS
from rankalloc.methods.rules import RULES
from rankalloc.methods.scores import SCORES

from .api import public_paths

PARTS: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "score": ("Scores", SCORES, "What each singular triplet is worth, from what training shows of it."),
    "allocator": ("Allocators", ALLOCATORS, "From scores to the triplets that stay, within the budget."),
    "rule": ("Rules", RULES, "What happens around each step while ranks move."),
    "planner": ("Planners", PLANNERS, "What chooses ranks before training."),
}
"""{field of Method: (heading, registry, what its entries do)}."""
PUBLIC = {path: name for name, path in public_paths().items()}
"""{where it is defined: public name}; the API reference describes these."""

INTRODUCTION = """# Methods

A method is a name for one choice of score, allocator, rule or planner. `rankalloc ls methods` prints this list in the
terminal. Pass the name as `method=` to `ra.RankCallback`, `ra.RankController` or `ra.plan_ranks`, or set `method:` in a
configuration. `auto` is the default: two studies say [what it was chosen by](../findings/default.md), what
[it finds](../findings/planted.md), and what it does not do.

Every method but `uniform` takes `placement=`. The values `"uniform"`, `"random"`, `"shuffled"` and `"grouped"` (one
rank for each module type) keep the method's parametrisation, schedule and peak rank, and replace only its placement.
They separate what the placement adds from what the parametrisation adds.
"""


def page() -> str:
    """The page: the table of all methods, one section for each, and one for each part they are made from."""
    lines = [INTRODUCTION, methods_table(), ""]
    for when, title in (("during", "Methods that choose while they train"), ("before", "Methods that choose first")):
        lines += [f"## {title}", ""]
        for method in METHODS.values():
            if method.when == when:
                lines += _method(method)
    for kind, (title, registry, what) in PARTS.items():
        lines += [f"## {title} {{ #{title.lower()} }}", "", what, ""]
        for name, entry in registry.items():
            users = [m.name for m in METHODS.values() if getattr(m, kind) == name]
            lines += _part(kind, name, entry, users)
    return "\n".join(lines) + "\n"


def _method(method: Method) -> Iterable[str]:
    named = {kind: getattr(method, kind) for kind in PARTS}
    parts = [f"{kind} [`{name}`](#{kind}-{name})" for kind, name in named.items() if name]
    basis = "canonical basis" if method.canonical else "the basis that training leaves"
    yield from (f"### {method.name} {{ #{method.name} }}", "", f"{_sentence(method.summary)}", "")
    yield from (f"- **Made from:** {', '.join(parts)}; init `{method.init}`, {basis}.",)
    yield from (f"- **Cost:** {method.cost}.", f"- **Weakness:** {method.weakness}.", f"- **Source:** {method.source}.")
    if method.options:
        yield "- **Options:**"
        yield from (f"    - `{name}`: {meaning}." for name, meaning in method.options.items())
    yield ""


def _part(kind: str, name: str, entry: Any, users: list[str]) -> Iterable[str]:
    used = ", ".join(f"[`{user}`](#{user})" for user in users) or "no method by default; `placement=` reaches it"
    yield from (f"### {name} {{ #{kind}-{name} }}", "", f"Used by {used}.", "")
    yield from (inspect.getdoc(inspect.getmodule(entry)) or "", "")
    path = f"{entry.__module__}.{entry.__qualname__}"
    if path in PUBLIC:
        yield from (f"See [`{PUBLIC[path]}`][{path}].", "")
        return
    yield from (f"::: {path}", "    options:", "      heading_level: 4", "      members: false")
    yield from ("      show_root_toc_entry: false", "")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."
