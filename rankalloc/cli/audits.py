"""``rankalloc audit``: whether adaptive ranks help on the user's own task, and what to do next."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, RankallocError
from .audit_plan import cost_of, show_plan, told_before
from .options import Json, examples
from .output import about, results_only, say, show_json, show_table

if TYPE_CHECKING:
    from ..audit_record import AuditRecord
    from .request import Request


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "rankalloc audit reviews.yaml --dry-run           the arms, and what it will cost",
            "rankalloc audit reviews.yaml --jobs 2",
            "rankalloc audit reviews.yaml --margin 0.005 --set 'audit.arms=[twin, random]'",
            "rankalloc audit reviews.yaml --storage postgresql+psycopg://me@host/db",
            "rankalloc audit --worker postgresql+psycopg://me@host/db      one more worker, on any machine",
        )
    )(audit)


def audit(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="The run to audit: model, task, budget, method.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one value, such as audit.trials=6. Repeatable."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", metavar="URL", help="Optuna storage, or journal:PATH. [default: SQLite in the output folder]"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="Processes that train at a time.")] = 1,
    margin: Annotated[
        float | None,
        typer.Option("--margin", metavar="M", help="What counts as no difference, in units of the metric. [0.002]"),
    ] = None,
    open_ended: Annotated[
        bool, typer.Option("--open-ended", help="Look after every seed (an anytime-valid test), not at fixed numbers.")
    ] = False,
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="URL", help="Make runs of the audit in this storage; needs no CONFIG."),
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", metavar="NAME", help="The worker's audit, where its storage has several.")
    ] = None,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to. [default: runs/NAME-audit]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the arms and what it will cost, and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find out whether adaptive ranks help on your task and budget.

    The method is set beside tuned uniform LoRA and its own controls: all of one size, each tuned by equally many runs,
    compared on paired seeds until the answer is known, by data that no choice has seen. An audit that was stopped goes
    on with the same command.
    """
    from ..experiments.launched import require_alone
    from .request import Request

    require_alone("audit")
    if worker is not None:
        given = {"CONFIG": config, "--set": overrides, "--storage": storage, "--dry-run": dry_run, "--jobs": jobs > 1,
                 "--json": as_json, "--margin": margin is not None, "--open-ended": open_ended}
        return _work(worker, study, output, parent, [name for name, value in given.items() if value])
    if study is not None:
        raise ConfigError("--study names the audit of a --worker; one of your own has the configuration's name")
    if config is None:
        raise ConfigError("give the configuration of the run to audit, or --worker URL to join an audit")
    settings = [
        *(overrides or []), *([] if margin is None else [f"audit.margin={margin}"]),
        *(["audit.open_ended=true"] if open_ended else []),
    ]  # fmt: skip
    request = Request(
        "audit", config, settings, output, dry_run=dry_run, as_json=as_json, storage=storage, jobs=jobs
    )
    _run(request)


def _run(request: Request) -> None:
    from ..experiments.audits.audit import conduct, prepared_audit
    from ..experiments.audits.study import begun
    from ..experiments.preemption import Stop
    from ..experiments.run_folder import content
    from .runs import raise_later, report_in, resumable, training

    config = request.load()
    if config.output is None:
        config = config.replaced({"output": f"{config.folder}-audit"})
    folder = request.folder(config)
    found = content(Path(folder))
    refusal = {"a file": f"{folder} is a file; give --output a folder", "nothing": None, "an audit": None}.get(
        found, f"{folder} holds {found}; give --output another folder for the audit"
    )
    if request.dry_run:
        with results_only():
            planned = prepared_audit(config, Path(folder), request.storage, None)
        return show_plan(planned, request.storage, refusal, request.as_json)
    if refusal:
        raise RankallocError(refusal)

    with resumable(lambda: f"to continue: {request.line()}"), Stop().on_sigterm() as stop, results_only():
        with training():
            planned = prepared_audit(config, Path(folder), request.storage, request.line(whole=False))
            notes, alerts = told_before(planned, begun(planned, request.storage))
            goes_on = "continuing the audit in" if found == "an audit" else f"auditing {config.method} into"
            say(f"{goes_on} {folder}: {cost_of(planned)}")
            for line in [*notes, *(f"alert: {alert}" for alert in alerts)]:
                say(line)
            its_own: list[None] = []
            try:
                record = conduct(
                    planned, request.storage, request.jobs, _Told(), stop, on_begin=lambda: its_own.append(None)
                )
            except BaseException:
                if its_own:  # the page says how far it is, and that it is not over
                    report_in(folder)
                raise
        report, failure = report_in(folder)
    _show(record, folder, report, request.as_json)
    raise_later(failure, folder)


class _Told:
    """Prints a line for each run that has ended, with the time that is left at most."""

    def __init__(self) -> None:
        self._begun, self._first = time.monotonic(), -1

    def __call__(self, line: str, done: int, most: int) -> None:
        if self._first < 0:
            self._first = done - 1
        each = (time.monotonic() - self._begun) / (done - self._first)
        left = f"; at most {about(each * (most - done))} left" if most > done else ""
        say(f"{done}/{most}  {line}{left}")


def _show(record: AuditRecord, folder: str, report: str | None, as_json: bool) -> None:
    from ..report.audited import difference, limits

    if as_json:
        return show_json({**record.model_dump(mode="json"), "folder": folder, "report": report})
    metric = record.metric
    rows = [("answer", record.sentence or "none: no seed could be compared")]
    for one in record.comparisons:
        rows.append((f"over {one.arm}", f"{difference(one.mean, metric, True)} ({limits(one, metric)})  {one.claim}"))
    rows += [("", line) for line in record.details]
    rows += [("alert", line) for line in record.alerts]
    if record.advice:
        rows.append(("next", record.advice))
    if record.command_next:
        rows.append(("command", record.command_next))
    rows.append(("cost", f"{record.steps:,} steps, {about(record.seconds)} of training and evaluation"))
    if report is not None:
        rows.append(("report", report))
    show_table(rows)


def _work(storage: str, study: str | None, output: str | None, parent: int | None, others: Sequence[str]) -> None:
    """Make runs until the audit is over."""
    if others:
        raise ConfigError(
            f"a --worker is told by its storage what to do; leave out {', '.join(others)} (it takes --study and "
            "--output)"
        )
    with results_only():
        from ..experiments.audits.audit import joined, line_of, work
        from ..experiments.audits.progress import most_runs
        from ..experiments.preemption import Preempted, Stop
        from ..experiments.sweeps.jobs import PREEMPTED
        from .endings import INTERRUPTED
        from .runs import training

        with Stop().with_parent(parent).on_sigterm() as stop, training():
            found, slots = joined(storage, study, output)
            told = _Told() if parent is None else None

            def on_trial(trial: Any, done: int) -> None:
                if told is not None:
                    told(line_of(found, trial), done, most_runs(found))

            try:
                work(found, slots, stop, on_trial)
            except Preempted:
                raise typer.Exit(PREEMPTED) from None
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
        if parent is None:
            again = shlex.join(["rankalloc", "audit", "CONFIG.yaml", "--storage", "URL"])
            say(f"every run has been made; {again} concludes the audit")


