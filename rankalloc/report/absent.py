"""Why there is nothing to report on at a place, and what to do there, in one sentence."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..audit_record import AUDIT_NAME, AUDIT_STUDY
from ..recognise import ADAPTER, shape_of, what_is
from ..trace import SWEEP_NAME, SWEEP_STUDY

_ADAPTER, _CONFIG = "adapter_config.json", "config.yaml"
_GIVE = "give the folder that a run, a sweep, an audit or a cut was written to, or its JSON file"


def nothing_in(folder: Path, names: Iterable[str]) -> str:
    """Of a folder that has none of the ``names`` of records."""
    for what, there in _begun(folder).items():
        if there:
            way_out = f"go on with {_again(folder, what)}"
            return f"{folder} holds {_AN[what]} that has no record yet, so there is nothing to report on; {way_out}"
    if (folder / _ADAPTER).is_file():
        return f"{folder} holds an adapter and no record of its training; to look at it: {_check(folder)}"
    return f"nothing to report on in {folder}: it has no {', '.join(names)}; {_GIVE}"


def way_out_of(damaged: Path) -> str:
    """What to do about a record that cannot be read; nothing where the file is all there is."""
    what = {AUDIT_NAME: "audit", SWEEP_NAME: "sweep"}.get(damaged.name)
    if what is None or not _begun(damaged.parent)[what]:
        return ""
    return f"; it is written anew by {_again(damaged.parent, what)}"


def no_record(path: Path) -> str | None:
    """Of a file whose name says that it is no record; None of any other."""
    if not path.exists():
        return f"nothing to report on at {path}; {_GIVE}"
    if path.suffix in (".safetensors", ".bin"):
        return f"{path} holds weights and no record; to look at an adapter: {_check(path)}"
    if path.suffix in (".yaml", ".yml", ".html", ".md"):
        what = "a configuration" if path.suffix[1] == "y" else "a page"
        return f"{path} is {what} and not a record; {_GIVE}"
    return None


def unclaimed(data: Any, path: Path) -> str | None:
    """Of JSON that is no record; None where it may be that of a run."""
    if not isinstance(data, dict):
        return f"{path} is no record: it holds {shape_of(data)}, not an object; {_GIVE}"
    what = what_is(data)
    if what == ADAPTER:
        return f"{path} is {what} and not a record; to look at the adapter: {_check(path.parent)}"
    if what is not None:
        return f"{path} is {what}, which no report is made from; {_GIVE}"
    return None if "version" in data else f"{path} is no record that rankalloc wrote; {_GIVE}"


_AN = {"audit": "an audit", "sweep": "a sweep", "train": "a run"}
"""{command: what it makes}."""


def _begun(folder: Path) -> dict[str, bool]:
    """{command: whether what it makes was begun in the folder}."""
    return {
        "audit": (folder / AUDIT_STUDY).is_file(), "sweep": (folder / SWEEP_STUDY).is_file(),
        "train": any(folder.glob("checkpoint-[0-9]*")),
    }  # fmt: skip


def _again(folder: Path, command: str) -> str:
    """The command that goes on with what was begun in the folder."""
    config, flags = folder / _CONFIG, ["--resume"] if command == "train" else []
    if not config.is_file():
        return "the command that began it"
    return shlex.join(["rankalloc", command, str(config), *flags, "--output", str(folder)])


def _check(adapter: Path) -> str:
    return shlex.join(["rankalloc", "check", str(adapter)])
