"""``build-kernel``: compile the kernel that makes training steps on a CPU faster."""

from __future__ import annotations

import time

from .output import console, results_only, show


def build(force: bool) -> None:
    """``rankalloc build-kernel``."""
    with results_only():
        from ..layers import native

        existed = native.library_path().is_file()
        started = time.monotonic()
        with console(stderr=True).status("compiling, about half a minute"):
            path = native.build(force)
    if existed and not force:
        show(f"built already: {path}")
    else:
        show(f"built in {time.monotonic() - started:.0f} s: {path}")
    if native.fused_linear() is None:
        show(f"note: runs here do not use it, because {native.SWITCH}=0")
