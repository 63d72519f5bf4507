"""The study behind an audit: Optuna's storage keeps its runs, so that any machine can make them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ...audit_record import AuditRecord
from ...errors import ConfigError, RankallocError
from ..config import RunConfig
from ..run_folder import AuditFolder
from ..sweeps import storages
from ..sweeps.slots import Slots, slot_of
from ..sweeps.study import (
    CONFIG,
    IDENTITY,
    KIND,
    SweepSpaceError,
    connected,
    differences,
    join_study,
    require_own,
    require_same,
)
from .cells import Cell, Result
from .running import Audit

ALL = 1_000_000
"""More slots than an audit has."""
_AUDIT, _PLAN, _CHANGED = "audit", "plan", "plan changed"
_WHEN = ("looks", "margin", "open_ended", "seeds_at_most")  # settings that say when to stop, and not what is trained


def open_audit(audit: Audit, storage: str | None) -> Slots:
    """The slots of the study in the storage, ready to continue, or of a new one.

    Raises:
        SweepSpaceError: the study there was begun with other settings.
        RankallocError: the storage cannot be opened.
    """
    config = audit.config
    begun(audit, storage)
    audit.folder.path.mkdir(parents=True, exist_ok=True)
    slots = connected(
        located(storage, audit), f"{audit.storage} of {audit.folder.path}",
        lambda kept: optuna.create_study(
            study_name=config.name, storage=kept, load_if_exists=True, direction=audit.setting.prepared.direction
        ),
    )
    with slots.guard:
        require_same(slots.study, _identity(audit), _AUDIT)
        slots.study.set_user_attr(CONFIG, config.replaced({"output": None}).model_dump(mode="json"))
        slots.study.set_user_attr(KIND, _AUDIT)
        plan = _plan_of(audit)
        before = slots.study.user_attrs.setdefault(_PLAN, plan)
        if before == plan or not any(cell.phase == "seed" for cell in results_of(slots)):
            slots.study.set_user_attr(_PLAN, plan)
        else:
            slots.study.set_user_attr(_CHANGED, True)
    return slots


class _NotBegunError(RankallocError):
    """A storage has no study of this name."""


def begun(audit: Audit, storage: str | None) -> Slots | None:
    """The slots of the audit in the storage; None where it was not begun. Nothing is written.

    Raises:
        SweepSpaceError: the audit there was begun with other settings, or the folder is another audit's.
        RankallocError: the storage cannot be opened, or the folder's record is damaged and its study not there.
    """
    place, name = located(storage, audit), audit.config.name
    if not storages.exists(place):
        _require_no_other(audit)
        return None

    def load(kept: BaseStorage) -> optuna.Study:
        if storage is None:
            require_own(kept, name, _AUDIT, audit.folder.path)
        if name not in {study.study_name for study in kept.get_all_studies()}:
            raise _NotBegunError
        return optuna.load_study(study_name=name, storage=kept)

    try:
        slots = connected(place, f"{audit.storage} of {audit.folder.path}", load)
    except _NotBegunError:
        _require_no_other(audit)
        return None
    if slots.study.user_attrs.get(IDENTITY) is not None:
        require_same(slots.study, _identity(audit), _AUDIT)
    return slots


def changes_plan(slots: Slots, audit: Audit) -> bool:
    """Whether the audit goes on with another plan after seeds have been seen."""
    before = slots.study.user_attrs.get(_PLAN)
    seen = any(cell.phase == "seed" for cell in results_of(slots))
    return bool(slots.study.user_attrs.get(_CHANGED)) or (seen and before not in (None, _plan_of(audit)))


def _plan_of(audit: Audit) -> dict[str, Any]:
    return json.loads(json.dumps(audit.config.audit.model_dump(mode="json", include=set(_WHEN))))


def _require_no_other(audit: Audit) -> None:
    """Refuse to write over the record of another audit, whose study is somewhere else.

    Raises:
        SweepSpaceError: the record is of an audit with other settings.
        RankallocError: it is damaged, so that nobody knows.
    """
    path = audit.folder.record
    if not path.is_file():
        return
    try:
        record = AuditRecord.load(path)
    except RankallocError as error:
        raise RankallocError(f"{error}; its study is not there, so give --output another folder") from None
    then = _identity_of(record.config, record.data_fingerprint, record.params)
    changes = list(differences(then, json.loads(json.dumps(_identity(audit)))))
    if changes:
        raise SweepSpaceError(
            f"{path} is of an audit with other settings: {'; '.join(changes[:4])}; give --output another folder"
        )


def changed_plan(slots: Slots) -> dict[str, Any] | None:
    """The plan that an audit began with, when looks or margin were changed after a seed had been seen."""
    attrs = slots.study.user_attrs
    return attrs[_PLAN] if attrs.get(_CHANGED) else None


def join_audit(storage: str, name: str | None) -> tuple[Slots, RunConfig]:
    """An audit's study that another process has opened, by its storage or its folder, and its configuration; raises as
    :func:`rankalloc.experiments.sweeps.study.join_study`."""
    folder = AuditFolder(Path(storage))  # which stands for the SQLite file in it
    if folder.study.is_file():
        storage = f"sqlite:///{folder.study.absolute()}"
    elif "://" not in storage and not storage.startswith(tuple(storages.STORAGES)):
        raise ConfigError(
            f"no audit at {storage}; give an audit's folder, journal:PATH, grpc:HOST:PORT or the URL of a database"
        )
    slots, config, _ = join_study(storage, name, _AUDIT)
    return slots, config


def located(storage: str | None, audit: Audit) -> str:
    """The storage's full name: SQLite in the audit's folder where none is given."""
    return storage or f"sqlite:///{audit.folder.study.absolute()}"


def shown(storage: str | None) -> str:
    """The storage as records name it: without a password."""
    return "audit.db" if storage is None else storages.shown(storage)


def results_of(slots: Slots) -> dict[Cell, Result]:
    """What has come out of the runs so far."""
    found = {}
    for slot, trial in slots.all().items():
        if trial.state == TrialState.COMPLETE:
            found[Cell.of_slot(slot)] = Result(trial.user_attrs)
        elif trial.state in (TrialState.FAIL, TrialState.PRUNED) and "message" in trial.user_attrs:
            found[Cell.of_slot(slot)] = Result(trial.user_attrs, trial.user_attrs["message"])
    return found


def cell_of(trial: FrozenTrial | optuna.Trial) -> Cell:
    """The cell that a trial stands for."""
    return Cell.of_slot(slot_of(trial))


def matters(trial: FrozenTrial) -> bool:
    """Whether an audit cannot do without the arm of a trial: the method's, and uniform LoRA's."""
    return cell_of(trial).arm < 2


def _identity(audit: Audit) -> dict[str, Any]:
    """What must not change between the runs of one audit. Looks, margin and the number of seeds may: they say when to
    stop, and not what is trained."""
    return _identity_of(audit.config.model_dump(mode="json"), audit.setting.prepared.fingerprint, audit.setting.params)


def _identity_of(config: Mapping[str, Any], fingerprint: str | None, params: int) -> dict[str, Any]:
    """The same of a configuration as a record has it."""
    tree = {key: value for key, value in config.items() if key not in ("name", "output", "sweep", "tracking")}
    if isinstance(tree["task"], dict):  # files may move; the fingerprint shows whether the data changed
        tree["task"] = {k: v for k, v in tree["task"].items() if k not in ("train", "tune", "report")}
    tree["audit"] = {key: value for key, value in tree.get("audit", {}).items() if key not in _WHEN}
    return {"data": fingerprint, "params": params, **tree}
