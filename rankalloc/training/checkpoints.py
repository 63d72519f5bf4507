"""The Trainer's checkpoints: the rank state in them, whether one is whole, and the best one at the end of a run.

A run goes on bit for bit only from a checkpoint that has all of

    model.safetensors                  the exact weights that training changes (:mod:`rankalloc.storage.trained_state`)
    optimizer.pt, scheduler.pt         the Trainer's
    rng_state*.pth, trainer_state.json
    rankalloc_state.safetensors        the rank state: schedule, scores, the trace so far

The Trainer goes on without most of them in silence, to another result. So a checkpoint that lacks one, or holds part of
one, is refused by the file's name, and the one before it is offered.

Cost: the ends and headers of a few files are read. Weakness: a file of the right length with wrong bytes passes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from ..errors import AdapterFileError, RankallocError
from ..storage.folder import CONFIG_NAME, WEIGHTS_NAME
from ..storage.tensors import read_header, read_tensors, write_tensors
from ..storage.trained_state import STATE_NAME as EXACT_NAME
from . import resuming
from .controller import RankController

STATE_NAME = "rankalloc_state.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_TRAINER = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_INDEX_NAME = "model.safetensors.index.json"


def checkpoints_in(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in ``folder``, the latest one first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def resumed_from(given: Any, args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that the Trainer has just loaded.

    Args:
        given: what the user said it is; None for nothing.
    """
    usual = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
    for path in (given, _given_to_train(), args.resume_from_checkpoint):
        if isinstance(path, (str, os.PathLike)) and Path(path).is_dir():
            return Path(path)
    return usual


def _given_to_train() -> Any:
    """What ``trainer.train(resume_from_checkpoint=...)`` was called with. No callback is told, so it is read from the
    training loop that is calling; None where that is not found."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_inner_training_loop":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("resume_from_checkpoint")


def require_whole(folder: Path, rank_state: bool = True) -> None:
    """Make sure that a run which is resumed from this checkpoint goes on as if it had not stopped.

    Args:
        rank_state: whether a RankCallback wrote its state there.

    Raises:
        AdapterFileError: a file is missing or damaged.
    """
    if fault := fault_of(folder, rank_state):
        raise AdapterFileError(
            f"cannot resume from {folder}: {fault}, so the run could not go on as it was; "
            + _way_out(folder, rank_state)
        )


def fault_of(folder: Path, rank_state: bool = True) -> str | None:
    """The first file that is missing or damaged, and which of it; None for a whole checkpoint."""
    for name in _needed(folder, rank_state):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if not _is_readable(folder / name):
            return f"{name} is damaged or truncated"
    return None


def _needed(folder: Path, rank_state: bool) -> Iterator[str]:
    yield from _OF_TRAINER
    yield from sorted(path.name for path in folder.glob("rng_state*.pth")) or ["rng_state.pth"]
    yield from sorted(path.name for path in folder.glob("scaler.pt"))
    pair = (CONFIG_NAME, WEIGHTS_NAME)
    if any((folder / name).exists() for name in pair):
        yield from pair
    if (folder / _INDEX_NAME).exists():  # a large model, as 0.1 saved it
        yield _INDEX_NAME
        yield from _shards(folder / _INDEX_NAME)
    elif not _is_of_peft(folder):
        yield EXACT_NAME
    if rank_state:
        yield STATE_NAME


def _is_of_peft(folder: Path) -> bool:
    """Whether a PeftModel wrote its adapter here, whose weights are exact as they are."""
    try:
        return not (folder / EXACT_NAME).exists() and "rankalloc_config" not in read_header(
            folder / WEIGHTS_NAME
        ).metadata
    except AdapterFileError:
        return False


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # the index itself is not readable, which is told


def _is_readable(path: Path) -> bool:
    """Whether the file begins and ends as its format has to."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            read_header(path)
        else:  # torch.save writes a zip file, whose directory is at its end
            zipfile.ZipFile(path).close()
    except (AdapterFileError, ValueError, OSError, zipfile.BadZipFile):
        return False
    return True


def _way_out(folder: Path, rank_state: bool) -> str:
    match = _NAME.fullmatch(folder.name)
    earlier = checkpoints_in(folder.parent) if match else []
    before = [path for path in earlier if int(path.name.split("-")[1]) < int(match[1])] if match else []
    whole = next((path for path in before if fault_of(path, rank_state) is None), None)
    if whole is None:
        return "there is no earlier checkpoint that is whole, so begin again"
    return f"{whole.name}, before it, is whole: resume from that one, or remove {folder.name} so that it is the last"


def save_state(controller: RankController, path: str | os.PathLike) -> None:
    """Write a controller's state as one safetensors file, whole or not at all."""
    state = controller.state_dict()
    write_tensors(path, state["tensors"], {"rankalloc": state["meta"]})


def load_state(controller: RankController, path: str | os.PathLike) -> None:
    """Read what :func:`save_state` wrote.

    Raises:
        AdapterFileError: the file is missing or damaged.
        RankallocError: it is of another run.
    """
    controller.load_state_dict(read_state(path))


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """The state in a file, as :meth:`RankController.load_state_dict` takes it; raises as :func:`load_state` does."""
    path = Path(path)
    if not path.parent.is_dir():
        raise AdapterFileError(
            f"cannot resume: no rank state at {path}; pass RankCallback(..., resume_from=<the checkpoint's folder>)"
        )
    if not path.is_file():
        raise AdapterFileError(
            f"cannot resume: no rank state at {path}, which a RankCallback writes; {_way_out(path.parent, True)}"
        )
    try:
        tensors, metadata = read_tensors(path)
    except AdapterFileError as error:
        raise AdapterFileError(f"cannot resume: {error}; {_way_out(path.parent, True)}") from None
    meta = metadata.get("rankalloc")
    if meta is None:
        raise RankallocError(f"cannot resume: {path} was not written by rankalloc")
    return {"tensors": tensors, "meta": meta}


def optimizer_at_end(
    controller: RankController, best: str | os.PathLike | None, optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer | None:
    """What :meth:`RankController.finish` is to take for the optimizer when the Trainer may have loaded the best model.

    A run that stopped before its freeze is cut to its budget at the end. If the weights then are those of an earlier
    checkpoint, its scores belong to them, and the optimizer's state does not: nothing will be trained any more, so an
    optimizer without memory takes its place.

    Args:
        best: the checkpoint that was loaded; None for none.

    Raises:
        AdapterFileError: the rank state of that checkpoint is missing or damaged.
    """
    if best is None or controller.frozen:
        return optimizer
    saved = read_state(Path(best) / STATE_NAME)
    if not resuming.adopt_scores(controller.state, saved):
        return optimizer  # the Trainer found no weights to load, and said so
    return torch.optim.SGD(controller.adapters.parameters(), lr=0.0)
