"""What mkdocs calls while it builds the site: reference pages are made from the package, never copied by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from generators import api, commands, configuration, docstrings, included, methods
from mkdocs.structure.files import File, Files

# The package says what it has; where models come from does not matter here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the files of the repository that the site includes."""
    pages: dict[str, str | Path] = {
        "reference/methods.md": methods.page(),
        "reference/cli.md": commands.page(),
        "reference/configuration.md": configuration.page(),
        **api.pages(),
        **included.included(),
    }
    for path, content in pages.items():
        source = {"abs_src_path": str(content)} if isinstance(content, Path) else {"content": content}
        files.append(File.generated(config, path, **source))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page of docs/ links to files of the repository; on the site it links to their pages."""
    source = included.ROOT / "docs" / page.file.src_uri
    return included.moved(markdown, source, page.file.src_uri)[0] if source.is_file() else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Roles in docstrings become links or code."""
    return docstrings.linked(html, api.public_paths())
