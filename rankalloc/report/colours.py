"""The colours of figures, named by role, each in a light and a dark form.

Figures are drawn with the names below. For a page they stand for sentinel colours that :mod:`.svg` turns into CSS
variables, so that a drawing follows the reader's mode; for paper they are the light mode's colours.
"""

from __future__ import annotations

import re
from functools import cache

from matplotlib.colors import get_named_colors_mapping

_NAME = "rankalloc:"
_ROLES = {
    "ink": ("#1d2327", "#e4e7e9"),
    "muted": ("#5a646b", "#a3adb4"),
    "grid": ("#dfe3e6", "#333b42"),
    "surface": ("#ffffff", "#14181b"),
    "adaptive": ("#20688f", "#6db9dd"),
    "uniform": ("#b8541a", "#f0a267"),
    "ghost": ("#e9edef", "#252c32"),
}
_LINES = (
    ("#20688f", "#6db9dd"),
    ("#b8541a", "#f0a267"),
    ("#2f7d57", "#6cc79a"),
    ("#8a4f8f", "#cf9ad3"),
    ("#8a6d00", "#d9bd55"),
    ("#5a646b", "#a3adb4"),
)
# Anchors of the rank scale: lightness falls (light mode) or rises (dark mode) steadily from rank 0 up,
# so that order survives every kind of colour blindness and a black-and-white printer.
_LEVELS = (
    ("#eef5f0", "#c4e6d0", "#8ed3b8", "#52b5ab", "#35909f", "#356b96", "#3c4680", "#33264f"),
    ("#24243a", "#343a66", "#365f8e", "#35859d", "#43aaa5", "#7accb0", "#bbe5c8", "#eaf7ec"),
)
# Anchors of the scale of differences, from far below zero to far above; orange and blue stay apart for everybody.
_DELTAS = (
    ("#8a3a0c", "#dd8a52", "#f7d9c4", "#f2f4f5", "#c3deed", "#5f9fc4", "#124a6b"),
    ("#f6b98c", "#b5652c", "#5a3820", "#20262b", "#1f4357", "#3a86ad", "#a6dcf5"),
)

INK, MUTED, GRID, SURFACE, ADAPTIVE, UNIFORM, GHOST = (_NAME + role for role in _ROLES)
LINES = tuple(f"{_NAME}line{i}" for i in range(len(_LINES)))
LEVELS = 16
DELTAS = 15  # odd: the middle one is no difference


def level(rank: float, top: float) -> int:
    """The step of the rank scale, 0 to LEVELS - 1, for ``rank`` on a scale that ends at ``top``."""
    return 0 if top <= 0 else max(0, min(LEVELS - 1, round(rank / top * (LEVELS - 1))))


def fill(step: int) -> str:
    """The colour of a step of the rank scale."""
    return f"{_NAME}level{step}"


def text_on(step: int) -> str:
    """A colour that can be read on :func:`fill`."""
    return f"{_NAME}on{step}"


def delta(change: float, most: float) -> int:
    """The step of the scale of differences, 0 to DELTAS - 1, whose ends are ∓ ``most``. Only 0 is the middle."""
    half = DELTAS // 2
    if not change or most <= 0:
        return half
    steps = max(1, round(min(1.0, abs(change) / most) * half))
    return half + (steps if change > 0 else -steps)


def delta_fill(step: int) -> str:
    """The colour of a step of the scale of differences."""
    return f"{_NAME}delta{step}"


def text_on_delta(step: int) -> str:
    """A colour that can be read on :func:`delta_fill`."""
    return f"{_NAME}ondelta{step}"


def scale(anchors: tuple[str, ...], steps: int) -> list[str]:
    """``steps`` colours spaced evenly along the anchors."""
    colours = []
    for k in range(steps):
        at = k / (steps - 1) * (len(anchors) - 1)
        i = min(int(at), len(anchors) - 2)
        pair = [[int(a[j : j + 2], 16) for j in (1, 3, 5)] for a in (anchors[i], anchors[i + 1])]
        mixed = [round(x + (y - x) * (at - i)) for x, y in zip(*pair, strict=True)]
        colours.append("#" + "".join(f"{c:02x}" for c in mixed))
    return colours


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two hex colours, 1 to 21."""
    bright = sorted((_luminance(one), _luminance(other)))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@cache
def palette() -> tuple[dict[str, str], dict[str, str]]:
    """CSS variables for light and for dark mode."""
    modes: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for mode, variables in enumerate(modes):
        variables |= {role: pair[mode] for role, pair in _ROLES.items()}
        variables |= {f"line{i}": pair[mode] for i, pair in enumerate(_LINES)}
        for name, anchors, steps in (("level", _LEVELS, LEVELS), ("delta", _DELTAS, DELTAS)):
            on = "on" if name == "level" else "ondelta"
            for k, colour in enumerate(scale(anchors[mode], steps)):
                variables[f"{name}{k}"] = colour
                dark = contrast("#000000", colour) >= contrast("#ffffff", colour)
                variables[f"{on}{k}"] = "#000000" if dark else "#ffffff"
    return modes


def register(for_page: bool) -> None:
    """Make the names mean sentinels or, when not ``for_page``, the light mode's colours; see :func:`variables`."""
    names = get_named_colors_mapping()
    for place, (variable, light) in enumerate(palette()[0].items()):
        names[_NAME + variable] = f"#0a{place:04x}" if for_page else light


def variables(tag: str) -> str:
    """A tag of SVG with each sentinel as its CSS variable."""
    order = list(palette()[0])
    return re.sub(r"#0a(00[0-9a-f]{2})", lambda m: f"var(--{order[int(m[1], 16)]})", tag)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
