"""The command line: ``app`` declares it; every command does its heavy imports when it runs.

``endings`` turns whatever ends a command into an exit code and one sentence, ``output`` is the only
place that writes to the terminal, ``runs`` holds what train and sweep do, ``dry_run``, ``progress`` and
``summary`` what they say before, during and after, ``conversions`` what export, import and extract do and say,
``listings`` and ``layers`` what ``ls`` and ``env`` say, ``posthoc`` and ``finished`` what is done with adapters that
exist already.
"""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
