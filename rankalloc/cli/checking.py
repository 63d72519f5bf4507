"""``check``: what an adapter is, what it would keep at less, and who reads it right."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Command, Json, declare
from .output import count, number, results_only, show, show_json, show_table

if TYPE_CHECKING:
    from ..posthoc.checking import Check, CheckedLayer


def check(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folder of a LoRA or of a run, or a .safetensors file.")
    ],
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Look at a finished adapter: ranks, what less would keep, what can go for free, who reads it right.

    Needs no data and no model, and takes seconds. Of several adapters the first is looked at, and how they interfere.
    """
    with results_only():
        from ..posthoc.checking import check as run

        found = run(*adapters)
        if html is not None:
            from ..report.checked import write_check

            write_check(found.record(), html)
    if as_json:
        return show_json(found.record())
    _show(found, adapters[0])
    if html is not None:
        show(f"page     {html}")


def _show(found: Check, given: str) -> None:
    numbers = f"{found.stored:,} numbers ({found.dtype}), {found.bytes:,} bytes"
    heads = sum(found.heads.values())
    effective = sorted(layer.effective for layer in found.layers)
    median = effective[len(effective) // 2] if effective else 0.0
    show_table([
        ("adapter", f"{found.kind}, {count(len(found.layers), 'layer')}"),
        ("base", found.base or "not named"),
        ("size", numbers + (f"; {heads:,} numbers in modules that were trained whole" if heads else "")),
        ("effective", f"rank {effective[0]:.1f} to {effective[-1]:.1f} in its layers, median {median:.1f}"),
        ("for free", _free(found, given)),
        *(("note", alert) for alert in found.alerts),
    ])
    show()
    show_table(_kinds(found.layers), ("kind of layer", "layers", "rank", "used", "effective", "of ‖ΔW‖²"),
               right=range(1, 6))
    if found.keeping:
        show()
        show("what less would keep of the weights (for quality: rankalloc frontier)")
        show_table(
            [(f"{share:.0%} of ‖ΔW‖", f"{params:,}", f"{params / max(found.stored, 1):.0%}",
              shlex.join(["rankalloc", "shrink", given, "--params", str(params), "-o", "small"]))
             for share, params in found.keeping.items()],
            ("keeps", "parameters", "of now", "by"), right=(1, 2),
        )
    if found.readers:
        show()
        show_table([(one.reader, "right" if one.right else "not", _reader_text(one, given)) for one in found.readers],
                   ("reader", "reads it", ""))
    if found.interference:
        show()
        show_table(
            [(pair["first"], pair["second"], f"{pair['layers']:,}", f"{pair['output_overlap']:.3f}",
              f"{pair['input_overlap']:.3f}", f"{pair['alignment']:+.3f}") for pair in found.interference],
            ("adapter", "and", "layers", "overlap of outputs", "of inputs", "alignment"), right=range(2, 6),
        )


def _free(found: Check, given: str) -> str:
    gone = found.stored - found.params
    if not gone:
        return "nothing: every rank is used"
    if not found.params:
        return "all of it: there is no update"
    command = shlex.join(["rankalloc", "shrink", given, "--params", str(found.params), "-o", "small"])
    return f"{gone:,} numbers ({gone / found.stored:.0%}) can go without any loss: {command}"


def _kinds(layers: Sequence[CheckedLayer]) -> list[tuple[str, ...]]:
    """One row per kind of layer."""
    groups: dict[str, list[CheckedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.role, []).append(layer)
    rows: list[tuple[str, ...]] = []
    for role, members in groups.items():
        ranks, used = sorted(layer.rank for layer in members), sorted(layer.used for layer in members)
        effective = sum(layer.effective for layer in members) / len(members)
        rows.append((
            role, f"{len(members):,}", _spread(ranks), _spread(used), f"{effective:.1f}",
            f"{sum(layer.share for layer in members):.1%}",
        ))
    return rows


def _spread(ranks: Sequence[int]) -> str:
    return number(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"


def _reader_text(one: object, given: str) -> str:
    right, why, mend, flags = (getattr(one, name) for name in ("right", "why", "mend", "flags"))
    way_out = f": rankalloc export {shlex.quote(given)} {mend} -o OUT" if mend else ""
    return "; ".join(part for part in (flags if right else "", why + way_out) if part)


COMMANDS: dict[str, Command] = {
    "check": (
        check,
        "rankalloc check adapter/",
        "rankalloc check adapter/ --html adapter.html",
        "rankalloc check style/ task/                 how they interfere",
        "rankalloc check lora.safetensors --json",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the commands of this file to ``app``."""
    declare(app, COMMANDS)
