"""What the audited method gains over each arm, a panel for each audit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

import rankalloc as ra

from ..common.figures import CHOSEN, CONTROL, advantages

TITLES = {
    "audit-punctuation": "Punctuation (F1)", "audit-pos": "Part of speech, Brown (accuracy)",
    "audit-tight-punctuation": "Punctuation, a quarter of a rank a layer (F1)",
    "audit-tight-pos": "Part of speech, a quarter of a rank a layer (accuracy)",
}


def figure(records: Sequence[ra.AuditRecord]) -> Figure:
    """Differences in points with their 90 % intervals."""
    tall = max(len(record.comparisons) for record in records)
    drawing = Figure(figsize=(4.6 * len(records) + 0.6, 0.9 + 0.28 * tall), layout="constrained")
    for ax, record in zip(drawing.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        ones = list(reversed(record.comparisons))
        ax.axvspan(-100 * record.margin, 100 * record.margin, color="#eeeeee", zorder=0)
        advantages(ax, [one.arm for one in ones], [
            (line, 100 * (one.low or 0.0), 100 * one.mean, 100 * (one.high or 0.0), one.arm != "uniform")
            for line, one in enumerate(ones)
        ])  # fmt: skip
        for line, one in enumerate(ones):
            if one.claim == "undecided":  # an interval may leave out zero, and its arm still wait for the gatekeeper
                color = CHOSEN if one.arm == "uniform" else CONTROL
                ax.plot(100 * one.mean, line, "o", color=color, markersize=5, mfc="white")
        ax.set_title(TITLES[record.name], fontsize=9, loc="left")
        ax.set_xlabel(f"points that {record.method} gains, {record.seeds} paired seeds", fontsize=8)
    return drawing
