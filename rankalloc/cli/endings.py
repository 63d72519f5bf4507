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
from .output import say

INTERRUPTED = 130


class CleanEndings(TyperGroup):
    """The root of the command line; whatever is raised below it ends here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        # typer's own endings, usage errors and a closed pipe among them
        except (TyperException, typer.Exit, typer.Abort, EOFError, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except RankallocError as error:
            _traceback_if(ctx)
            _tell(error)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _traceback_if(ctx)
            what = " ".join(filter(None, (type(error).__name__ + ":", " ".join(str(error).split())))).rstrip(":")
            command = ctx.invoked_subcommand or ""
            hint = "" if ctx.params.get("debug") else f"; run again with --debug (rankalloc --debug {command} ...)"
            _error(f"unexpected error: {what}{hint}")
            raise typer.Exit(1) from None


def _tell(error: RankallocError) -> None:
    # A configuration's mistakes come one a line.
    lines = str(error).splitlines()
    if isinstance(error, ConfigError) and len(lines) > 1:
        _error(f"the configuration has {len(lines)} mistakes:")
        for line in lines:
            say(f"  {line}")
    else:
        _error(" ".join(lines))


def _error(sentence: str) -> None:
    say(f"error: {sentence}", style="red")


def _traceback_if(ctx: Any) -> None:
    if ctx.params.get("debug"):
        for line in traceback.format_exc().splitlines():
            say(line)

