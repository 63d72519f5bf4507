"""What the package's docstrings have that Markdown and griffe's Google style do not read: roles, and ``Example:``."""

from __future__ import annotations

import re
from collections.abc import Mapping

ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):\s*<code>(~?)([\w.]+?)(?:\(\))?</code>")
ANCHOR = re.compile(r'id="(rankalloc\.[\w.]+)"')
EXAMPLE = re.compile(r"^( *)Example:[ \t]*$", re.MULTILINE)
LITERAL = re.compile(r"^( *)Example::[ \t]*\n\n((?:\1 +.*\n?|[ \t]*\n)+)", re.MULTILINE)


def readable(text: str) -> str:
    """The docstring with its Example as a section that griffe knows, and the block after ``Example::`` as Python."""

    def fenced(match: re.Match[str]) -> str:
        margin, block = match.groups()
        lines = [line[4:] for line in block.rstrip().splitlines()]
        return "\n".join([f"{margin}```python", *lines, f"{margin}```", ""])

    return EXAMPLE.sub(r"\1Examples:", LITERAL.sub(fenced, text))


def linked(html: str, public: Mapping[str, str]) -> str:
    """The page with every role (``:func:`rankalloc.load```) as a link where the site has the name, else as code.

    Args:
        html: the content of a page, with roles as Markdown leaves them.
        public: {``rankalloc.name``: where it is defined}.
    """
    anchors = [(match.start(), match.group(1)) for match in ANCHOR.finditer(html)]

    def link(match: re.Match[str]) -> str:
        short, name = match.groups()
        before = [anchor for start, anchor in anchors if start < match.start()]
        shown = name.rpartition(".")[2] if short else name
        target = _target(name, before[-1] if before else "", public)
        return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'

    return ROLE.sub(link, html)


def _target(name: str, context: str, public: Mapping[str, str]) -> str:
    """The full path of a name; one that is not public is looked for in the class whose anchor came last."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        home = public.get(head) or public.get(f"rankalloc.{head}")
        if home:
            return ".".join([home, *parts[length:]])
    if name.startswith("rankalloc"):
        return name
    around = context.split(".")
    classes = [index for index, part in enumerate(around) if part[:1].isupper()]
    return ".".join([*around[: classes[-1] + 1 if classes else -1], name])
