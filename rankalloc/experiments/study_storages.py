"""Where a sweep keeps its trials: an SQLite file in its folder, a journal file, or any database that Optuna can use.

    storage                  Optuna's
    None                     SQLite: study.db in the sweep's folder
    journal:PATH             JournalStorage on a file, which several hosts may share
    dialect://user@host/db   RDBStorage, for every URL that SQLAlchemy knows

A storage with a prefix of its own is one class and one line in :data:`STORAGES`; everything else is a URL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import optuna
from optuna.storages.journal import JournalFileBackend

from .run_folder import STUDY_NAME, SweepFolder


class StudyStorage(ABC):
    """One kind of storage, chosen by the prefix of the text that names it."""

    @abstractmethod
    def open(self, name: str) -> str | optuna.storages.BaseStorage:
        """What ``optuna.create_study`` takes as its storage."""

    def shown(self, name: str) -> str:
        """The name as records show it: without a password."""
        return name


class Journal(StudyStorage):
    """``journal:PATH``."""

    def open(self, name: str) -> optuna.storages.BaseStorage:
        return optuna.storages.JournalStorage(JournalFileBackend(name.removeprefix("journal:")))


class Database(StudyStorage):
    """A URL as SQLAlchemy reads it."""

    def open(self, name: str) -> str:
        return name

    def shown(self, name: str) -> str:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            return make_url(name).render_as_string(hide_password=True)
        except ArgumentError:
            return "the given storage"


STORAGES: dict[str, StudyStorage] = {"journal:": Journal()}
"""{prefix: storage}."""


def opened(name: str | None, folder: SweepFolder) -> str | optuna.storages.BaseStorage:
    """The storage of this name, for ``optuna.create_study``."""
    name = name or f"sqlite:///{folder.study.absolute()}"
    return _storage_of(name).open(name)


def shown(name: str | None) -> str:
    """The storage as records name it: without a password."""
    return STUDY_NAME if name is None else _storage_of(name).shown(name)


def _storage_of(name: str) -> StudyStorage:
    return next((storage for prefix, storage in STORAGES.items() if name.startswith(prefix)), Database())
