"""The command line's root and its commands ``train``, ``sweep``, ``report``, ``env`` and ``build-kernel``.

Nothing heavy is imported here, so ``--help`` stays fast.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import ConfigError
from . import audits, checking, composing, conversions, listings, posthoc_commands, refining
from .endings import CleanEndings
from .options import For, Json, examples

Config = typer.Argument(metavar="CONFIG.yaml", help="What to run. Keys it leaves out have defaults.")
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one value, such as budget.ranks=96. Repeatable."),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to. [default: runs/NAME]")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show what would be done, and write nothing.")
]

app = typer.Typer(
    name="rankalloc",
    cls=CleanEndings,
    help="Decide where a fine-tuning rank budget goes, show whether it helped, ship plain LoRA.",
    epilog=examples(
        "rankalloc train --set training.steps=20      try it: a small model, real data, 20 steps",
        "rankalloc train --dry-run                    the layers and the budget, without training",
        "rankalloc sweep demo.yaml --trials 8         search rank, alpha, budget and learning rate",
        "rankalloc ls methods                         the methods to choose from",
    )
    + "\n\n\b\nExit codes: 0 ok, 1 failed, 2 usage, 3 nothing feasible or completed, 130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rankalloc {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="RANKALLOC_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # A character that the terminal's encoding lacks is printed as an escape instead of ending the command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command(
    epilog=examples(
        "rankalloc train                                        punctuation on all-MiniLM-L6-v2",
        "rankalloc train my.yaml --set seed=1 --output runs/one",
        "rankalloc train --set method=uniform --set budget.ranks=96",
        "rankalloc train my.yaml --dry-run",
        "rankalloc train my.yaml --resume                       continue from the last checkpoint",
    )
)
def train(
    config: Annotated[str | None, Config] = None,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the last checkpoint (training.save_every writes them), if unfinished."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
    reader: For = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train one run under its rank budget.

    Writes the adapter as plain LoRA, the trace, the resolved configuration and report.html.
    """
    from .request import Request
    from .runs import run_train

    settings = [*(overrides or []), *([] if reader is None else [f"reader={reader}"])]
    request = Request("train", config, settings, output, dry_run=dry_run, as_json=as_json)
    run_train(request, resume=resume, overwrite=overwrite)


@app.command(
    epilog=examples(
        "rankalloc sweep demo.yaml",
        "rankalloc sweep --model ./model --data reviews.csv --text-column review --label-column stars",
        "rankalloc sweep demo.yaml --trials 8 --output runs/search",
        "rankalloc sweep demo.yaml --set 'sweep.search.rank=[4, 8]'",
        "rankalloc sweep demo.yaml --jobs 2                       two trials at a time",
        "rankalloc sweep demo.yaml --storage postgresql+psycopg://me@host/db",
        "rankalloc sweep --worker postgresql+psycopg://me@host/db      one more worker, on any machine",
        "rankalloc sweep --status runs/demo                       how far it is",
        "rankalloc sweep demo.yaml --dry-run",
    )
)
def sweep(
    config: Annotated[str | None, Config] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, max=9999, metavar="N", help="Finished trials in all, earlier ones included."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", metavar="URL", help="Optuna storage, or journal:PATH. [default: SQLite in the output folder]"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="Processes that train at a time.")] = 1,
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="URL", help="Train trials of the sweep in this storage; needs no CONFIG."),
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", metavar="NAME", help="The worker's sweep, where its storage has several.")
    ] = None,
    share_runs: Annotated[
        bool, typer.Option("--share-runs", help="One run at the largest budget answers all: it is cut to the others.")
    ] = False,
    status: Annotated[
        str | None,
        typer.Option("--status", metavar="URL", help="Show how far the sweep in this storage, or folder, is."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="The base model: a folder or hub id. Needs no CONFIG.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Your data: a file, a folder, or a set on the hub.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="K", help="What --data is for. [default: text-classification]")
    ] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", metavar="T", help="Column of --data.")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", metavar="L", help="Column of --data.")] = None,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
    output: Output = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Search rank, alpha, budget and learning rate with Optuna.

    Poor trials are stopped early, and the best few are trained again with fresh seeds before a winner is named. An
    existing study is continued until it has N finished trials, those of all workers together. SIGTERM stops it with a
    checkpoint, and the next worker goes on from there.
    """
    from .request import Request, settings_of
    from .runs import run_sweep
    from .workers import run_worker, show_status

    quick = {"--share-runs": share_runs, "--model": model, "--data": data, "--kind": kind, "--text-column": text_column,
             "--label-column": label_column}
    given = {"CONFIG": config, "--set": overrides, "--trials": trials, "--storage": storage, "--dry-run": dry_run,
             "--jobs": jobs > 1, **quick}
    if status is not None:
        given |= {"--worker": worker, "--output": output}
        return show_status(status, study, as_json, [name for name, value in given.items() if value])
    if worker is not None:
        given["--json"] = as_json
        return run_worker(worker, study, output, parent, [name for name, value in given.items() if value])
    if study is not None:
        raise ConfigError(
            "--study names the sweep of a --worker or --status; a sweep of your own has the configuration's name"
        )
    if config is None and model is None and data is None:
        raise ConfigError(
            "give a configuration to sweep, or --model and --data, or --worker URL to join a sweep"
        )

    settings = [
        *settings_of(model, data, kind, text_column, label_column), *(overrides or []),
        *(["sweep.share_runs=true"] if share_runs else []),
    ]  # fmt: skip
    request = Request(
        "sweep", config, settings, output, dry_run=dry_run, as_json=as_json, trials=trials, storage=storage, jobs=jobs
    )
    run_sweep(request)


@app.command(
    epilog=examples(
        "rankalloc report runs/run",
        "rankalloc report runs/search --title 'Rank search' -o search.html",
        "rankalloc report runs/a --compare runs/b -o a-b.html    where their ranks differ",
        "rankalloc report runs/run --format md                   for a pull request, on stdout",
        "rankalloc report runs/run --figures figures/            each figure as PDF, SVG and PNG; no page",
    )
)
def report(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder of a run, a sweep or a shrunk adapter, or one of its files."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE",
            help="The file to write. [default: report.html in SOURCE; stdout for md and json]",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", metavar="T", help="The report's title.")] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="OTHER", help="A second source, to set beside the first.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="F", help="html, md or json. [default: FILE's ending]")
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option("--figures", metavar="DIR", help="Write every figure here, sized for papers; no page without -o."),
    ] = None,
) -> None:
    """Write the rank report of a run, a sweep or a finished adapter, or of two of them side by side."""
    from .reporting import report_on

    report_on(source, output, title, compare, form, figures)


@app.command(epilog=examples("rankalloc env", "rankalloc env --json"))
def env(as_json: Json = False) -> None:
    """Show versions, device, threads, and whether the example model and data are installed."""
    listings.show_environment(as_json)


@app.command("build-kernel", epilog=examples("rankalloc build-kernel", "rankalloc build-kernel --force"))
def build_kernel(
    force: Annotated[bool, typer.Option("--force", help="Build it again even if it is built already.")] = False,
) -> None:
    """Build the compiled kernel: faster training steps on this CPU in float32.

    Needs g++ and takes half a minute, once for each version of torch; every run uses it from then on unless
    RANKALLOC_NATIVE=0.
    """
    from .kernel import build

    build(force)


for _commands in (audits, checking, listings, conversions, posthoc_commands, composing, refining):
    _commands.register(app)


def main() -> None:
    """The entry point of ``rankalloc``."""
    # when it is imported, a line on kernels it could fetch; then one a product, on the casts that eight bits make
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app(prog_name="rankalloc")
