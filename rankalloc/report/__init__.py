"""The rank report: what a run, a sweep or a finished adapter did with its ranks, and any two of them side by side.

``source`` reads the records (``kinds``, ``finished``), hides what must not be shared (``redact``) and is patient with
odd ones (``lenient``). ``facts`` holds the rows that ``tables``, ``grids``, ``curves`` and ``sweeps`` make from them,
``compare`` those of two; ``outcome``, ``verdict*`` and ``alerts`` judge them, and ``following`` says what to do next;
``figures*`` draw them and ``exhibits*`` join drawing, caption and numbers. ``sections*`` list the sections of a page,
``html`` and ``data`` make it, ``markdown`` and ``summary`` are its short forms, ``paper`` its figures, and ``writing``
writes them. Nothing here needs torch.
"""

from __future__ import annotations

from .writing import write_report

__all__ = ["write_report"]
