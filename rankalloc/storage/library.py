"""Many adapters of one base: hot swap without reloading it, and one batch with another adapter for each row.

PEFT holds and computes them (``load_adapter``, ``set_adapter``, ``adapter_names``); what is here is what it leaves to
the caller: which adapters a folder has, whether they are for this base, and which of them stay in memory.
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
from .library_index import AdapterVersion, find, scan
from .reading import read_config
from .saving import WITH_HEAD

BASE = "__base__"  # PEFT's word for rows without an adapter


class AdapterLibrary:
    """The adapters in a folder, on one loaded model.

    Args:
        folder: of adapters; see :mod:`rankalloc.storage.library_index`. What is added later is seen.
        model: the base, changed in place when the first adapter is loaded; None to list only.
        max_bytes: what the adapters in memory may take together; the least recently used leave first. None for no
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
        self.model = model
        """The base until the first adapter is loaded, then PEFT's PeftModel around it."""
        self._base = model
        self._modules = dict(model.named_modules()) if model is not None else {}
        self._layers = fingerprint.matrices(model) if model is not None else {}
        self._cached: OrderedDict[str, tuple[AdapterVersion, int]] = OrderedDict()
        self._loaded = 0
        scan(self.folder)

    def list(self) -> list[AdapterVersion]:
        """The current version of every adapter."""
        return [versions[-1] for versions in scan(self.folder).values()]

    def versions(self, name: str) -> list[AdapterVersion]:
        """All versions of one adapter, the current one last. Raises AdapterFileError when there is none."""
        return scan(self.folder)[find(self.folder, name).name]

    @property
    def cached(self) -> list[str]:
        """References of the adapters in memory, the most recently used last."""
        return [version.reference for version, _ in self._cached.values()]

    @property
    def cached_bytes(self) -> int:
        """What the adapters in memory take."""
        return sum(size for _, size in self._cached.values())

    def use(self, name: str) -> nn.Module:
        """Make ``name`` ("name" or "name@version") the model's adapter; the model, in evaluation mode.

        Raises:
            AdapterFileError: there is no such adapter, it is damaged, or it was made for another base.
            RankallocError: peft is not installed, or the adapter alone is above ``max_bytes``.
        """
        key = self._ready([name])[0]
        self.model.set_adapter(key, inference_mode=True)
        return self.model.eval()

    def forward(self, names: Sequence[str | None], *args: Any, **inputs: Any) -> Any:
        """Run one batch with the adapter ``names[i]`` for row i; None for the base alone.

        Raises:
            AdapterFileError, RankallocError: as :meth:`use`; or together they are above ``max_bytes``, or they have
                unlike heads, which PEFT cannot mix.
        """
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        if not wanted:
            raise ConfigError("a mixed batch names no adapter; call the model itself for the base alone")
        keys = dict(zip(wanted, self._ready(wanted), strict=True))
        heads = {name: self._cached[keys[name]][0].heads for name in wanted}
        odd = next((name for name in wanted if heads[name] != heads[wanted[0]]), None)
        if odd is not None:
            raise RankallocError(
                f"{wanted[0]} and {odd} have unlike heads ({', '.join(sorted(heads[wanted[0]] ^ heads[odd]))} in one "
                "alone), which cannot share a batch; run them one by one"
            )
        # a layer or head without the active adapter would skip the others too
        self.model.set_adapter(keys[wanted[0]], inference_mode=True)
        rows = [BASE if name is None else keys[name] for name in names]
        return self.model.eval()(*args, adapter_names=rows, **inputs)

    def drop(self, name: str) -> None:
        """Take an adapter out of memory; nothing happens when it is not there."""
        for key, (version, _) in list(self._cached.items()):
            if name in (version.reference, version.name):
                self._forget(key)

    def close(self) -> nn.Module:
        """Take all adapters out and give the base back as it was."""
        while self._cached:
            self._forget(next(iter(self._cached)))
        if self.model is not self._base:
            self._base = self.model.unload()
        self.model = self._base
        return self._base

    def _ready(self, names: Sequence[str]) -> list[str]:
        """Adapters of these names in memory, as PEFT calls them."""
        if self.model is None:
            raise ConfigError("this library has no model: pass AdapterLibrary(folder, model) to use its adapters")
        versions = [find(self.folder, name) for name in names]
        keys = []
        for version in versions:
            same = (version.path, version.stamp)
            key = next((k for k, (held, _) in self._cached.items() if (held.path, held.stamp) == same), None)
            if key is None:
                # a file that was replaced makes its old content useless
                self._drop_path(version.path)
            else:
                self._cached.move_to_end(key)
            keys.append(key)
        needed = {key for key in keys if key is not None}
        for index, (key, version) in enumerate(zip(keys, versions, strict=True)):
            if key is None:
                keys[index] = self._load(version, needed)
                needed.add(keys[index])
        return keys

    def _load(self, version: AdapterVersion, needed: set[str]) -> str:
        peft = _peft()
        self._check(version)
        self._make_room(version, version.params * self._bytes_per_number(), needed)
        key = f"rankalloc_{self._loaded}"
        self._loaded += 1
        options = {"autocast_adapter_dtype": False, "is_trainable": False}
        try:
            with torch.random.fork_rng():  # PEFT draws initial weights before it reads the real ones
                if self.model is self._base:
                    config = peft.PeftConfig.from_pretrained(version.path)
                    if config.task_type in WITH_HEAD:
                        config.task_type = None  # PEFT's classes for these tasks want a head in every adapter
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
        """Before PEFT changes anything: plain LoRA, of layers that this base has, made for this base."""
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
                    f"one and adapted in the other; drop({held.reference!r}) first"
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
        if self.check_base and version.base is not None:
            fingerprint.compare(version.base, self._base, str(version.path), self._layers)

    def _make_room(self, version: AdapterVersion, size: int, needed: set[str]) -> None:
        if self.max_bytes is None:
            return
        while self.cached_bytes + size > self.max_bytes:
            oldest = next((key for key in self._cached if key not in needed), None)
            if oldest is None:
                together = f"with the {len(needed)} others of this batch " if len(needed) > (size == 0) else ""
                raise RankallocError(
                    f"{version.reference} takes {size or self.cached_bytes:,} bytes, {together}above "
                    f"max_bytes={self.max_bytes:,}; raise it, or use fewer adapters at once"
                )
            self._forget(oldest)

    def _bytes_per_number(self) -> int:
        """PEFT keeps adapters in the type of the layer beside them, float32 beside a quantised one."""
        sizes = [m.weight.element_size() for m in self._layers.values() if m.weight.is_floating_point()]
        return max(sizes, default=4)

    def _size(self, key: str) -> int:
        held = (p for name, p in self.model.named_parameters() if key in name.split("."))
        return sum(p.numel() * p.element_size() for p in held)

    def _drop_path(self, path: Path) -> None:
        for key, (version, _) in list(self._cached.items()):
            if version.path == path:
                self._forget(key)

    def _forget(self, key: str) -> None:
        self._cached.pop(key)
        self.model.delete_adapter(key)

    def _undo(self, key: str) -> None:
        """Whatever a failed load left in the model."""
        if self.model is not self._base and key in self.model.peft_config:
            self.model.delete_adapter(key)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise RankallocError(
            "AdapterLibrary computes with PEFT, which is not installed: pip install 'rankalloc[peft]'"
        ) from None
    return peft
