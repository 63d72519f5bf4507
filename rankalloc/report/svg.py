"""Drawing for a page: matplotlib figures as inline SVG that follows the page's light or dark mode.

Figures are drawn in sentinel colours, one for each role (ink, grid, adaptive, uniform, rank levels).
:func:`finish` replaces each by a CSS variable, makes ids unique within the page, and keeps text as
text, so that it takes the page's font and can be read and searched.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .wording import MINUS, printable

INK, MUTED, GRID, SURFACE = "#0a0101", "#0a0102", "#0a0103", "#0a0104"
ADAPTIVE, UNIFORM, GHOST = "#0a0105", "#0a0106", "#0a0107"
LEVELS = 16
WIDTH = 10.2  # inches, at 96 px each the page's column

# Anchors of the rank scale: lightness falls (light mode) or rises (dark mode) steadily from rank 0 up,
# so that order survives every kind of colour blindness and a black-and-white printer.
_LIGHT = ("#eef5f0", "#c4e6d0", "#8ed3b8", "#52b5ab", "#35909f", "#356b96", "#3c4680", "#33264f")
_DARK = ("#24243a", "#343a66", "#365f8e", "#35859d", "#43aaa5", "#7accb0", "#bbe5c8", "#eaf7ec")
_NAMED = {
    INK: ("ink", "#1d2327", "#e4e7e9"),
    MUTED: ("muted", "#5a646b", "#a3adb4"),
    GRID: ("grid", "#dfe3e6", "#333b42"),
    SURFACE: ("surface", "#ffffff", "#14181b"),
    ADAPTIVE: ("adaptive", "#20688f", "#6db9dd"),
    UNIFORM: ("uniform", "#b8541a", "#f0a267"),
    GHOST: ("ghost", "#e9edef", "#252c32"),
}
LINES = tuple(f"#0a02{i:02x}" for i in range(6))
_LINE_COLOURS = (
    ("#20688f", "#6db9dd"),
    ("#b8541a", "#f0a267"),
    ("#2f7d57", "#6cc79a"),
    ("#8a4f8f", "#cf9ad3"),
    ("#8a6d00", "#d9bd55"),
    ("#5a646b", "#a3adb4"),
)


def level(rank: float, top: float) -> int:
    """The step of the rank scale, 0 to LEVELS - 1, for ``rank`` on a scale that ends at ``top``."""
    return 0 if top <= 0 else max(0, min(LEVELS - 1, round(rank / top * (LEVELS - 1))))


def fill(step: int) -> str:
    return f"#0a03{step:02x}"


def text_on(step: int) -> str:
    return f"#0a04{step:02x}"


def scale(anchors: tuple[str, ...], steps: int = LEVELS) -> list[str]:
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


def palette() -> tuple[dict[str, str], dict[str, str]]:
    """CSS variables for light and for dark mode."""
    modes: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for mode, anchors, variables in zip((1, 2), (_LIGHT, _DARK), modes, strict=True):
        for entry in _NAMED.values():
            variables[entry[0]] = entry[mode]
        for i, pair in enumerate(_LINE_COLOURS):
            variables[f"line{i}"] = pair[mode - 1]
        for k, colour in enumerate(scale(anchors)):
            variables[f"level{k}"] = colour
            dark = contrast("#000000", colour) >= contrast("#ffffff", colour)
            variables[f"on{k}"] = "#000000" if dark else "#ffffff"
    return modes


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's defaults plus the report's style, independent of the user's matplotlibrc."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A layer's name may have letters that the measuring font lacks; the browser's font draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "rankalloc",
                "text.parse_math": False,
                "font.size": 9,
                "text.color": INK,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": MUTED,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "axes.linewidth": 0.7,
                "xtick.major.width": 0.7,
                "ytick.major.width": 0.7,
                "xtick.major.size": 3,
                "ytick.major.size": 3,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.titlesize": 9,
                "axes.titlelocation": "left",
                "axes.titlecolor": INK,
                "axes.titlepad": 6,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "grid.color": GRID,
                "grid.linewidth": 0.7,
                "axes.axisbelow": True,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "legend.labelcolor": INK,
                "axes.formatter.useoffset": False,
                "lines.solid_capstyle": "butt",
                "hatch.linewidth": 0.6,
            }
        )
        yield


def canvas(height: float, width: float = WIDTH, *, wspace: float = 0.03, hspace: float = 0.05) -> Figure:
    """An empty figure of ``width`` × ``height`` inches; ``wspace`` and ``hspace`` are the shares between panels."""
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=wspace, hspace=hspace)
    return Figure(figsize=(width, height), layout=engine)


def finish(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an inline ``<svg>``. Its ids start with ``prefix``, which no other figure of the page may have;
    ``label`` is its aria-label."""
    out = io.StringIO()
    # savefig would lay the figure out and draw it a second time.
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    # Only tags are rewritten: names of layers are text and may look like ids or colours.
    body = re.sub(r"<[^>]+>", lambda m: _tag(m[0], prefix, used), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    wide, high = (72 * x for x in figure.get_size_inches())
    css = f"max-width:{wide / 0.75:.0f}px;min-width:{min(wide / 0.75, 780):.0f}px"
    return (
        f'<svg class="plot" viewBox="0 0 {wide:.6g} {high:.6g}" style="{css}" role="img" '
        f'aria-label="{html.escape(printable(label))}">{body.strip()}'
    )


def png(figure: Figure) -> bytes:
    """The figure as a PNG in the light mode's colours, for places that take no SVG."""
    colours = palette()[0]
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor"):
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or put is None:
                continue
            try:
                sentinel = to_hex(get())
            except ValueError:  # a collection's list of colours
                continue
            if re.fullmatch("#0a0[1-4][0-9a-f]{2}", sentinel):
                put(colours[_variable(sentinel)[6:-1]])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=144, facecolor=colours["surface"])
    return out.getvalue()


def _tag(tag: str, prefix: str, used: set[str]) -> str:
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r' id="crisp[^"]*"', ' class="crisp"', tag)
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", tag)
    return re.sub(r"#0a0[1-4][0-9a-f]{2}", lambda m: _variable(m[0]), tag)


def _variable(sentinel: str) -> str:
    kind, index = sentinel[3:5], int(sentinel[5:], 16)
    if kind == "01":
        return f"var(--{_NAMED[sentinel][0]})"
    return f"var(--{ {'02': 'line', '03': 'level', '04': 'on'}[kind] }{index})".replace(" ", "")


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def key(axes: Axes, columns: int = 2) -> None:
    """The legend above the axes at the right, clear of every line and bar."""
    axes.legend(
        loc="lower right", ncols=columns, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, borderpad=0.1, columnspacing=1.4
    )


def whole(axis: Axis, bins: int = 6) -> None:
    """Integer ticks with grouped thousands."""
    axis.set_major_locator(MaxNLocator(nbins=bins, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}".replace("-", MINUS)))


def logarithmic(axes: Axes, which: str, low: float, high: float) -> None:
    """A log axis from ``low`` to ``high`` (positive) with plain numbers at few places."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    narrow = high / low < 60
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _plain(v)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    if 1e-4 <= value < 1e5:
        return f"{value:,.6g}" if value >= 1000 else f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{power}" if mantissa == "1" else f"{mantissa}×10{power}"
