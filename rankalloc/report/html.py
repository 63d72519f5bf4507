"""The page itself: one HTML file that needs nothing else, and the JSON it came from beside it."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from rankalloc.errors import RankallocError
from rankalloc.files import write_json, write_text
from rankalloc.trace import RankTrace, SweepRecord

from .source import Source, read_source, would_lose

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    source: RankTrace | SweepRecord | str | os.PathLike, output: str | os.PathLike, *, title: str | None = None
) -> Path:
    """Write the rank report of ``source`` to ``output`` and, beside it with the same stem, the JSON it came from.

    Args:
        source: the folder of a run or of a sweep, a ``trace.json``, a ``sweep.json``, the JSON beside
            another report, or a record in memory. A sweep's layers are those of its best trial, with
            the uniform trial beside it where that helps; a sweep record in memory has no traces, so
            only the sweep is shown.
        output: a path ending in ``.html``. The same source gives the same bytes.
        title: heading of the page; the run's or sweep's name when None.

    Returns:
        The path of the page.

    Raises:
        RankallocError: the source is missing or damaged, ``output`` does not end in ``.html``, its
            JSON would overwrite a file that is no report's data, or the files cannot be written.

    Example:
        >>> write_report("runs/punctuation", "reports/punctuation.html")  # doctest: +SKIP
        PosixPath('reports/punctuation.html')
    """
    output = Path(output)
    if output.suffix != ".html":
        raise RankallocError(
            f"a report is written to a file ending in .html, not to {output}; say {output.name or 'report'}.html"
        )
    if output.is_dir():
        raise RankallocError(f"{output} is a folder; give the name of a file ending in .html")
    beside = output.with_suffix(".json")
    if would_lose(beside):
        raise RankallocError(
            f"the data of {output.name} would be written over {beside}, which is no report's data; choose another name"
        )
    records = read_source(source)
    page = render(records, title=title, data_name=beside.name)
    write_json(beside, records.dump())
    return write_text(output, page)


def render(records: Source, *, title: str | None = None, data_name: str = "report.json") -> str:
    """The page as a string. ``data_name`` is what it calls the JSON beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from . import wording

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "number", "fixed", "rank", "percent", "size", "duration", "moment", "plural", "printable"):
        environment.filters[name] = getattr(wording, name)
    environment.filters["svg"] = Markup  # only ever given what figures.py made, which escapes names itself
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    parts = {name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")}
    page = environment.get_template("report.html.j2").render(
        style=parts["report.css"], script=parts["report.js"], **context(records, title, data_name)
    )
    # Lone surrogates, which a JSON file can smuggle in, have no UTF-8 form.
    return page.encode("utf-8", "replace").decode("utf-8")


def context(records: Source, title: str | None, data_name: str) -> dict[str, Any]:
    """Everything the template shows, in its order."""
    from . import exhibits, exhibits_sweep, exports, svg, sweeps, tables
    from .verdict import alerts, budget_state, headline_metric, judged, reached, verdict

    trace, sweep = records.trace, records.sweep
    rows = tables.layer_rows(trace) if trace is not None else []
    trials = sweeps.trial_rows(sweep) if sweep is not None else []
    light, dark = svg.palette()
    shown: dict[str, Any] = {
        "title": title or (sweep.name if sweep is not None else trace.name),
        "subject": "Sweep" if sweep is not None else "Run",
        "created": (sweep or trace).created,
        "light": light,
        "dark": dark,
        "data_name": data_name,
        "verdict": verdict(trace, sweep),
        "alerts": alerts(trace, sweep),
        "trace": trace,
        "control": records.control,
        "sweep": sweep,
        "trials": trials,
        "figures": {"sweep": exhibits_sweep.sweep(sweep, trials)} if sweep is not None else {},
        "layers": rows,
    }
    if trace is not None:
        record = judged(trace)
        shown |= {
            "state": budget_state(trace),
            "reached": reached(trace),
            "even": tables.uniform_rank(trace),
            "judged": record,
            "headline": headline_metric(record, sweep.metric if sweep else None) if record is not None else None,
            "evaluations": _evaluations(records),
            "csv": _data_uri("text/csv", exports.table_csv(rows)),
            "json": _data_uri(
                "application/json", json.dumps(exports.table_records(rows), indent=1, ensure_ascii=False)
            ),
            "pattern": exports.rank_pattern(trace),
            "excluded": exports.excluded(trace),
            "snippet": exports.attach_call(trace),
        }
        shown["figures"] |= {
            "map": exhibits.rank_map(trace),
            "ranks": exhibits.final_ranks(trace, rows),
            "course": exhibits.course(trace),
            "why": exhibits.why(trace),
            "spectra": exhibits.spectra(trace, rows),
            "quality": exhibits.quality(trace, records.control),
        }
    return shown


def _evaluations(records: Source) -> dict[str, Any]:
    """Rows of quality for the run and its control, and the metrics they have between them."""
    from .tables import evaluation_rows

    rows = evaluation_rows(records.trace, "best trial" if records.sweep is not None else "this run")
    if records.control is not None:
        rows += evaluation_rows(records.control, "uniform trial")
    return {
        "rows": rows,
        "metrics": list(dict.fromkeys(name for row in rows for name in row.metrics)),
        "errors": any(row.standard_error is not None for row in rows),
    }


def _data_uri(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8;base64," + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
