"""A command that was written wrongly, in one sentence: what was wrong, the value, and where the way out is."""

from __future__ import annotations

import re
from typing import Any

from typer.exceptions import TyperException

from ..errors import did_you_mean

USAGE = 2


def is_usage(error: TyperException) -> bool:
    """Whether it is a mistake in the command line, and not the help that is shown where nothing was given."""
    return error.exit_code == USAGE and "\n" not in error.format_message()


def sentence_of(error: Any) -> str:
    """The sentence. ``error``: a usage error of typer's, whose classes it keeps to itself."""
    ctx = error.ctx
    way_out = f"; {ctx.command_path} {ctx.help_option_names[0]} tells what it takes" if ctx is not None else ""
    return _wrong(error) + way_out


def _wrong(error: Any) -> str:
    parameter, option, said = getattr(error, "param", None), getattr(error, "option_name", None), error.message
    if parameter is not None:
        argument = parameter.param_type_name == "argument"
        name = parameter.metavar or parameter.name.upper() if argument else parameter.opts[0]
        details: list[dict[str, Any]] = getattr(error.__cause__, "errors", lambda: [])()
        return f"{name} {_wanted(details[0])}" if details else f"{name} is missing"
    if option is not None and hasattr(error, "possibilities"):
        known = [one for parameter in error.ctx.command.params for one in parameter.opts]
        return f"there is no option {option}{did_you_mean(option, known)}"
    if option is not None:
        return f"{option} needs a value" if "requires" in said else f"{option} takes no value"
    if command := re.match("No such command '(.*?)'", said):
        known = error.ctx.command.commands
        return f"there is no command {command[1]}{did_you_mean(command[1], known)}"
    if more := re.match(r"Got unexpected extra argument\(?s?\)? \((.*)\)", said):
        return f"it takes no further argument, and got {more[1]}"
    return said[:1].lower() + said[1:].rstrip(".")


def _wanted(mistake: dict[str, Any]) -> str:
    from ..experiments.fields import wanted  # with pydantic, which a command that is right does not need

    said = wanted(mistake["type"], mistake.get("ctx", {})) or mistake["msg"].removeprefix("Input ")
    return f"{said}, got {mistake['input']!r}"
