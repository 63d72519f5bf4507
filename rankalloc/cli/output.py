"""Output for people and for programs. Results go to stdout, everything else to stderr. Of several processes that a
launcher started, the first one prints.

Names of layers, runs and files are untrusted text: they are never read as markup, and control characters in
them are printed as escapes, so that no file can control the terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..experiments.launched import is_first

if TYPE_CHECKING:
    from rich.console import Console

# C0 and C1 controls, and the marks that change the direction of text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Lines are folded on a terminal only: elsewhere they are for grep.
_WIDE = 2000


def clean(text: Any) -> str:
    """``text`` with control characters and lone surrogates as visible escapes, on one line."""
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def console(*, stderr: bool = False) -> Console:
    """A console that interprets no markup; without colour when the stream is not a terminal or NO_COLOR is set."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else _WIDE
    )


def say(text: str = "", *, style: str | None = None, stderr: bool = True, anywhere: bool = False) -> None:
    """Print one line, by default on stderr. ``anywhere``: in every process, not in the first one alone."""
    from rich.text import Text

    if not (anywhere or is_first()):
        return

    console(stderr=stderr).print(Text(clean(text), style=style or ""), soft_wrap=True)


def show(text: str = "", *, style: str | None = None) -> None:
    """Print one line of a result, on stdout."""
    say(text, style=style, stderr=False)


def show_table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), *, right: Sequence[int] = ()) -> None:
    """Print aligned columns on stdout. ``right``: the columns aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    if not is_first():
        return
    table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index in range(max(map(len, rows), default=len(header))):
        title = Text(header[index]) if header else ""
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    # rich pads the last column; trailing blanks are noise in a file
    out = console()
    with out.capture() as capture:
        out.print(table)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def show_json(value: Any) -> None:
    """Print one strict JSON document on stdout, in ASCII, which is safe in every terminal and locale."""
    from ..records import finite

    if is_first():
        sys.stdout.write(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Redirect what libraries print to stderr, so that stdout holds results alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def number(value: Any) -> str:
    """A number for people: separated thousands, four significant digits; "-" for None."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """A share for people, never rounded up to all of it: ``94.7 %``, ``100 %``."""
    return f"{math.floor(1000 * share) / 10:g} %"


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """``1 layer``, ``36 layers``; ``plural`` where it is not ``noun`` with an s."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def about(seconds: float) -> str:
    """A length of time for people: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def trained_row(trained: int | None, params: int | None) -> list[tuple[str, str]]:
    """How many numbers train where that is fewer than the adapter has, whose other factors are frozen."""
    if trained is None or params is None or trained >= params:
        return []
    return [("trained", f"{trained:,} numbers of the adapter; its other factors are frozen")]


def stored_text(trained: int, stored: int, padding_bytes: int | None, reader: str | None = None) -> str:
    """How many numbers a file holds, and what padding costs: ``trained`` is without zeros."""
    if stored == trained:
        return f"{stored:,} numbers, none of which only pads"
    whom = f" for {reader}" if reader else ""
    cost = "" if padding_bytes is None else f", {padding_bytes:,} bytes more"
    return f"padded{whom}: {stored:,} numbers in place of {trained:,}{cost}"
