"""The sections of a page, in order. A new section is one function and one line in :data:`SECTIONS`.

A section of figures is a function from a run's :class:`~.facts.Facts` to exhibits, in :mod:`.exhibits` or a file of its
own; the line wraps it in :func:`of_run`. A section with its own prose or tables is a function here, from the page's
:class:`~.facts.Subject` to the variables of a template, and a template.
"""

from __future__ import annotations

from collections.abc import Callable

from ..trace import BASELINES
from . import exhibits, exhibits_sweep, exports
from .alerts import alerts_of
from .exhibit import Exhibit
from .facts import Facts, Subject
from .following import steps_of
from .outcome import headline_metric, judged, reached
from .section import Section, Shown
from .verdict import verdict


def of_run(draw: Callable[[Facts], list[Exhibit]], empty: str = "") -> Callable[[Subject], Shown | None]:
    """Figures of a run, on pages that have one; ``empty`` is the sentence for a run without them."""

    def show(page: Subject) -> Shown | None:
        if page.run is None:
            return None
        return {"figures": draw(page.run) if page.run.layers else [], "empty": empty if page.run.layers else NO_LAYERS}

    return show


def _verdict(page: Subject) -> Shown:
    shown: Shown = {
        "verdict": verdict(page.run, page.sweep), "sweep": page.sweep, "trace": None, "steps": steps_of(page),
    }  # fmt: skip
    if page.run is None:
        return shown
    trace, metric = page.run.trace, page.sweep.metric if page.sweep is not None else None
    record = judged(trace)
    return shown | {
        "trace": trace,
        "reached": reached(trace),
        "final": trace.final_ranks,
        "even": page.run.uniform_rank,
        "judged": record,
        "headline": headline_metric(record, metric) if record is not None else None,
    }


def _alerts(page: Subject) -> Shown:
    return {"alerts": alerts_of(page), "sweep": page.sweep, "sides": False}


def _cost(page: Subject) -> Shown | None:
    if page.run is None:
        return None
    runs = [(page.run.trace, page.run_name)]
    if page.control is not None:
        runs.append((page.control.trace, "uniform trial"))
    return {"trace": page.run.trace, "runs": runs}


def _quality(page: Subject) -> Shown | None:
    if page.run is None:
        return None
    rows = [(page.run_name, row) for row in page.run.evaluations]
    if page.control is not None:
        rows += [("uniform trial", row) for row in page.control.evaluations]
    return {
        "rows": rows,
        "metrics": list(dict.fromkeys(name for _, row in rows for name in row.metrics)),
        "errors": any(row.standard_error is not None for _, row in rows),
        "figures": exhibits.quality(page.run, page.control),
    }


def _sweep(page: Subject) -> Shown | None:
    if page.sweep is None:
        return None
    return {"sweep": page.sweep, "trials": page.trials, "figures": exhibits_sweep.sweep(page.sweep, page.trials)}


def _table(page: Subject) -> Shown | None:
    if page.run is None:
        return None
    return {"layers": page.run.layers}


def _reuse(page: Subject) -> Shown:
    shown: Shown = {"sweep": page.sweep, "trace": None}
    if page.run is None:
        return shown
    trace = page.run.trace
    return shown | {
        "trace": trace,
        "of_lora": trace.method not in BASELINES,
        "pattern": exports.rank_pattern(trace),
        "excluded": exports.excluded(trace),
        "snippet": exports.attach_call(trace),
    }


def _provenance(page: Subject) -> Shown:
    trace = page.run.trace if page.run is not None else None
    return {"created": page.created, "sweep": page.sweep, "trace": trace}


def _glossary(page: Subject) -> Shown:
    return {}


NO_LAYERS = "The trace lists no layers."
NO_ALLOCATION = "No allocation took place: the ranks are the ones the run started with."
NO_SCORES = "No positive scores were recorded, so there is no choice to explain."
NO_SPECTRA = "No positive singular values were recorded."

SECTIONS = (
    Section("verdict", "Verdict", "verdict.html.j2", _verdict),
    Section("alerts", "Alerts", "alerts.html.j2", _alerts),
    Section("map", "Rank map", "figures.html.j2", of_run(exhibits.rank_map)),
    Section("ranks", "Final ranks", "figures.html.j2", of_run(exhibits.final_ranks)),
    Section("course", "How it got there", "figures.html.j2", of_run(exhibits.course, NO_ALLOCATION)),
    Section("why", "Why", "figures.html.j2", of_run(exhibits.why, NO_SCORES)),
    Section("spectra", "Spectra", "figures.html.j2", of_run(exhibits.spectra, NO_SPECTRA)),
    Section("cost", "Cost", "cost.html.j2", _cost),
    Section("quality", "Quality", "quality.html.j2", _quality),
    Section("sweep", "Sweep", "sweep.html.j2", _sweep),
    Section("table", "Full table", "table.html.j2", _table),
    Section("reuse", "Reuse", "reuse.html.j2", _reuse),
    Section("provenance", "Provenance", "provenance.html.j2", _provenance),
    Section("glossary", "Glossary", "glossary.html.j2", _glossary),
)
