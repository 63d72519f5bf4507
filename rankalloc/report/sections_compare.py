"""The sections of a page that compares two results, in order; see :mod:`.sections`."""

from __future__ import annotations

from . import exhibits, figures_map
from .alerts import alerts_of
from .compare import Comparison
from .data import highest_rank
from .exhibit import Exhibit
from .exhibits import map_header
from .facts import Facts, Subject
from .following import steps_of
from .section import Section, Shown
from .verdict_compare import compared
from .wording import ABSENT, fixed, number, percent, plural, signed


def _pair(page: Subject) -> Comparison:
    if page.comparison is None:
        raise ValueError("the page compares nothing")
    return page.comparison


def _runs(page: Subject) -> list[tuple[Facts, str]]:
    """The sides that are runs, with their names."""
    both = (page.run, page.other.run if page.other is not None else None)
    return [(run, name) for run, name in zip(both, _pair(page).names, strict=True) if run is not None]


def _verdict(page: Subject) -> Shown:
    pair = _pair(page)
    return {"verdict": compared(pair), "names": pair.names, "sides": (pair.one, pair.other), "steps": steps_of(page)}


def _alerts(page: Subject) -> Shown:
    swept = page.sweep is not None or (page.other is not None and page.other.sweep is not None)
    return {"alerts": alerts_of(page), "sweep": swept, "sides": True}


def _change(page: Subject) -> Shown:
    pair = _pair(page)
    if not pair.common:
        return {"figures": [], "empty": "The two have no layer in common."}
    table = pair.grid
    rows = [
        [role, *(ABSENT if c is None else signed(c) for c in cells), signed(mean, 1)]
        for role, cells, mean in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    shown = Exhibit(
        "change", "Where the ranks differ", lambda: figures_map.delta_map_figure(table),
        f"The rank in {pair.names[0]} minus the rank in {pair.names[1]}, by role and block. Blue: more in the first; "
        "orange: more in the second.",
        map_header(table), rows, cells="pairs",
    )
    return {"figures": [shown], "empty": ""}


def _maps(page: Subject) -> Shown | None:
    both = (page.run, page.other.run if page.other is not None else None)
    top = highest_rank(page)
    figures = [
        item for place, (run, name) in enumerate(zip(both, _pair(page).names, strict=True))
        if run is not None and run.layers for item in exhibits.rank_map(run, place, name, top)
    ]  # fmt: skip
    return {"figures": figures, "empty": ""} if figures else None


def _agreement(page: Subject) -> Shown:
    pair = _pair(page)
    rows = [
        ("Common layers", number(len(pair.common)), "matched by name"),
        ("Spearman’s correlation of their ranks", fixed(pair.correlation, 3),
         "1: the same order; 0: none; not defined where one side’s ranks are all the same"),
        ("Layers kept by both", _percent(pair.layer_overlap), "of those that either keeps (Jaccard)"),
        ("Ranks kept by both", _percent(pair.rank_overlap), "of those that either keeps: Σ min / Σ max (Jaccard)"),
    ]
    return {"rows": rows}


def _quality(page: Subject) -> Shown:
    pair, runs = _pair(page), _runs(page)
    rows = [
        (split, name, number(one), number(other), _difference(one, other)) for split, name, one, other in pair.quality
    ]
    figures = exhibits.quality(runs[0][0], runs[1][0], runs[1][1]) if len(runs) == 2 else []
    names = [
        name if side.seeds is None else f"{name}, mean over {plural(side.seeds, 'seed')}"
        for name, side in zip(pair.names, (pair.one, pair.other), strict=True)
    ]
    return {"rows": rows, "names": names, "figures": figures}


def _cost(page: Subject) -> Shown | None:
    runs = [(run.trace, name) for run, name in _runs(page)]
    return {"trace": runs[0][0], "runs": runs} if runs else None


def _settings(page: Subject) -> Shown:
    pair = _pair(page)
    return {"rows": pair.settings, "names": pair.names}


def _table(page: Subject) -> Shown:
    return {"rows": _pair(page).layers, "names": _pair(page).names}


def _provenance(page: Subject) -> Shown:
    pair = _pair(page)
    return {"sides": list(zip(pair.names, (pair.one, pair.other), strict=True))}


def _percent(share: float | None) -> str:
    return ABSENT if share is None else percent(share)


def _difference(one: float | None, other: float | None) -> str:
    return ABSENT if one is None or other is None else fixed(one - other, signed=True)


COMPARE_SECTIONS = (
    Section("verdict", "Verdict", "compare-verdict.html.j2", _verdict),
    Section("alerts", "Alerts", "alerts.html.j2", _alerts),
    Section("change", "Where they differ", "figures.html.j2", _change),
    Section("agreement", "Agreement", "compare-agreement.html.j2", _agreement),
    Section("maps", "Rank maps", "figures.html.j2", _maps),
    Section("quality", "Quality", "compare-quality.html.j2", _quality),
    Section("cost", "Cost", "cost.html.j2", _cost),
    Section("settings", "Settings that differ", "compare-settings.html.j2", _settings),
    Section("table", "Full table", "compare-table.html.j2", _table),
    Section("provenance", "Provenance", "compare-provenance.html.j2", _provenance),
)
