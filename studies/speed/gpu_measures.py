"""What :mod:`studies.speed.gpu` measures on a device: times, kernels, synchronisations, memory, factorisations."""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .gpu_arms import Arm
from .operators import Count

ROOT = Path(__file__).resolve().parents[2]
_SYNCHRONISES = "called a synchronizing CUDA operation"
_NO_KERNEL = re.compile(r"^(Memcpy|Memset)\b", re.IGNORECASE)
_LAUNCH = re.compile(r"^cu(da)?Launch\w*Kernel")
_WAIT = re.compile(r"^cuda(Stream|Event)Synchronize")


def synchronize(device: torch.device) -> None:
    """Wait until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device is done with it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def step_seconds(arm: Arm, steps: int) -> float:
    """Median seconds of ``steps`` steps in a row, after one that is not counted.

    On a GPU they are the distances between events that the device meets, and nobody waits for it in between: the
    processor runs ahead of the device as in training, unless the model or the arm makes it wait.
    """
    arm.step()
    if arm.device.type != "cuda":
        return statistics.median(seconds_of(arm.step, arm.device) for _ in range(steps))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        arm.step()
        mark.record()
    torch.cuda.synchronize(arm.device)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in zip(marks[:-1], marks[1:], strict=True))


def by_phase(arm: Arm, count: Callable[[Callable[[], Any], torch.device], Any]) -> dict[str, Any]:
    """What ``count`` finds in each phase of one step."""
    return {name: count(phase, arm.device) for name, phase in arm.phases()}


def calls(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """{"kernels", "launches", "waits", "copies to the host"} of one call on a GPU, as the profiler saw them; on a CPU
    {"operators"}, counted where they are dispatched.

    Raises:
        RuntimeError: the profiler saw nothing of the device.
    """
    if device.type != "cuda":
        with Count() as count:
            call()
        return {"operators": sum(count.calls.values())}
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        # one kernel that is certain tells a call without any from a profiler that sees none
        torch.ones(1, device=device)
        call()
        synchronize(device)
    found = tally(watched.events())
    if not found["kernels"]:
        raise RuntimeError("torch.profiler saw no kernel of the device; is CUPTI allowed here?")
    return found | {"kernels": found["kernels"] - 1, "launches": max(0, found["launches"] - 1)}


def tally(events: Iterable[FunctionEvent]) -> dict[str, int]:
    """Kernels that ran on the device, calls that launch one, waits and copies for the host, among the profiler's
    events."""
    found = {"kernels": 0, "launches": 0, "waits": 0, "copies to the host": 0}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            # an annotated range (Optimizer.step) is shown among the kernels too
            found["kernels"] += not event.is_user_annotation and not _NO_KERNEL.match(event.name)
            found["copies to the host"] += "DtoH" in event.name
        else:
            found["launches"] += bool(_LAUNCH.match(event.name))
            found["waits"] += bool(_WAIT.match(event.name))
    return found


def synchronisations(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """{file:line: how often it made the host wait for the device} in one call on a GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places(seen)


def places(seen: Iterable[warnings.WarningMessage]) -> dict[str, int]:
    """Where the synchronisations among these warnings were, most frequent first; this repository's files from its root,
    those of packages from site-packages."""
    found = Counter(
        f"{re.sub(r'^.*site-packages/', '', one.filename.removeprefix(f'{ROOT}/'))}:{one.lineno}"
        for one in seen if _SYNCHRONISES in str(one.message)
    )
    return dict(found.most_common())


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU, after what nobody refers to is gone."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def peak_bytes(arm: Arm, before: int) -> int:
    """Peak of one step on a GPU, above the ``before`` bytes that were held when the arm was not there."""
    torch.cuda.reset_peak_memory_stats(arm.device)
    arm.step()
    return torch.cuda.max_memory_allocated(arm.device) - before


def allocation(arm: Arm, repeats: int = 3) -> dict[str, Any]:
    """Median seconds of an allocation, and what another one calls and where it makes the host wait.

    Each is the schedule's next one, so some ranks leave in each. The first one, for which the device's libraries set
    themselves up, is not counted.
    """
    times = []
    for _ in range(repeats + 1):
        arm.before_allocation()
        times.append(seconds_of(arm.allocate, arm.device))
        arm.model.zero_grad()
    found: dict[str, Any] = {"first": times[0], "seconds": statistics.median(times[1:])}
    for name, count in {"calls": calls, "synchronisations": synchronisations}.items():
        if name == "calls" or arm.device.type == "cuda":
            arm.before_allocation()
            found[name] = count(arm.allocate, arm.device)
            arm.model.zero_grad()
    return found


def factorisations(matrices: int, width: int, ranks: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of what a canonical form needs for ``matrices`` factors (width, r) at once, by rank and type; with
    "reason" in the place of "seconds" where it fails."""
    rows = []
    if device.type == "cuda":
        allocated(device)  # what was measured before is gone
    for rank in ranks:
        for dtype in (torch.float32, torch.float64):
            draw = torch.Generator(device).manual_seed(0)
            tall = torch.randn(matrices, width, rank, device=device, dtype=dtype, generator=draw)
            cores = torch.randn(matrices, rank, rank, device=device, dtype=dtype, generator=draw)
            for what, call in _ways(tall, cores).items():
                row = {"rank": rank, "dtype": str(dtype).removeprefix("torch."), "what": what}
                try:
                    call()
                    row["seconds"] = statistics.median(seconds_of(call, device) for _ in range(3))
                except RuntimeError as error:
                    row["reason"] = reason(error)
                rows.append(row)
    return rows


def _ways(tall: torch.Tensor, cores: torch.Tensor) -> dict[str, Callable[[], Any]]:
    eye = torch.eye(tall.shape[2], device=tall.device, dtype=tall.dtype)

    def cholesky() -> torch.Tensor:
        lower, _ = torch.linalg.cholesky_ex(tall.mT @ tall)
        return tall @ torch.linalg.solve_triangular(lower.mT, eye, upper=True)

    return {
        "QR, batched": lambda: torch.linalg.qr(tall),
        "QR, one by one": lambda: [torch.linalg.qr(one) for one in tall],
        "Cholesky of the Gram matrices, batched": cholesky,
        "SVD of cores, batched": lambda: torch.linalg.svd(cores),
        "SVD of cores, one by one": lambda: [torch.linalg.svd(one) for one in cores],
        "SVD of cores, batched on the CPU and back": lambda: [
            part.to(cores.device) for part in torch.linalg.svd(cores.cpu())
        ],
    }


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
