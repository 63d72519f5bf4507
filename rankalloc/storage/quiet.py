"""Transformers without its chatter, wherever models are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load reports and progress bars inside a with block, and what bitsandbytes says of kernels
    that it would rather have; their settings return afterwards."""
    reports, kernels = transformers.logging, logging.getLogger("bitsandbytes")
    verbosity, bars, level = reports.get_verbosity(), reports.is_progress_bar_enabled(), kernels.level
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    kernels.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        kernels.setLevel(level)
        if bars:
            reports.enable_progress_bar()
