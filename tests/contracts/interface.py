"""What users of rankalloc hold on to, as plain data: names, signatures, commands, configuration keys, file formats.

``python -m tests.contracts.interface`` prints it; ``interface.json`` is that of version 0.1, written before the first
module was moved.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import click
import typer

import rankalloc as ra
from rankalloc.cli import app


def interface() -> dict[str, Any]:
    """{"names", "commands", "config", "trace", "sweep", "registries"}, ready for JSON."""
    from importlib import import_module

    config = _find(import_module, ("rankalloc.experiments.config", "rankalloc.config"), "RunConfig")
    return {
        "names": {name: _described(getattr(ra, name)) for name in sorted(ra.__all__) if name != "__version__"},
        "commands": _commands(typer.main.get_command(app), "rankalloc"),
        "config": _keys(config.model_json_schema()),
        "trace": _keys(ra.RankTrace.model_json_schema()),
        "sweep": _keys(ra.SweepRecord.model_json_schema()),
        "methods": {name: sorted(method.options) for name, method in ra.METHODS.items()},
        "scores": sorted(ra.SCORES),
        "allocators": sorted(ra.ALLOCATORS),
    }


def _find(load: Any, modules: tuple[str, ...], name: str) -> Any:
    for module in modules:
        try:
            return getattr(load(module), name)
        except ModuleNotFoundError:
            continue
    raise LookupError(f"{name} is in none of {modules}")


def _described(value: Any) -> Any:
    """A function's parameters; a class's, with its public methods' and attributes; a registry's keys."""
    if isinstance(value, dict):
        return sorted(value)
    if not inspect.isclass(value):
        return _parameters(value)
    members = {}
    for name, member in inspect.getmembers(value):
        if name.startswith("_") or name not in _own(value):
            continue
        members[name] = _parameters(member) if callable(member) else "attribute"
    if dataclasses.is_dataclass(value):
        members |= {field.name: "attribute" for field in dataclasses.fields(value) if not field.name.startswith("_")}
    return {"parameters": _parameters(value), "members": members}


def _own(value: type) -> set[str]:
    return {name for cls in value.__mro__ if cls.__module__.startswith("rankalloc") for name in vars(cls)}


def _parameters(value: Any) -> list[str]:
    """ "name", "name=default" or "*name", as a call may write them."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return []
    shown, keyword_only = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        keyword_only = keyword_only or p.kind is p.VAR_POSITIONAL
        default = "" if p.default is p.empty else f"={p.default!r}"
        shown.append(f"{stars}{p.name}{default if ' at 0x' not in default else '=...'}")
    return shown


def _commands(command: click.Command, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    subcommands = getattr(command, "commands", {})
    for name, child in sorted(subcommands.items()):
        found |= _commands(child, f"{path} {name}")
    if not subcommands:
        found[path] = {
            p.name: [*p.opts, *p.secondary_opts, repr(p.default), "required" if p.required else "optional"]
            for p in command.params if p.name != "help"
        }
    return found


def _keys(schema: dict[str, Any]) -> list[str]:
    """Dotted names of every key, with what a missing one means."""
    sections = {"": schema, **schema.get("$defs", {})}
    return sorted(
        f"{section or 'top'}.{key}={json.dumps(about.get('default', '...'), sort_keys=True)}"
        for section, body in sections.items() for key, about in body.get("properties", {}).items()
    )


if __name__ == "__main__":
    print(json.dumps(interface(), indent=1, sort_keys=True, ensure_ascii=False))
