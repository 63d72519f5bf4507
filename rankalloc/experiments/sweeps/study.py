"""The Optuna study behind a sweep: opening it, checking that it is the same sweep, and joining one as a worker.

A study says by itself all that a worker has to know: the configuration and the number of trials are its attributes.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from ...errors import ConfigError, RankallocError, first_line, unknown
from ..config import RunConfig
from ..sweep_section import LimitsConfig
from ..tasks.base import PreparedTask
from . import storages
from .goals import directions
from .record import Sweep
from .slots import Slots
from .space import first_points, given_by_trials, search_space

CONFIG, WANTED, KIND, IDENTITY = "config", "trials wanted", "kind", "identity"


class SweepSpaceError(ConfigError):
    """A sweep was resumed with another search space, task or settings than it began with."""


def open_study(sweep: Sweep, storage: str | None, wanted: int) -> Slots:
    """The slots of the study in the storage, ready to continue, or of a new one; ``wanted`` of them are there."""
    folder, config = sweep.folder, sweep.config
    folder.path.mkdir(parents=True, exist_ok=True)
    slots = connected(
        storages.located(storage, folder), f"{sweep.storage} of {folder.path}",
        functools.partial(_own_study, sweep, storage is None),
    )
    with slots.guard:
        require_same(slots.study, _identity(config, sweep.prepared))
        slots.study.set_user_attr(CONFIG, config.replaced({"output": None}).model_dump(mode="json"))
        slots.study.set_user_attr(WANTED, wanted)
    points = first_points(config)[: max(2, wanted - 1)]  # the last trial is the matched control
    slots.fill(wanted, points)
    return slots


def _own_study(sweep: Sweep, in_folder: bool, kept: BaseStorage) -> optuna.Study:
    """The sweep's study in an open storage, or a new one."""
    config = sweep.config
    if in_folder:
        require_own(kept, config.name, "sweep", sweep.folder.path)
    return optuna.create_study(
        study_name=config.name, storage=kept, load_if_exists=True,
        directions=directions(config, sweep.prepared.direction),
    )


def join_study(storage: str, name: str | None, command: str = "sweep") -> tuple[Slots, RunConfig, int]:
    """A study that another process has opened: its slots, its configuration and how many trials are wanted (0 in an
    audit's).

    Args:
        storage: full name of the storage.
        name: of the study; None where the storage has only one.
        command: what makes such studies, "sweep" or "audit".

    Raises:
        ConfigError: there is no such storage or study, there are several studies, or it is another command's.
        RankallocError: the storage cannot be opened.
    """
    def load(kept: BaseStorage) -> optuna.Study:
        names = sorted(study.study_name for study in kept.get_all_studies())
        if not names:
            raise ConfigError(f"{storages.shown(storage)} holds no study; start one there with: rankalloc "
                              f"{command} CONFIG.yaml --storage URL")
        if name is None and len(names) > 1:
            raise ConfigError(f"{storages.shown(storage)} holds {len(names)} studies; name one with --study: "
                              f"{', '.join(names)}")
        if name is not None and name not in names:
            raise ConfigError(unknown("study", name, names))
        return optuna.load_study(study_name=name or names[0], storage=kept)

    file = storages.file_of(storage)
    if file is not None and not Path(file).is_file():  # which opening it would make
        raise ConfigError(f"there is no {command}'s storage at {file}; start one there with: rankalloc {command} "
                          "CONFIG.yaml --storage URL")
    slots = connected(storage, storages.shown(storage), load)
    attrs = slots.study.user_attrs
    if CONFIG not in attrs:
        raise ConfigError(
            f"study {slots.study.study_name!r} was not made by rankalloc {command}: it has no configuration"
        )
    kind = attrs.get(KIND, "sweep")
    if kind != command:
        raise ConfigError(f"study {slots.study.study_name!r} is of rankalloc {kind}, not of rankalloc {command}")
    return slots, RunConfig.model_validate(attrs[CONFIG]), attrs.get(WANTED, 0)


def connected(storage: str, shown: str, open: Callable[[BaseStorage], optuna.Study]) -> Slots:
    """The slots of the study that ``open`` finds or makes in a storage; RankallocError where that cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Ctrl-C in the middle of a query: it logs a traceback of its own about the cursor
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    try:
        kept, guard = storages.opened(storage)
        with guard:
            study = open(kept)
    except RankallocError:
        raise
    except Exception as error:  # sqlalchemy and the database drivers have their own exception families
        damaged = any(words in str(error) for words in ("malformed", "not a database"))  # as SQLite has it
        way_out = "; the file is damaged: begin in another folder" if damaged else ""
        raise RankallocError(f"could not open the study in {shown}: {first_line(error)}{way_out}") from error
    return Slots(study, kept, guard)


def require_own(kept: BaseStorage, name: str, what: str, folder: Path) -> None:
    """Raise SweepSpaceError when the folder's own storage is of another sweep or audit, whose runs would be mixed."""
    others = [study.study_name for study in kept.get_all_studies()]
    if others and name not in others:
        raise SweepSpaceError(
            f"{folder} holds the {what} {others[0]!r}, and this one is {name!r}; give --output another folder, or "
            "name it the same to go on with it"
        )


def require_same(study: optuna.Study, identity: dict[str, Any], what: str = "sweep") -> None:
    """Raise SweepSpaceError, with what differs, when the study was begun as another one of what it is."""
    now = json.loads(json.dumps(identity))
    before = study.user_attrs.get(IDENTITY)
    if before is None:
        study.set_user_attr(IDENTITY, now)
        return
    if _SHARE in now:
        before.setdefault(_SHARE, "ranks")  # of which it was a share when nobody said so
    before = {**{name: _BEFORE.get(name, now[name]) for name in now if name.startswith("sweep.")}, **before}
    changes = list(differences(before, now))
    if changes:
        more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise SweepSpaceError(
            f"study {study.study_name!r} was begun with other settings: {'; '.join(changes[:4])}{more}. Resume with "
            f"the same ones, or give the {what} another name or output folder"
        )


_SAME = {"sampler", "goal", "against", "limits", "pruner", "seeds", "share_runs", "processes"}
"""Settings of a sweep that all its trials share."""
_BEFORE: dict[str, Any] = {
    "sweep.goal": "quality", "sweep.pruner": "none", "sweep.seeds": 1, "sweep.against": "params",
    "sweep.limits": LimitsConfig().model_dump(), "sweep.share_runs": False, "sweep.processes": 1,
}
"""What studies did that had no such settings yet."""
_SHARE = "what budget.fraction is a share of"


def _identity(config: RunConfig, prepared: PreparedTask) -> dict[str, Any]:
    """What must not change between the trials of one sweep."""
    tree = config.model_dump(mode="json", exclude={"name", "output", "sweep", "tracking", "method"})
    if isinstance(tree["task"], dict):  # files may move; the fingerprint shows whether the data changed
        tree["task"] = {k: v for k, v in tree["task"].items() if k not in ("train", "tune", "report")}
    space = search_space(config)
    for path in given_by_trials(config):
        part: Any = tree
        *sections, key = path.split(".")
        for section in sections:
            part = part[section]
        part.pop(key, None)
    share = {_SHARE: "parameters"} if config.budget.fraction is not None else {}
    return {
        "search space": space, "data": prepared.fingerprint, **share, **tree,
        **{f"sweep.{name}": value for name, value in config.sweep.model_dump(mode="json", include=_SAME).items()},
    }


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two trees, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {json.dumps(before)} and now is {json.dumps(now)}"
