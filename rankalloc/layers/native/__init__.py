"""The compiled twin of :mod:`rankalloc.layers.fused`: the same function in C++, for float32 on the CPU.

It is optional and built once for a machine (``rankalloc build-kernel``, or :func:`rankalloc.layers.native.build`), into
torch's folder for extensions; from then on every run there uses it. ``RANKALLOC_NATIVE=0`` leaves it out.

Weakness: it adds in another order than a BLAS does, so results with and without it differ by rounding. A run that
must equal another to the bit needs the same of both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("fused.cpp", "skinny.h"))
SWITCH = "RANKALLOC_NATIVE"


def library_path() -> Path:
    """Where the kernel for these sources, this torch and this processor is, or would be."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    key = hashlib.sha256("|".join((torch.__version__, platform.machine(), capability())).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    return Path(root) / "rankalloc" / f"fused-{key.hexdigest()[:16]}.so"


def capability() -> str:
    """The widest vectors that torch uses on this processor, such as AVX512."""
    return torch.backends.cpu.get_cpu_capability()


@lru_cache(maxsize=1)
def fused_linear() -> Callable[..., list[torch.Tensor]] | None:
    """The kernel, (x, dropped, tensors of the layers, scalings) -> outputs; None where it is not built or unwanted."""
    if os.environ.get(SWITCH) == "0":
        return None
    path = library_path()
    if not path.is_file():
        return None
    try:
        if not hasattr(torch.ops.rankalloc, "fused_linear"):  # torch ends a process that registers an operator twice
            torch.ops.load_library(path)
    except OSError as error:
        logger.warning(
            "the compiled kernel %s cannot be loaded (%s); going on without it. `rankalloc build-kernel --force` "
            "builds it again.", path, error,
        )
        return None
    return torch.ops.rankalloc.fused_linear.default


def build(force: bool = False) -> Path:
    """Build the kernel where it is not there yet, and use it from now on; returns its file. Takes half a minute.

    Args:
        force: also where it is there.

    Raises:
        RankallocError: no compiler, not Linux, or the compiler failed.
    """
    from .building import compile_library

    path = library_path()
    if force or not path.is_file():
        compile_library(SOURCES[0], path, capability())
    if fused_linear() is None:  # a library is loaded once in a process
        fused_linear.cache_clear()
    return path
