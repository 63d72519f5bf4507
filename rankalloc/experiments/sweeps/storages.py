"""Where a sweep keeps its trials: an SQLite file in its folder, a journal file, or any database that Optuna can use.

    storage                  Optuna's
    None                     SQLite: study.db in the sweep's folder
    journal:PATH             JournalStorage on a file, which several hosts may share
    grpc:HOST:PORT           GrpcStorageProxy, which stands before a database that thousands of workers share
    dialect://user@host/db   RDBStorage, for every URL that SQLAlchemy knows

A storage with a prefix of its own is one class and one line in :data:`STORAGES`; everything else is a URL.
"""

from __future__ import annotations

import random
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import DBAPIError, IntegrityError

from ...errors import ConfigError, RankallocError, first_line
from ...trace import SweepRecord
from ..run_folder import STUDY_NAME, SweepFolder
from .slots import queue_again

_ATTEMPTS = 5
_REACHED = 10  # seconds for a proxy to answer
_PATIENCE = 60  # seconds that SQLite waits for another process's write
_BEAT = 60  # seconds between two signs of life; a trial that gave none for three of them is lost
_CONNECTIONS: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True, "pool_size": 2}}


def _lost(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue the point of a trial again whose process gave no more signs of life."""
    queue_again(study, trial, trial.system_attrs.get("fixed_params", trial.params))


class StudyStorage(ABC):
    """One kind of storage, chosen by the prefix of the text that names it."""

    @abstractmethod
    def open(self, name: str) -> optuna.storages.BaseStorage:
        """Connect to it."""

    def file(self, name: str) -> str | None:
        """The file that it is kept in; None for a server's."""
        return None

    def guard(self, name: str) -> AbstractContextManager[Any]:
        """A lock for what the storage itself cannot grant to one process alone."""
        return nullcontext()

    def exists(self, name: str) -> bool:
        """Whether anything was kept in it yet; looking makes nothing."""
        file = self.file(name)
        return file is None or Path(file).is_file()

    def shown(self, name: str) -> str:
        """The name as records show it: without a password."""
        return name


class Journal(StudyStorage):
    """``journal:PATH``."""

    def file(self, name: str) -> str:
        return name.removeprefix("journal:")

    def open(self, name: str) -> optuna.storages.BaseStorage:
        return optuna.storages.JournalStorage(JournalFileBackend(self.file(name)))


class Proxy(StudyStorage):
    """``grpc:HOST:PORT``, where Optuna's ``run_grpc_proxy_server`` listens."""

    def open(self, name: str) -> optuna.storages.BaseStorage:
        host, _, port = name.removeprefix("grpc:").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"{name} is no gRPC proxy; write grpc:HOST:PORT, such as grpc:localhost:13000")
        if find_spec("grpc") is None:
            raise ConfigError(f'{name} needs grpcio: pip install "rankalloc[grpc]"')
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        try:
            storage.wait_server_ready(timeout=_REACHED)
        except Exception as error:  # grpc has exceptions of its own
            raise RankallocError(f"no gRPC proxy answers at {host}:{port} within {_REACHED} s") from error
        return storage


class Database(StudyStorage):
    """A URL as SQLAlchemy reads it."""

    def open(self, name: str) -> optuna.storages.BaseStorage:
        if self.file(name) is not None:
            return optuna.storages.get_storage(RDBStorage(name, engine_kwargs={"connect_args": {"timeout": _PATIENCE}}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                name, heartbeat_interval=_BEAT, grace_period=3 * _BEAT,
                heartbeat_stale_trial_callback=_lost, **_CONNECTIONS,
            )
        return optuna.storages.get_storage(storage)

    def guard(self, name: str) -> AbstractContextManager[Any]:
        file = self.file(name)
        return nullcontext() if file is None else FileLock(f"{file}.lock")

    def file(self, name: str) -> str | None:
        from sqlalchemy.engine import make_url

        url = make_url(name)
        return url.database if url.get_backend_name() == "sqlite" and url.database else None

    def exists(self, name: str) -> bool:
        from sqlalchemy import create_engine, inspect

        if self.file(name) is not None:
            return super().exists(name)
        engine = create_engine(name)
        try:
            return inspect(engine).has_table("studies")
        finally:
            engine.dispose()

    def shown(self, name: str) -> str:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            return make_url(name).render_as_string(hide_password=True)
        except ArgumentError:
            return "the given storage"


STORAGES: dict[str, StudyStorage] = {"journal:": Journal(), "grpc:": Proxy()}
"""{prefix: storage}."""


def named(text: str) -> str:
    """The storage that a user means: a sweep's folder stands for the SQLite file in it.

    Raises:
        ConfigError: it is neither a folder nor a storage's name.
    """
    if "://" in text or any(text.startswith(prefix) for prefix in STORAGES):
        return text
    if not (place := SweepFolder(Path(text))).study.is_file():
        if place.record.is_file() and "***" not in (kept := SweepRecord.load(place.record).storage):
            return kept
        raise ConfigError(
            f"no sweep at {text}; give a sweep's folder, journal:PATH, grpc:HOST:PORT or the URL of a database"
        )
    return located(None, SweepFolder(Path(text)))


def located(name: str | None, folder: SweepFolder) -> str:
    """The storage's full name: SQLite in the sweep's folder where none is given."""
    return name or f"sqlite:///{folder.study.absolute()}"


def opened(name: str) -> tuple[optuna.storages.BaseStorage, AbstractContextManager[Any]]:
    """The storage of this name, and the lock that its processes share.

    Several processes that come to an empty database at once all try to make its tables, and all but one fail on what is
    there already: they try again.
    """
    storage = _storage_of(name)
    guard = storage.guard(name)
    for attempt in range(_ATTEMPTS):
        try:
            with guard:
                return storage.open(name), guard
        except DBAPIError as error:
            if attempt == _ATTEMPTS - 1 or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                raise
            time.sleep(0.2 * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable: the last attempt returns or raises")


def file_of(name: str) -> str | None:
    """The file that the storage of this name is kept in; None for a server's, and for a name that is none."""
    from sqlalchemy.exc import ArgumentError

    try:
        return _storage_of(name).file(name)
    except ArgumentError:
        return None


def exists(name: str) -> bool:
    """Whether anything was kept in the storage of this name yet.

    Raises:
        RankallocError: it cannot be reached, or the name is none.
    """
    try:
        return _storage_of(name).exists(name)
    except Exception as error:  # sqlalchemy and the database drivers have their own exception families
        raise RankallocError(f"could not open the storage {shown(name)}: {first_line(error)}") from error


def shown(name: str | None) -> str:
    """The storage as records name it: without a password."""
    return STUDY_NAME if name is None else _storage_of(name).shown(name)


def _storage_of(name: str) -> StudyStorage:
    return next((storage for prefix, storage in STORAGES.items() if name.startswith(prefix)), Database())
