"""How a command ends: the exit code, and one sentence instead of a traceback.

0 ok, 1 failed, 2 usage (:attr:`RankallocError.exit_code`), 3 nothing feasible or completed, 130 interrupted.
"""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from ..errors import ConfigError, RankallocError
from ..experiments.launched import speaks
from .output import say
from .usage import USAGE, is_usage, sentence_of

INTERRUPTED = 130


class CleanEndings(TyperGroup):
    """The root command; every exception of a command is handled here."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except TyperException as error:
            raise _misused(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TyperException as error:
            raise _misused(error) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends with these itself
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            debug = ctx.params.get("debug")
            if speaks("error"):
                if debug:
                    for line in traceback.format_exc().splitlines():
                        say(line, anywhere=True)
                first, *more = _sentences(error, "" if debug else ctx.invoked_subcommand)
                say(f"error: {first}", style="red", anywhere=True)
                for line in more:
                    say(f"  {line}", anywhere=True)
            raise typer.Exit(error.exit_code if isinstance(error, RankallocError) else 1) from None


def _misused(error: TyperException) -> Exception:
    """What to raise for a mistake in the command line, of which one sentence is said."""
    if not is_usage(error):
        return error
    if speaks("error"):
        say(f"error: {sentence_of(error)}", style="red", anywhere=True)
    return typer.Exit(USAGE)


def _sentences(error: Exception, command: str | None) -> list[str]:
    """One sentence, or one per mistake in a configuration. The hint to --debug names ``command``."""
    lines = str(error).splitlines()
    if isinstance(error, ConfigError) and len(lines) > 1:
        return [f"the configuration has {len(lines)} mistakes:", *lines]
    if isinstance(error, RankallocError):
        return [" ".join(lines)]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [f"could not use {error.filename}: {error.strerror}"]
    hint = f"; run again with --debug (rankalloc --debug {command} ...)" if command else ""
    what = f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__
    return [f"unexpected error: {what}{hint}"]
