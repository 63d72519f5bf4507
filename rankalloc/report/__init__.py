"""The rank report: one HTML page that says what a run or a sweep did with its ranks.

``source`` reads the records, ``tables``, ``sweeps`` and ``verdict`` turn them into rows and
sentences, ``figures`` draws rows as SVG, ``exhibits`` joins drawing, caption and numbers, ``html``
writes the page. Nothing here needs torch.
"""

from __future__ import annotations

from .html import write_report

__all__ = ["write_report"]
