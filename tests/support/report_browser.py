"""A real Chromium for the report's pages: opened once, each page in a tab of its own that remembers what it said and
asked for."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SERIOUS = ("serious", "critical")


@functools.cache
def axe() -> str:
    """The script of axe-core, Deque's checker of accessibility."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


class Browser:
    """Opens pages; ``said`` of a tab are console messages and errors, ``asked`` addresses other than its own file."""

    def __init__(self, chromium: Any):
        self._chromium = chromium

    @contextlib.contextmanager
    def page(
        self, path: Path, fragment: str = "", *, scheme: str = "light", width: int = 1280, **options: Any
    ) -> Iterator[Any]:
        context = self._chromium.new_context(
            color_scheme=scheme, reduced_motion="reduce", viewport={"width": width, "height": 900}, **options
        )
        context.set_default_timeout(10_000)
        tab = context.new_page()
        tab.said, tab.asked = [], []
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: tab.asked.append(request.url))
        address = path.resolve().as_uri()
        tab.goto(address + fragment)
        try:
            yield tab
        finally:
            tab.asked = [url for url in tab.asked if not url.startswith((address, "data:", "blob:"))]
            context.close()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield Browser(chromium)
        finally:
            chromium.close()


def findings(tab: Any) -> list[str]:
    """axe's serious and critical findings: rule, and the first element."""
    tab.evaluate(axe())
    found = tab.evaluate("axe.run({resultTypes: ['violations']})")
    return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found["violations"] if one["impact"] in SERIOUS]


def download(tab: Any, label: str) -> bytes:
    """What the button with this spoken label saves."""
    with tab.expect_download() as waiting:
        tab.get_by_role("button", name=label, exact=True).click()
    return Path(waiting.value.path()).read_bytes()
