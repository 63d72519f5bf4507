"""Tensors on disk as safetensors: written whole or not at all, and the same bytes for the same content.

Reading and writing go tensor by tensor, so a file of any size takes the memory of its largest tensor. Every other
module reads safetensors files through this one:

    read_header    shapes and metadata alone, for listing files
    read_tensor    one tensor, and the file is closed again
    TensorFile     a file that stays open while its tensors are asked for one after another
    read_tensors   everything at once
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError
from ..files import replacing

# by their names in the header; the library lays tensors out in the reverse of this order
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {name: position for position, name in enumerate(_DTYPES)}
_MAPPED = 48 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)


def stream(
    specs: Mapping[str, Spec], metadata: Mapping[str, str], tensor: Callable[[str], torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """Yield the parts of a safetensors file in order, with one tensor in memory at a time.

    The library writes metadata in an order that changes from run to run and wants all tensors at once. This function
    sorts the metadata, so equal content gives equal bytes, and asks for each tensor when its turn comes.

    Args:
        tensor: returns the tensor of a key, which must fit its spec. Keys come sorted by name within a dtype.
    """
    keys = sorted(specs, key=lambda key: (-_ORDER[_NAMES[specs[key].dtype]], key))
    header: dict = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key in keys:
        shape, dtype = specs[key].shape, specs[key].dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in keys:
        value = tensor(key).detach().cpu().contiguous()
        if Spec.of(value) != specs[key]:
            raise ValueError(f"{key} was announced as {specs[key]} and is {Spec.of(value)}")
        if value.numel():
            yield memoryview(value.reshape(-1).view(torch.uint8).numpy().data)


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file as bytes."""
    return b"".join(stream({key: Spec.of(value) for key, value in tensors.items()}, metadata, tensors.__getitem__))


def write_stream(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], tensor: Callable[[str], torch.Tensor]
) -> None:
    """Write the parts of :func:`stream` to ``path`` one by one. For use inside ``replacing``."""
    with open(path, "wb") as file:
        for part in stream(specs, metadata, tensor):
            file.write(part)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file. Raises RankallocError when it cannot be written; the old file then stays."""
    with replacing(path) as temporary:
        write_stream(
            temporary, {key: Spec.of(value) for key, value in tensors.items()}, metadata, tensors.__getitem__
        )


@contextmanager
def _damage_named(path: str | os.PathLike) -> Iterator[None]:
    """Turn the library's errors into AdapterFileError with the file's path."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged or truncated ({error})") from None


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: {key: shape}, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike) -> Header:
    """Read shapes and metadata, in any number format. Raises AdapterFileError when the file is damaged."""
    with _damage_named(path), safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        return Header(shapes, file.metadata() or {})


def read_tensor(path: str | os.PathLike, key: str) -> torch.Tensor:
    """Read one tensor to the CPU and close the file. Raises AdapterFileError when the file is damaged or lacks it."""
    with _damage_named(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


class TensorFile:
    """One safetensors file that is read tensor by tensor, in little memory and from any thread.

    The library maps the file into memory and keeps every page it read while the file is open. This class reopens the
    file after every 48 MB, because opening it costs less than a millisecond.

    Attributes:
        specs: {key: shape and dtype}, read without the data.
        metadata: the file's metadata.

    Raises:
        AdapterFileError: the file is damaged or truncated, or has a number format that is not supported.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._mapped = 0
        with _damage_named(path):
            self._file = safe_open(self.path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.specs = {key: self._spec(key) for key in self._file.keys()}

    def _spec(self, key: str) -> Spec:
        piece = self._file.get_slice(key)
        name = piece.get_dtype()
        if name not in _DTYPES:
            raise AdapterFileError(f"{self.path} holds {key} as {name}, a number format this version does not read")
        return Spec(tuple(piece.get_shape()), _DTYPES[name])

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor of that key, on the CPU. Raises KeyError when there is none."""
        spec = self.specs[key]
        with self._lock, _damage_named(self.path):
            if self._mapped > _MAPPED:
                self._file, self._mapped = safe_open(self.path, framework="pt"), 0
            self._mapped += torch.Size(spec.shape).numel() * spec.dtype.itemsize
            return self._file.get_tensor(key)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors, to the CPU, and the metadata of a safetensors file.

    Raises:
        AdapterFileError: the file is damaged or truncated.
    """
    file = TensorFile(path)
    return {key: file[key] for key in file.specs}, file.metadata


def refuse_pickles(folder: Path) -> None:
    """Raise AdapterFileError when a folder without a safetensors file holds its weights as a pickle."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise AdapterFileError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; have it "
            "saved again as safetensors"
        )
