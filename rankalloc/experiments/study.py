"""The Optuna study behind a sweep: opening it, checking that it is the same sweep, and retrying lost trials."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import optuna
from optuna.trial import TrialState

from ..errors import ConfigError, RankallocError
from . import study_storages
from .config import RunConfig
from .search_space import PATHS, SAMPLED, first_points, search_space
from .sweep_record import Sweep
from .tasks.base import PreparedTask


class SweepSpaceError(ConfigError):
    """A sweep was resumed with another search space, task or settings than it began with."""


def open_study(sweep: Sweep, storage: str | None, wanted: int) -> optuna.Study:
    """The study in the storage, ready to continue, or a new one with its first points queued."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder, config = sweep.folder, sweep.config
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name=config.name, storage=study_storages.opened(storage, folder), direction=sweep.prepared.direction,
            load_if_exists=True,
        )
    except Exception as error:  # sqlalchemy and the database drivers have their own exception families
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankallocError(f"could not open the study in {sweep.storage} of {folder.path}: {reason}") from error
    _check_same_sweep(study, config, sweep.prepared)
    _take_up_orphans(study)
    if not study.get_trials(deepcopy=False):
        for params, role in first_points(config)[: max(2, wanted - 1)]:  # the last trial is the matched control
            study.enqueue_trial(params, user_attrs={"role": role})
    return study


def _check_same_sweep(study: optuna.Study, config: RunConfig, prepared: PreparedTask) -> None:
    now = json.loads(json.dumps(_identity(config, prepared)))
    before = study.user_attrs.get("identity")
    if before is None:
        study.set_user_attr("identity", now)
        return
    if _SHARE in now:
        before.setdefault(_SHARE, "ranks")  # of which it was a share when nobody said so
    changes = list(_differences(before, now))
    if changes:
        more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise SweepSpaceError(
            f"study {study.study_name!r} was begun with other settings: {'; '.join(changes[:4])}{more}. Resume with "
            "the same ones, or give the sweep another name or output folder"
        )


_SHARE = "what budget.fraction is a share of"


def _identity(config: RunConfig, prepared: PreparedTask) -> dict[str, Any]:
    """What must not change between the trials of one sweep."""
    tree = config.model_dump(mode="json", exclude={"name", "output", "sweep", "tracking", "method"})
    if isinstance(tree["task"], dict):  # files may move; the fingerprint shows whether the data changed
        tree["task"] = {k: v for k, v in tree["task"].items() if k not in ("train", "tune", "report")}
    space = search_space(config)
    for name in space.keys() - {"method"}:
        section, key = PATHS[name].split(".")
        del tree[section][key]
    share = {_SHARE: "parameters"} if config.budget.fraction is not None else {}
    return {"search space": space, "data": prepared.fingerprint, **share, **tree}


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {json.dumps(before)} and now is {json.dumps(now)}"


def _take_up_orphans(study: optuna.Study) -> None:
    """Fail the trials that a dead process of this host left running, and queue their points again."""
    host = socket.gethostname()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner, _, pid = trial.user_attrs.get("owner", f"{host}:0").rpartition(":")
        if owner != host or _alive(int(pid)):
            continue
        params = trial.system_attrs.get("fixed_params", trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
        queue_again(study, params, trial.user_attrs)


def owner() -> str:
    """This process, as a trial records it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def queue_again(study: optuna.Study, params: dict[str, Any], attrs: dict[str, Any]) -> None:
    """Queue an interrupted trial's point again, with its role and, for a matched control, its size."""
    kept: dict[str, Any] = {name: attrs[name] for name in ("role", "match_params") if name in attrs}
    study.enqueue_trial(params, user_attrs={"role": SAMPLED} | kept)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid not in (0, os.getpid())
