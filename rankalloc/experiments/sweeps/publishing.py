"""What a sweep leaves in its own study, so that optuna-dashboard shows it: with every trial its rank map and ranks.csv,
with the study the best trial's, the report, and the verdict as a note.

Artifacts are files in the sweep's folder (``optuna-dashboard STORAGE --artifact-dir FOLDER/artifacts``). A study's are
replaced when they are published again; a trial's are written before it ends, since Optuna changes no trial after that.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from ...trace import RankTrace, SweepRecord
from ..run_folder import SweepFolder
from . import storages
from .study import join_study

VERDICT = "verdict"
"""The study's user attribute that holds the verdict as text."""


def publish_trial(folder: SweepFolder, trial: optuna.Trial, trace: RankTrace) -> None:
    """Put the rank map and the ranks of a trial's run beside the trial, which has not ended yet."""
    for name, content in _files_of(trace).items():
        _put(_store(folder), trial.storage, trial, name, content)


def publish(folder: Path, storage: str | None, record: SweepRecord) -> None:
    """Put note and artifacts of a concluded sweep into its study.

    Args:
        folder: the sweep's, with the report where there is one.
        storage: as for :func:`rankalloc.experiments.sweeps.sweep.run_sweep`.
        record: the sweep's.
    """
    from ...report.verdict import verdict

    place = SweepFolder(folder)
    slots, _, _ = join_study(storages.located(storage, place), record.name)
    store, study, found = _store(place), slots.study, verdict(None, record)
    study.set_user_attr(VERDICT, found.sentence)
    with contextlib.suppress(ImportError):
        # which alone knows how its notes are kept
        from optuna_dashboard import save_note

        save_note(study, "\n\n".join([f"**{found.sentence}**", *found.notes]))
    files = {} if record.best is None else _files_of(RankTrace.load(place.trial(record.best).trace))
    if place.report.is_file():
        files[place.report.name] = place.report.read_bytes()
    for name, content in files.items():
        _put(store, slots.storage, study, name, content)


def _store(folder: SweepFolder) -> FileSystemArtifactStore:
    folder.artifacts.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(str(folder.artifacts))


def _files_of(trace: RankTrace) -> dict[str, bytes]:
    from ...report.exports import table_csv
    from ...report.facts import Facts
    from ...report.figures import rank_map_png

    facts = Facts(trace)
    return {"rank-map.png": rank_map_png(facts.rank_map), "ranks.csv": table_csv(facts.layers).encode("utf-8")}


def _put(store: FileSystemArtifactStore, storage: Any, owner: Any, name: str, content: bytes) -> None:
    """Upload a file, or write it in the place of the artifact of that name."""
    known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(owner, storage=storage)}
    if name in known:
        store.write(known[name], io.BytesIO(content))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=owner, storage=storage)
