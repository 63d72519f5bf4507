"""Many adapters of one base: hot swap without reloading the base, and one batch with a different adapter for each row.

PEFT keeps them in memory and computes with them (``load_adapter``, ``set_adapter``, ``adapter_names``). This module
does what PEFT leaves to the caller: it knows which adapters a folder has, whether they fit this base, and which ones
stay in memory.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..errors import AdapterFileError, ConfigError, RankallocError, TargetError
from ..layers.adaptable import shape_of, why_not
from ..options import integer
from . import fingerprint
from .fingerprint import weight_of
from .library_index import AdapterVersion, find, scan
from .reading import read_config
from .saving import WITH_HEAD

BASE = "__base__"
"""PEFT's name for rows without an adapter."""
Versions = list[AdapterVersion]
References = list[str]


class AdapterLibrary:
    """The adapters in a folder, on one loaded model.

    Args:
        folder: of adapters; see :mod:`rankalloc.storage.library_index`. Adapters added later are found too.
        model: the base, changed in place when the first adapter is loaded; None only lists.
        max_bytes: the most that all adapters in memory may take; the least recently used leave first. None for no
            limit.
        check_base: refuse adapters whose fingerprint names another base.

    Example::

        library = ra.AdapterLibrary("adapters/", model, max_bytes=200_000_000)
        library.use("german")(**batch)                              # hot swap
        library.forward(["german", "legal@2", None], **batch)      # one batch, one adapter a row
    """

    def __init__(
        self, folder: str | os.PathLike, model: nn.Module | None = None, *, max_bytes: int | None = None,
        check_base: bool = True,
    ) -> None:
        if max_bytes is not None:
            max_bytes = integer("max_bytes", max_bytes, 1)
        if model is not None and any(isinstance(module, Adapter) for module in model.modules()):
            raise TargetError("this model has adapters attached already; save them and call rankalloc.detach first")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.check_base = check_base
        self.model: Any = model  # PEFT has no types
        """The base until the first adapter is loaded, then PEFT's PeftModel around it."""
        self._base = model
        self._modules = dict(model.named_modules()) if model is not None else {}
        self._layers = fingerprint.matrices(model) if model is not None else {}
        self._cached: OrderedDict[str, tuple[AdapterVersion, int]] = OrderedDict()
        self._loaded = 0
        scan(self.folder)

    def list(self) -> Versions:
        """The current version of every adapter."""
        return [versions[-1] for versions in scan(self.folder).values()]

    def versions(self, name: str) -> Versions:
        """All versions of one adapter, the current one last. Raises AdapterFileError when there is none."""
        return scan(self.folder)[find(self.folder, name).name]

    @property
    def cached(self) -> References:
        """References of the adapters in memory, the most recently used last."""
        return [version.reference for version, _ in self._cached.values()]

    @property
    def cached_bytes(self) -> int:
        """Bytes that the adapters in memory take."""
        return sum(size for _, size in self._cached.values())

    def use(self, name: str) -> nn.Module:
        """Make ``name`` ("name" or "name@version") the model's adapter, and return the model in evaluation mode.

        Raises:
            AdapterFileError: there is no such adapter, it is damaged, or it was made for another base.
            RankallocError: PEFT is not installed, or the adapter alone is above ``max_bytes``.
        """
        key = self._ready([name])[0]
        self.model.set_adapter(key, inference_mode=True)
        return self.model.eval()

    def forward(self, names: Sequence[str | None], *args: Any, **inputs: Any) -> Any:
        """Run one batch with the adapter ``names[i]`` for row i; None for the base alone.

        Raises:
            AdapterFileError, RankallocError: as :meth:`use`; or the adapters together are above ``max_bytes``, or have
                different heads, which PEFT cannot mix.
        """
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        if not wanted:
            raise ConfigError("a mixed batch names no adapter; call the model itself for the base alone")
        keys = dict(zip(wanted, self._ready(wanted), strict=True))
        heads = {name: self._cached[keys[name]][0].heads for name in wanted}
        odd = next((name for name in wanted if heads[name] != heads[wanted[0]]), None)
        if odd is not None:
            raise RankallocError(
                f"{wanted[0]} and {odd} have different heads ({', '.join(sorted(heads[wanted[0]] ^ heads[odd]))} in "
                "one alone), which cannot share a batch; run them one by one"
            )
        # a layer or head without the active adapter would skip the others too
        self.model.set_adapter(keys[wanted[0]], inference_mode=True)
        rows = [BASE if name is None else keys[name] for name in names]
        return self.model.eval()(*args, adapter_names=rows, **inputs)

    def drop(self, name: str) -> None:
        """Remove an adapter from memory, if it is there."""
        for key, (version, _) in list(self._cached.items()):
            if name in (version.reference, version.name):
                self._forget(key)

    def close(self) -> nn.Module | None:
        """Remove all adapters and return the base as it was; None for a library without a model."""
        while self._cached:
            self._forget(next(iter(self._cached)))
        if self.model is not self._base:
            self._base = self.model.unload()
        self.model = self._base
        return self._base

    def _ready(self, names: Sequence[str]) -> References:
        """Bring the adapters of these names into memory, and return PEFT's names for them."""
        if self.model is None:
            raise ConfigError("this library has no model: pass AdapterLibrary(folder, model) to use its adapters")
        versions = [find(self.folder, name) for name in names]
        found = [self._cached_key(version) for version in versions]
        for key, version in zip(found, versions, strict=True):
            if key is None:
                self._drop_path(version.path)  # the file was replaced, so its old content is useless
            else:
                self._cached.move_to_end(key)
        needed = {key for key in found if key is not None}
        keys = []
        for version in versions:
            # two references of one batch can name the same version
            keys.append(self._cached_key(version) or self._load(version, needed))
            needed.add(keys[-1])
        return keys

    def _cached_key(self, version: AdapterVersion) -> str | None:
        """PEFT's name for this version, if it is in memory."""
        same = (version.path, version.stamp)
        return next((key for key, (held, _) in self._cached.items() if (held.path, held.stamp) == same), None)

    def _load(self, version: AdapterVersion, needed: set[str]) -> str:
        peft = _peft()
        self._check(version)
        self._make_room(version, version.params * self._bytes_per_number(), needed)
        key = f"rankalloc_{self._loaded}"
        self._loaded += 1
        options = {"autocast_adapter_dtype": False, "is_trainable": False}
        try:
            with torch.random.fork_rng():  # PEFT draws random initial weights before it reads the real ones
                if self.model is self._base:
                    config = peft.PeftConfig.from_pretrained(version.path)
                    if config.task_type in WITH_HEAD:
                        config.task_type = None  # PEFT's classes for these tasks require a head in every adapter
                    self.model = peft.PeftModel.from_pretrained(
                        self._base, version.path, adapter_name=key, config=config, **options
                    )
                else:
                    self.model.load_adapter(version.path, adapter_name=key, **options)
        except Exception as error:
            self._undo(key)
            raise AdapterFileError(f"{version.path} could not be loaded: {' '.join(str(error).split())}") from error
        self._cached[key] = (version, self._size(key))
        try:
            self._make_room(version, 0, needed | {key})
        except RankallocError:
            self._forget(key)
            raise
        return key

    def _check(self, version: AdapterVersion) -> None:
        """Make sure, before PEFT changes anything, that this is a plain LoRA of layers of this base, made for it."""
        read_config(version.path)
        if not version.layers:
            raise AdapterFileError(f"{version.path} holds no LoRA weights")
        for name in sorted(version.layers | version.heads):
            if name not in self._modules:
                raise AdapterFileError(f"{version.path} was made for another model: this one has no layer {name}")
        for held, _ in self._cached.values():
            both = version.layers & held.heads | version.heads & held.layers
            if both:
                raise RankallocError(
                    f"{version.reference} and {held.reference} cannot share a model: {min(both)} is trained whole in "
                    f"one and adapted in the other; call drop({held.reference!r}) first"
                )
        for name in sorted(version.layers):
            a, b = (version.shapes.get(f"{name}.lora_{half}.weight") for half in "AB")
            module = self._modules[name]
            if a is None or b is None or len(a) != 2 or why_not(module):
                continue  # embeddings and convolutions: PEFT compares their shapes
            if (a[1], b[0]) != shape_of(module):
                d_in, d_out = shape_of(module)
                raise AdapterFileError(
                    f"{version.path} was made for another model: {name} is {a[1]} → {b[0]} in the adapter and {d_in} → "
                    f"{d_out} here"
                )
        if self.check_base and version.base is not None and self._base is not None:
            fingerprint.compare(version.base, self._base, str(version.path), self._layers)

    def _make_room(self, version: AdapterVersion, size: int, needed: set[str]) -> None:
        """Remove adapters that are not ``needed`` until ``size`` more bytes fit."""
        if self.max_bytes is None:
            return
        while self.cached_bytes + size > self.max_bytes:
            oldest = next((key for key in self._cached if key not in needed), None)
            if oldest is None:
                together = f"with the {len(needed)} others of this batch " if len(needed) > (size == 0) else ""
                raise RankallocError(
                    f"{version.reference} takes {size or self.cached_bytes:,} bytes, {together}above "
                    f"max_bytes={self.max_bytes:,}; raise max_bytes, or use fewer adapters at once"
                )
            self._forget(oldest)

    def _bytes_per_number(self) -> int:
        """PEFT keeps adapters in the dtype of the adapted layer, and in float32 for quantised layers."""
        weights = (weight_of(layer) for layer in self._layers.values())
        return max((weight.element_size() for weight in weights if weight.is_floating_point()), default=4)

    def _size(self, key: str) -> int:
        own = (p for name, p in self.model.named_parameters() if key in name.split("."))
        return sum(p.numel() * p.element_size() for p in own)

    def _drop_path(self, path: Path) -> None:
        for key, (version, _) in list(self._cached.items()):
            if version.path == path:
                self._forget(key)

    def _forget(self, key: str) -> None:
        self._cached.pop(key)
        self.model.delete_adapter(key)

    def _undo(self, key: str) -> None:
        """Remove whatever a failed load left in the model."""
        if self.model is not self._base and key in self.model.peft_config:
            self.model.delete_adapter(key)


def _peft() -> Any:
    """The peft package."""
    try:
        import peft
    except ImportError:
        raise RankallocError(
            "AdapterLibrary computes with PEFT, which is not installed: pip install 'rankalloc[peft]'"
        ) from None
    return peft
