"""Files outside docs/ that are pages or pictures of the site: README, studies, reports, changelog, contributing."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def site_path(file: Path) -> str | None:
    """Where a file of the repository is on the site; None when it is not."""
    if file.is_dir():
        file = file / "README.md"
    if not file.is_file():
        return None
    path = PurePosixPath(file.relative_to(ROOT).as_posix())
    if str(path) in PAGES:
        return PAGES[str(path)]
    if path.parts[0] == "docs":
        return str(PurePosixPath(*path.parts[1:]))
    if path.parts[0] == "reports":
        return str(path)
    if path.parts[0] == "studies" and path.suffix in (".md", ".png", ".svg", ".json"):
        inner = PurePosixPath("findings", *path.parts[1:])
        if path.name != "README.md":
            return str(inner)
        return str(inner.with_name("index.md") if len(path.parts) == 2 else inner.parent.with_suffix(".md"))
    return None


def included() -> dict[str, str | Path]:
    """{path on the site: Markdown, or the file to copy} of all pages from outside docs/ and what they link to."""
    sources = [ROOT / name for name in PAGES] + sorted(ROOT.glob("studies/**/README.md"))
    found: dict[str, str | Path] = {
        path: file for file in sorted(ROOT.glob("reports/*")) if (path := site_path(file)) is not None
    }
    waiting = [file for file in sources if file.is_file()]
    while waiting:
        file = waiting.pop()
        path = site_path(file)
        if path is None or path in found:
            continue
        if file.suffix != ".md":
            found[path] = file
            continue
        text, links = moved(file.read_text(encoding="utf-8"), file, path)
        found[path] = text
        waiting += links
    return found


def moved(text: str, source: Path, path: str) -> tuple[str, list[Path]]:
    """The Markdown of ``source`` as it reads at ``path`` on the site, and the files that it links to."""
    links: list[Path] = []

    def link(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        address, hash_, anchor = target.partition("#")
        if ":" in address or not address:
            return match.group(0)
        file = (source.parent / address).resolve()
        there = site_path(file)
        if there is None:
            # a page that is generated on the site has no file here; its address is the site's already
            return match.group(0) if (ROOT / "docs") in file.parents else label
        if (ROOT / "docs") not in file.parents:
            links.append(file / "README.md" if file.is_dir() else file)
        relative = os.path.relpath(there, PurePosixPath(path).parent)
        return f"{picture}[{label}]({relative}{hash_}{anchor})"

    return LINK.sub(link, text), links
