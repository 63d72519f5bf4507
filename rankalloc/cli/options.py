"""What several commands share: options, and how a command is declared with its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own code. Only for models you trust.")
]
For = Annotated[
    str | None,
    typer.Option("--for", metavar="READER", help="Write what peft, vllm, llama.cpp or tgi reads. [default: peft]"),
]
Layout = Annotated[
    str | None,
    typer.Option("--layout", metavar="L", help="In the place of --for: compact, uniform (padded) or one-alpha."),
]
PadTo = Annotated[
    int,
    typer.Option("--pad-to", min=1, metavar="N", help="Round the uniform layout's rank up to a multiple of this."),
]
AdapterOutput = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the adapter.")]


def examples(*lines: str) -> str:
    """A help epilog that keeps its lines ("\\b" is click's mark for that)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


Command = tuple[Callable[..., Any], *tuple[str, ...]]
"""A command's function, followed by its example lines."""


def declare(app: typer.Typer, commands: Mapping[str, Command]) -> None:
    """Add commands to ``app``: {name: (function, *example lines)}."""
    for name, (function, *lines) in commands.items():
        app.command(name, epilog=examples(*lines))(function)
