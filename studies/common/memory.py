"""Resident memory of this process, from the Linux kernel's own counters.

Those of getrusage begin with what the parent process had.
"""

from __future__ import annotations

from pathlib import Path


def forget_peak() -> None:
    """Let the kernel count the peak anew from what is resident now, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int | None:
    """The most memory that was resident since the process began or :func:`forget_peak`; None where the kernel does
    not report it."""
    return _status("VmHWM")


def resident_bytes() -> int | None:
    """The memory that is resident now; None where the kernel does not report it."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
