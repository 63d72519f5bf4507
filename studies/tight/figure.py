"""The figure: how far every arm is behind auto, by size, one panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import save
from .analysis import Row
from .arms import ADALORA, AUTO, EQUAL, EVERYWHERE, HAND, RANDOM, SHUFFLED, SIZES, TASKS, VERA, XS
from .hand import QUERY_VALUE

NAMES = {"punctuation": "Punctuation", "pos": "Part of speech"}
BY_HAND = "best pattern by hand"
STYLES: dict[str, tuple[str, str]] = {
    BY_HAND: ("#d55e00", "o"), EVERYWHERE: ("#0072b2", "D"), QUERY_VALUE: ("#56b4e9", "s"), ADALORA: ("#009e73", "^"),
    VERA: ("#cc79a7", "v"), XS: ("#e69f00", "P"), EQUAL: ("#7f7f7f", "o"),
    RANDOM: ("#7f7f7f", "x"), SHUFFLED: ("#7f7f7f", "+"),
}  # fmt: skip
"""{what the legend says: (colour, marker)}: Okabe and Ito's colours, grey for the controls."""
_LABELS = {
    EVERYWHERE: "uniform LoRA, every layer", QUERY_VALUE: "LoRA, query and value",
    EQUAL: "auto's method, equal ranks", RANDOM: "auto's method, random ranks", SHUFFLED: "auto's ranks, other layers",
}  # fmt: skip
_LOW, _HIGH = -0.005, 0.06
_WIDTH = 0.09


def draw(rows: Sequence[Row], stem: Path) -> None:
    """Write ``stem``.png and .svg; nothing without rows."""
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    if not tasks:
        return
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for ax, task in zip(axes, tasks, strict=True):
        _panel(ax, [row for row in rows if row.task == task and row.arm != AUTO])
        ax.set_title(NAMES[task], fontsize=10)
    axes[0].set_ylabel("behind auto, nats a word", fontsize=9)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, stem)


def _panel(ax: Axes, rows: Sequence[Row]) -> None:
    arms = [arm for arm in STYLES if any(_name(row) == arm for row in rows)]
    for place, arm in enumerate(arms):
        colour, marker = STYLES[arm]
        shift = (place - (len(arms) - 1) / 2) * _WIDTH
        for row in (row for row in rows if _name(row) == arm):
            x = list(SIZES).index(row.size) + shift
            if row.difference > _HIGH:  # too far to show the rest beside it
                ax.annotate(
                    f"{row.difference:.2f}", (x, _HIGH * 0.995), (x, _HIGH * 0.88), ha="center", fontsize=7,
                    color=colour, arrowprops={"arrowstyle": "->", "color": colour},
                )  # fmt: skip
                continue
            ends = [[row.difference - row.low], [min(row.high, _HIGH) - row.difference]]
            ax.errorbar(
                x, row.difference, ends, fmt=marker, color=colour, markersize=5, linewidth=1.3,
                label=_LABELS.get(arm, arm),
            )  # fmt: skip
    ax.axhline(0, color="#222222", linewidth=0.9)
    ax.set_ylim(_LOW, _HIGH)
    ax.set_xticks(range(len(SIZES)), [_tick(size) for size in SIZES], fontsize=8)
    ax.set_xlabel("size, in ranks a layer", fontsize=9)
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _name(row: Row) -> str:
    return BY_HAND if row.arm in HAND else row.arm


def _tick(size: str) -> str:
    return {"an eighth": "1/8", "a quarter": "1/4", "a half": "1/2", "one": "1"}[size]
