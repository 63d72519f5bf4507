"""The compiled twin of :mod:`rankalloc.layers.fused`: the same function in C++, for float32 on the CPU.

It is optional and built once per machine (``rankalloc build-kernel``, or :func:`rankalloc.layers.native.build`), into
torch's folder for extensions; every later run on that machine uses it. ``RANKALLOC_NATIVE=0`` leaves it out.

Weakness: it adds in a different order from a BLAS, so results with and without it differ by rounding. Of two runs that
must agree to the bit, both must use it or neither.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("fused.cpp", "skinny.h"))
SWITCH = "RANKALLOC_NATIVE"


def library_path() -> Path:
    """The file of the kernel for these sources, this torch and this processor, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    key = hashlib.sha256("|".join((torch.__version__, platform.machine(), capability())).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    return folder / "rankalloc" / f"fused-{key.hexdigest()[:16]}.so"


def capability() -> str:
    """The widest vector instructions that torch uses on this processor, such as AVX512."""
    return torch.backends.cpu.get_cpu_capability()


@lru_cache(maxsize=1)
def fused_linear() -> Callable[..., list[torch.Tensor]] | None:
    """The kernel, (x, dropped, tensors of the layers, scalings, onednn) -> outputs; None if not built, or unwanted."""
    if os.environ.get(SWITCH) == "0":
        return None
    path = library_path()
    if not path.is_file():
        return None
    if not _only_ours(path):
        logger.warning(
            "the compiled kernel %s is not used: it or its folder belongs to another user or can be written by others; "
            "name a folder of your own in TORCH_EXTENSIONS_DIR and run `rankalloc build-kernel`", path,
        )
        return None
    try:
        if not hasattr(torch.ops.rankalloc, "fused_linear"):  # torch aborts a process that registers an operator twice
            torch.ops.load_library(path)
    except OSError as error:
        logger.warning(
            "the compiled kernel %s cannot be loaded (%s) and is not used; `rankalloc build-kernel --force` builds it "
            "again", path, error,
        )
        return None
    return torch.ops.rankalloc.fused_linear.default


def _only_ours(path: Path) -> bool:
    """Whether nobody but this user (or root) can have written the file: it, its folder and the one around that."""
    if not hasattr(os, "getuid"):
        return True
    for one in (path, path.parent, path.parent.parent):
        held = one.stat()
        if held.st_uid not in (os.getuid(), 0) or held.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def build(force: bool = False) -> Path:
    """Build the kernel unless it exists, and use it from now on; returns its file. Takes half a minute.

    Args:
        force: build it even if it exists.

    Raises:
        RankallocError: no compiler, not Linux, or the compiler failed.
    """
    from .building import compile_library

    path = library_path()
    if force or not path.is_file():
        compile_library(SOURCES[0], path, capability())
    if fused_linear() is None:  # a process loads a library only once
        fused_linear.cache_clear()
    return path
