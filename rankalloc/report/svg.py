"""Drawing for a page: matplotlib figures as inline SVG that follows the page's light or dark mode.

Figures are drawn in the named colours of :mod:`.colours`. :func:`inline` replaces each by a CSS variable, makes ids
unique within the page, and keeps text as text, so that it takes the page's font and can be read and searched. Marks
whose gid begins with "cell" belong to one layer: they become ``data-cell``, by which the page's script finds them.
Those of :func:`tips` tell their values.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from . import colours
from .wording import MINUS, printable


@dataclass(frozen=True)
class Medium:
    """What a figure is drawn for: its ``width`` in inches, the size of its text in points, how many panels stand side
    by side at most, and the factor on heights. A ``page`` is as wide as it must be; ``live`` drawings on it follow its
    colours and take its font."""

    width: float
    text: float
    panels: int
    tall: float
    page: bool = False
    live: bool = True

    @property
    def label(self) -> int:
        """Letters of a layer's or a role's name beside a panel."""
        return 42 if self.page else 16 if self.narrow else 24

    @property
    def narrow(self) -> bool:
        """Whether panels that belong side by side go below each other."""
        return self.panels == 1


PAGE = Medium(10.2, 9, 3, 1.0, page=True)  # at 96 px an inch the page's column
PAGE_AS_PICTURE = Medium(10.2, 9, 3, 1.0, page=True, live=False)
_MEDIUM: ContextVar[Medium] = ContextVar("medium", default=PAGE)
TALLEST = 9.0  # inches of a figure on paper
WIDE = 1.35  # a drawing wider than this share of the page keeps its size and scrolls


def medium() -> Medium:
    """What is drawn for now."""
    return _MEDIUM.get()


@contextlib.contextmanager
def drawing(target: Medium = PAGE) -> Iterator[None]:
    """matplotlib's defaults plus the report's style, independent of the user's matplotlibrc."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A layer's name may have letters that the measuring font lacks; the browser's font draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        live = target.page and target.live
        colours.register(live)
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none" if live else "path",
                "svg.hashsalt": "rankalloc",
                "pdf.fonttype": 42,
                "text.parse_math": False,
                "font.size": target.text,
                "text.color": colours.INK,
                "axes.edgecolor": colours.MUTED,
                "axes.labelcolor": colours.MUTED,
                "xtick.color": colours.MUTED,
                "ytick.color": colours.MUTED,
                "axes.labelsize": target.text,
                "xtick.labelsize": target.text,
                "ytick.labelsize": target.text,
                "axes.linewidth": 0.7,
                "xtick.major.width": 0.7,
                "ytick.major.width": 0.7,
                "xtick.major.size": 3,
                "ytick.major.size": 3,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.titlesize": target.text,
                "axes.titlelocation": "left",
                "axes.titlecolor": colours.INK,
                "axes.titlepad": 6,
                "figure.facecolor": "none" if live else "white",
                "axes.facecolor": "none",
                "grid.color": colours.GRID,
                "grid.linewidth": 0.7,
                "axes.axisbelow": True,
                "legend.frameon": False,
                "legend.fontsize": min(8.5, target.text),
                "legend.labelcolor": colours.INK,
                "axes.formatter.useoffset": False,
                "lines.solid_capstyle": "butt",
                "hatch.linewidth": 0.6,
            }
        )
        token = _MEDIUM.set(target)
        try:
            yield
        finally:
            _MEDIUM.reset(token)


def canvas(height: float, width: float | None = None, *, wspace: float = 0.03, hspace: float = 0.05) -> Figure:
    """An empty figure of ``height`` inches on the page, and of ``width`` or the page's; on paper the width is the
    column's. ``wspace`` and ``hspace`` are the shares between panels."""
    target = medium()
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=wspace, hspace=hspace)
    if target.page:
        return Figure(figsize=(width or target.width, height), layout=engine)
    return Figure(figsize=(target.width, min(height * target.tall, TALLEST)), layout=engine)


def beside(figure: Figure, ratios: tuple[float, float], sharey: bool = False) -> tuple[Axes, Axes]:
    """Two panels side by side, in a narrow column below each other."""
    if medium().narrow and not sharey:
        first, second = figure.subplots(2, 1)
    else:
        first, second = figure.subplots(1, 2, width_ratios=ratios, sharey=sharey)
    return first, second


def inline(figure: Figure, prefix: str, label: str) -> str:
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
    pixels = round(wide / 0.75)
    css = f"max-width:{pixels}px;min-width:{pixels if pixels > WIDE * 96 * PAGE.width else min(pixels, 780)}px"
    return (
        f'<svg class="plot" viewBox="0 0 {wide:.6g} {high:.6g}" style="{css}" role="img" '
        f'aria-label="{html.escape(printable(label))}">{body.strip()}'
    )


def png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as a PNG, for places that take no SVG; drawn on paper's colours."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def tips(axes: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """On a page, what the browser shows when a pointer rests on a point: a mark that is not seen, with a title. It
    needs no script; the numbers under the figure are for everybody else."""
    target = medium()
    if target.page and target.live:
        for x, y, text in points:
            axes.plot([x], [y], "o", color=colours.INK, markersize=11, alpha=0, markeredgewidth=0, zorder=9,
                      gid=f"tip {printable(text)}", scalex=False, scaley=False)


def _tag(tag: str, prefix: str, used: set[str]) -> str:
    if tip := re.search(r' id="tip ([^"]*)"', tag):
        return _tag(tag.replace(tip[0], ' class="tip"'), prefix, used) + f"<title>{tip[1]}</title>"
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r' id="cell(\d+)[^"]*"', r' data-cell="\1"', tag)
    tag = re.sub(r' id="(crisp|mean)[^"]*"', r' class="\1"', tag)
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", _short, tag)
    return colours.variables(tag)


def _short(number: re.Match[str]) -> str:
    """A coordinate to a hundredth of a point, which no screen shows."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def key(axes: Axes, columns: int = 2) -> None:
    """The legend above the axes at the right, clear of every line and bar; on paper, where a title leaves no room
    there, inside them."""
    if not medium().page and axes.get_title("left"):
        axes.legend(loc="best", borderaxespad=0.2, borderpad=0.1)
        return
    axes.legend(
        loc="lower right", ncols=columns, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, borderpad=0.1, columnspacing=1.4
    )


def whole(axis: Axis, bins: int = 6) -> None:
    """Integer ticks with grouped thousands."""
    bins = bins if medium().page else max(2, bins * 2 // 3 if not medium().narrow else bins // 2)
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
