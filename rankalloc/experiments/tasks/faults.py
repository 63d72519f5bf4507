"""What the ``datasets`` library raises and prints, as one sentence and as nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from ...errors import DataError


@contextlib.contextmanager
def one_sentence(source: str) -> Iterator[None]:
    """What ``datasets`` raises as one DataError."""
    try:
        yield
    except DataError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError,
        datasets.exceptions.DatasetsError,
    ) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        why = " ".join(str(cause or error).split())
        why = why if len(why) < 240 else why[:236] + " ..."
        if Path(source).is_dir():
            raise DataError(f"the data folder {source} cannot be read: {why}") from error
        if Path(source).is_file():
            raise DataError(f"the data file {source} cannot be read: {why}") from error
        raise DataError(
            f"data set {source!r} is no local file or folder and could not be read from the hub; give a path, or go "
            f"online to fetch it once ({why})"
        ) from error


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no log of ``datasets``: what matters is in the error."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
