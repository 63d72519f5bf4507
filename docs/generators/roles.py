"""Sphinx roles in docstrings (``:func:`rankalloc.load```) as links where the reference has the name, else as code."""

from __future__ import annotations

import re
from collections.abc import Mapping

ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):\s*<code>(~?)([\w.]+?)(?:\(\))?</code>")
ANCHOR = re.compile(r'id="(rankalloc\.[\w.]+)"')


def replace(html: str, public: Mapping[str, str]) -> str:
    """The page with every role turned into an optional cross-reference.

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
    """The full path of a name: public ones are known, others are looked for beside ``context``."""
    for length in range(name.count(".") + 1, 0, -1):
        parts = name.split(".")
        head, rest = ".".join(parts[:length]), parts[length:]
        if head in public:
            return ".".join([public[head], *rest])
        if f"rankalloc.{head}" in public:
            return ".".join([public[f"rankalloc.{head}"], *rest])
    if name.startswith("rankalloc"):
        return name
    # a method of the class whose docstring, or whose method's docstring, this is
    parts = context.split(".")
    classes = [i for i, part in enumerate(parts) if part[:1].isupper()]
    return ".".join([*parts[: classes[-1] + 1 if classes else len(parts) - 1], name])
