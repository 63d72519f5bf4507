"""The API reference: every name of ``ra.__all__``, in a section for each package that it comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import rankalloc

SECTIONS = {
    "adapters": "Adapters in a model",
    "budget": "Budgets",
    "training": "Training",
    "methods": "Methods, and your own",
    "storage": "Adapters on disk",
    "posthoc": "Adapters that exist already",
    "experiments": "Tasks",
    "trace": "Records",
    "audit_record": "Records of audits",
    "report": "Reports",
    "errors": "Errors",
}
"""{package or module of the ground floor: heading}."""


DESCRIBED = {"READERS": "[Serve it](../serving.md) shows them"}
"""{registry that is no part of a method: where its entries are described}."""


def page_of(section: str) -> str:
    """Path of a section's page in the site's sources."""
    return "reference/own-methods.md" if section == "methods" else f"reference/{section}.md"


def names() -> dict[str, Any]:
    """{public name: object}, the version apart."""
    return {name: getattr(rankalloc, name) for name in rankalloc.__all__ if name != "__version__"}


def path_of(name: str, value: Any) -> str:
    """Where an object is defined, such as ``rankalloc.storage.loading.load``."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # a registry is a plain dict: its home is the module that lists it as public
    modules = [module for module in list(sys.modules) if module.startswith("rankalloc.")]
    homes = [module for module in modules if name in getattr(sys.modules[module], "__all__", ())]
    return f"{min(homes)}.{name}"


def pages() -> dict[str, str]:
    """{path: Markdown} of all sections; a package that no heading is given for is an error."""
    by_section: dict[str, list[tuple[str, Any]]] = {section: [] for section in SECTIONS}
    for name, value in names().items():
        by_section[path_of(name, value).split(".")[1]].append((name, value))
    return {page_of(section): "\n".join(_page(section, members)) for section, members in by_section.items() if members}


def public_paths() -> dict[str, str]:
    """{``rankalloc.name``: where it is defined}."""
    return {f"rankalloc.{name}": path_of(name, value) for name, value in names().items()}


def _page(section: str, members: list[tuple[str, Any]]) -> Iterator[str]:
    yield from (f"# {SECTIONS[section]}", "", "```python", "import rankalloc as ra", "```", "")
    for name, value in members:
        path = path_of(name, value)
        if isinstance(value, dict):
            anchor = "" if name == "METHODS" else f"#{name.lower()}"
            described = DESCRIBED.get(name, f"the [method reference](methods.md{anchor}) describes them")
            yield from (f"## ra.{name} {{ #{path} }}", "")
            yield from (f"A dictionary of {len(value)} entries by name; {described}.", "")
            continue
        yield from (f"::: {path}", "    options:", f"      heading: ra.{name}", f"      toc_label: ra.{name}", "")
        if value is rankalloc.RankallocError:
            for kind in (kind for kind in value.__subclasses__() if kind.__module__ == value.__module__):
                yield from (f"::: {kind.__module__}.{kind.__qualname__}", "")

