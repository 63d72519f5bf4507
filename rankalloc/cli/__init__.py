"""The command line. Every command does its heavy imports when it runs.

Declared in ``app``, with options that commands share in ``options``:

- train, sweep: ``request`` (the command as given), ``runs`` (the work), ``dry_run``, ``progress`` and ``summary``
  (the output before, during and after)
- sweep --worker: ``workers``
- report, env, build-kernel: ``summary``, ``listings``, ``kernel``
- ls: ``listings``, ``layers``
- export, import, extract: ``conversions``
- shrink, frontier: ``posthoc_commands`` (their options), ``posthoc`` (the work); compose: ``composing``; refine:
  ``refining``

``endings`` turns every error into an exit code and one sentence; only ``output`` writes to the terminal.
"""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
