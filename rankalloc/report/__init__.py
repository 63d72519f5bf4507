"""The rank report: one HTML page about what a run or a sweep did with its ranks.

``source`` reads the records; ``facts`` holds the rows that ``tables`` and ``sweeps`` make from them;
``outcome``, ``verdict`` and ``alerts`` judge them; ``figures*`` draw them as SVG; ``exhibits*`` join
drawing, caption and numbers; ``sections`` lists the sections of the page, and ``html`` writes it.
Nothing here needs torch.
"""

from __future__ import annotations

from .html import write_report

__all__ = ["write_report"]
