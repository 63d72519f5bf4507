"""The code blocks of a Markdown file, and what a command line in one means to the real program."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from docs.generators.commands import root

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``output`` is the text block that follows a Python block at once, None without one."""

    language: str
    code: str
    output: str | None = None


def blocks(text: str, language: str) -> list[Block]:
    """All blocks of a language, in order."""
    fences = list(FENCE.finditer(text))
    found = []
    for index, fence in enumerate(fences):
        if fence[1] == language:
            shown = [
                after[2] for after in fences[index + 1 : index + 2]
                if after[1] == "text" and not text[fence.end() : after.start()].strip()
            ]
            found.append(Block(language, fence[2], shown[0] if shown else None))
    return found


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks, comments and prompts apart."""
    lines = [line for block in blocks(text, "sh") for line in block.code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> str:
    """Parse a command line of ``rankalloc`` as the program does, without running it; the command's name.

    Raises what the program would report: an unknown command or option, a missing or superfluous argument.
    """
    command, arguments, path = root(), words[1:], words[0]
    while hasattr(command, "commands"):
        name, command, arguments = command.resolve_command(command.context_class(command, info_name=path), arguments)
        path = f"{path} {name}"
    command.make_context(path, list(arguments))
    return path
