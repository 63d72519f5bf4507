"""Page faults: how a training process on the CPU keeps what it frees.

Every step of training takes the same memory and gives it back. glibc returns what lies on top of its heap to the
system, and maps large blocks anew each time, under a limit that depends on what was freed before; the next step then
pays for every page again, some microseconds each. How much differs from process to process and from one order of
allocations to another, seen up to a quarter of a step. A process that is there to train had better keep its memory.

The setting is the whole process's, so a library does not choose it for its caller: ``rankalloc train`` and ``rankalloc
sweep`` call :func:`keep_freed_memory`, and a script of one's own may.

Weakness: memory that is freed goes to nobody else until the process ends.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """From now on, let this process keep the memory it frees, for its own next use.

    Call it before the first step. It changes no result. What the environment says about glibc's allocation
    (``MALLOC_…_``, or ``glibc.malloc`` in ``GLIBC_TUNABLES``) goes first and is left as it is; other allocators
    (jemalloc, tcmalloc) take no notice.

    Returns:
        Whether it was set: False where the C library is not glibc, or the environment had chosen.

    Example:
        >>> import rankalloc as ra
        >>> kept = ra.keep_freed_memory()
    """
    if any(name in os.environ for name in _CHOSEN) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version"):  # musl's mallopt, say, does nothing
            return False
        trims, maps = libc.mallopt(_TRIM_THRESHOLD, -1), libc.mallopt(_MMAP_MAX, 0)
    except (OSError, AttributeError, TypeError):  # Windows has no library of all symbols
        return False
    return bool(trims and maps)
