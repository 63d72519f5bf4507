"""The command-line reference: every command of the typer application, in the words of its own help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from rankalloc.cli.app import app

INTRODUCTION = """# Command line

Every command takes `--help`. Exit codes: 0 ok, 1 failed, 2 usage, 3 nothing feasible or completed, 130 interrupted.
`rankalloc --debug COMMAND ...` shows the traceback of an error.
"""


def root() -> Any:
    """The application as the command object that parses a command line."""
    return typer.main.get_command(app)


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words on the command line, command) of every command that does something, groups opened."""
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from commands(child, (*path, name))
        else:
            yield (*path, name), child


def page() -> str:
    """The page: a section for each command with its usage, arguments, options and examples."""
    lines = [INTRODUCTION]
    for path, command in commands(root()):
        context = command.context_class(command, info_name=" ".join(("rankalloc", *path)))
        usage = " ".join([context.info_name, *command.collect_usage_pieces(context)])
        lines += [f"## {' '.join(path)} {{ #{'-'.join(path)} }}", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["```text", usage, "```", ""]
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and "--help" not in parameter.opts:
                lines += [f"`{record[0]}`", f":   {_plain(record[1])}", ""]
        if command.epilog:
            lines += ["```sh", *_examples(command.epilog), "```", ""]
    return "\n".join(lines)


def _examples(epilog: str) -> list[str]:
    lines = inspect.cleandoc(epilog.replace("\b", "")).splitlines()
    commands = [line.strip() for line in lines if line.strip() and not line.startswith("Examples")]
    return [re.sub(r"(\S) {3,}(?=\S)", r"\1    # ", line) for line in commands if line.startswith("rankalloc")]


def _plain(text: str) -> str:
    """Brackets are no links, and stars no emphasis."""
    for character in "[]*":
        text = text.replace(character, "\\" + character)
    return text
