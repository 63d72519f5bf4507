"""A model's checkpoint on disk: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import AdapterFileError
from ..storage.tensors import read_header, read_tensor, refuse_pickles

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint by name, over all its files.

    A checkpoint knows which file holds which tensor and opens that file for each tensor it is asked for. A
    :class:`~rankalloc.storage.tensors.TensorFile`, in contrast, is one file that stays open. Reopening keeps memory
    low: an open file is mapped into memory, and pages that were read stay there. It costs less than a millisecond.

    Args:
        path: a ``.safetensors`` file, an ``….index.json``, or a folder with ``model.safetensors`` (or its index).

    Attributes:
        folder: where the files are.
        shapes: {key: shape} of every tensor.

    Raises:
        AdapterFileError: there is no checkpoint, it is a pickle, a shard is missing or damaged, or the index does not
            fit its shards.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        promised: dict[str, str] = {}
        for file, keys in _files_of(self.path):
            shapes = read_header(file).shapes
            self.shapes |= shapes
            self._files |= dict.fromkeys(shapes, file)
            promised |= keys
        for key, name in promised.items():
            if self._files.get(key, Path()).name != Path(name).name:
                raise AdapterFileError(f"{self.path}: the index promises {key} in {name}, which does not hold it")
        if not self.shapes:
            raise AdapterFileError(f"{self.path} holds no tensors")

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor of that name, on the CPU. Raises KeyError when there is none."""
        return read_tensor(self._files[key], key)


def _files_of(path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the files of a checkpoint, each with {key: shard} as the index has it."""
    if path.is_dir():
        index, whole = path / _INDEX, path / _WHOLE
        if not index.is_file() and not whole.is_file():
            refuse_pickles(path)
            raise AdapterFileError(f"{path} holds neither {_WHOLE} nor {_INDEX}")
        path = whole if whole.is_file() else index
    if not path.is_file():
        raise AdapterFileError(f"no checkpoint at {path}")
    if path.suffix != ".json":
        yield path, {}
        return
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, dict[str, str]] = {}
        for key, name in places.items():
            by_file.setdefault(name, {})[key] = name
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path} is not the index of a checkpoint ({error or type(error).__name__})") from None
    for name, keys in sorted(by_file.items()):
        # names are data: a shard lies beside its index and nowhere else
        file = path.parent / Path(name).name
        if Path(name).name != name or not file.is_file():
            raise AdapterFileError(f"{path} names the shard {name!r}, which is not beside it")
        yield file, keys
