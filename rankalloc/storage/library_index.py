"""A folder of adapters: their names, versions and fingerprints. Names are data, and none leads out of the folder.

    folder/NAME/adapter_config.json, adapter_model.safetensors              one version, called ""
    folder/NAME/VERSION/adapter_config.json, adapter_model.safetensors      several; the last (9 < 10) is current
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import AdapterFileError, unknown
from ..layer_names import natural_key
from . import fingerprint
from .folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from .tensors import read_header

_CHUNK = 1 << 20


@dataclass(frozen=True)
class AdapterVersion:
    """One adapter of a library, known from the header of its file alone.

    Attributes:
        name, version: the names of its folders; ``version`` is "" for an adapter with a single version.
        path: the adapter's folder.
        stamp: (modification time in ns, bytes) of the weights file; they change when the file is replaced.
        shapes: {key without PEFT's prefix: shape} of its tensors.
        metadata: of the file.
    """

    name: str
    version: str
    path: Path
    stamp: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def reference(self) -> str:
        """ "name", or "name@version"."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def params(self) -> int:
        """Numbers in the file, zero padding and heads included."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def layers(self) -> set[str]:
        """Names of the adapted modules."""
        matches = (re.fullmatch(r"(.+)\.lora_(?:embedding_)?A(?:\.weight)?", key) for key in self.shapes)
        return {match[1] for match in matches if match}

    @property
    def heads(self) -> set[str]:
        """Names of the modules that were trained whole."""
        return {key.rsplit(".", 1)[0] for key in self.shapes if ".lora_" not in key}

    @cached_property
    def base(self) -> fingerprint.Fingerprint | None:
        """The base that it was made for; None when the file names none."""
        return fingerprint.named_in(self.metadata, self.path / WEIGHTS_NAME)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of its weights file: equal for equal files."""
        digest = hashlib.sha256()
        with open(self.path / WEIGHTS_NAME, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()[:16]


def scan(folder: str | os.PathLike) -> dict[str, list[AdapterVersion]]:
    """{name: versions, the current one last} of every adapter in ``folder``, names in natural order.

    Raises:
        AdapterFileError: there is no such folder, or an adapter in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterFileError(f"no adapter library at {folder}")
    found: dict[str, list[AdapterVersion]] = {}
    for path in _inside(folder):
        if (path / CONFIG_NAME).is_file():
            found[path.name] = [_read(path.name, "", path)]
            continue
        versions = [_read(path.name, sub.name, sub) for sub in _inside(path) if (sub / CONFIG_NAME).is_file()]
        if versions:
            found[path.name] = versions
    return found


def find(folder: str | os.PathLike, reference: str) -> AdapterVersion:
    """The adapter of that reference, "name" or "name@version".

    Raises:
        AdapterFileError: there is no such adapter, it is damaged, or it is outside of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterFileError(f"no adapter library at {folder}")
    if not isinstance(reference, str):
        raise AdapterFileError(f"the name of an adapter must be text, got {reference!r}")
    names = [path.name for path in _inside(folder)]
    name, version = reference, ""
    if name not in names and "@" in reference:
        name, _, version = reference.rpartition("@")
    # only folders from the listing are ever opened, so no name can lead elsewhere
    if name not in names:
        raise AdapterFileError(f"{folder}: {unknown('adapter', reference, names)}")
    path = folder / name
    if (path / CONFIG_NAME).is_file():
        if version:
            raise AdapterFileError(f"{folder}: adapter {name!r} has a single version, and {version!r} is not it")
        return _read(name, "", path)
    versions = [sub.name for sub in _inside(path) if (sub / CONFIG_NAME).is_file()]
    if not versions:
        raise AdapterFileError(f"{path} holds no {CONFIG_NAME}, so it is not an adapter")
    if version and version not in versions:
        raise AdapterFileError(f"{path}: {unknown('version', version, versions)}")
    version = version or versions[-1]
    return _read(name, version, path / version)


def _inside(folder: Path) -> list[Path]:
    """The folders directly in ``folder``, without links that lead out of it.

    They come in natural order (10 after 9), names that begin with a number after the others.
    """
    home = folder.resolve()
    inside = [path for path in folder.iterdir() if path.is_dir() and path.resolve().is_relative_to(home)]
    shown = (path for path in inside if not path.name.startswith("."))
    # names that differ in leading zeros alone have equal keys: their text decides, not the file system's order
    return sorted(shown, key=lambda path: (path.name[:1].isdecimal(), natural_key(path.name), path.name))


def _read(name: str, version: str, path: Path) -> AdapterVersion:
    weights = path / WEIGHTS_NAME
    if not weights.is_file() or not weights.resolve().is_relative_to(path.resolve()):
        raise AdapterFileError(f"{path} holds no {WEIGHTS_NAME}")
    stat, header = weights.stat(), read_header(weights)
    shapes = {key.removeprefix(PREFIX): shape for key, shape in header.shapes.items()}
    return AdapterVersion(name, version, path, (stat.st_mtime_ns, stat.st_size), shapes, header.metadata)
