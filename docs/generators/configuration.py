"""The configuration reference: every key of RunConfig, with what it may hold and its default."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from rankalloc.experiments.config import RunConfig

INTRODUCTION = """# Configuration

A configuration is one YAML file. Every key has a default, so a file names only what differs; `--set a.b=c` changes one
value on the command line, and all mistakes are reported at once. The resolved configuration is saved as `config.yaml`
beside each run and reads back as itself.
"""

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "ge": "≥", "gt": ">",
          "le": "≤", "lt": "<"}


def page() -> str:
    """The page: a section for each section of the file, then the whole file with its defaults."""
    schema = RunConfig.model_json_schema()
    lines = [INTRODUCTION]
    for path, section in _sections(schema, schema["$defs"]):
        lines += [f"## {path or 'Top level'} {{ #{path.replace('.', '-') or 'top-level'} }}", ""]
        lines += [inspect.cleandoc(section.get("description", "")), ""]
        lines += ["| key | value | default |", "| --- | --- | --- |"]
        for key, value in section["properties"].items():
            shown = _values(value, path, key)
            lines.append(f"| `{key}` | {shown} | {_default(section, key, value, path)} |")
        lines.append("")
    lines += ["## All defaults", "", "```yaml", RunConfig().to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)


def _sections(section: dict[str, Any], definitions: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict]]:
    """(dotted path, schema) of the tree, parents first; a mapping that is one choice among others comes last."""
    yield path, section
    for key, value in section["properties"].items():
        for name in _references(value):
            yield from _sections(definitions[name], definitions, f"{path}.{key}".lstrip("."))


def _references(value: dict[str, Any]) -> list[str]:
    found = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
    inner = value.get("additionalProperties")
    for option in (*_options(value), *([inner] if isinstance(inner, dict) else [])):
        found += _references(option)
    return found


def _options(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [option for kind in ("anyOf", "oneOf", "allOf") for option in value.get(kind, [])]


def _values(value: dict[str, Any], path: str, key: str) -> str:
    options = value.get("anyOf") or value.get("oneOf") or value.get("allOf")
    if options:
        return " or ".join(dict.fromkeys(_values(option, path, key) for option in options))
    if "$ref" in value:
        anchor = f"{path}.{key}".lstrip(".").replace(".", "-")
        return f"[a mapping](#{anchor})"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if isinstance(value.get("additionalProperties"), dict):
        return f"keys, each with: {_values(value['additionalProperties'], path, key)}"
    if value.get("type") == "array":
        return f"a list of: {_values(value['items'], path, key)}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`",
             "null": "`null`", "object": "mapping"}
    bounds = [f"{sign} {value[bound]:,}" for bound, sign in BOUNDS.items() if bound in value]
    return " ".join([names.get(value.get("type", ""), "any value"), " and ".join(bounds)]).strip()


def _default(section: dict[str, Any], key: str, value: dict[str, Any], path: str) -> str:
    if key in section.get("required", ()):
        return "required"
    if _references(value) and not value.get("anyOf") and not value.get("oneOf"):
        return ""
    return f"`{json.dumps(value.get('default'), ensure_ascii=False)}`"
