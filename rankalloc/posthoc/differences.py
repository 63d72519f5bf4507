"""What changed between two checkpoints of one model: each matrix's difference decomposed, every other change measured.

Matrices are worked on side by side, one thread each, because LAPACK gains little from several. A difference is formed
piece by piece, and only that of a matrix to decompose is ever held whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..errors import AdapterFileError
from .checkpoints import Checkpoint
from .dense import frobenius, largest
from .results import Leftover
from .side_by_side import side_by_side

_PIECE = 1 << 20  # entries that are read as float32 at a time


@dataclass(frozen=True)
class Decomposed:
    """The largest triplets of Δ = W_tuned − W_base (d_out, d_in) of one matrix.

    Attributes:
        file: safetensors with A (r, d_in) and B (d_out, r), float32, triplets by falling singular value.
        sigma: the singular values, (r,) float64.
        change: ‖Δ‖_F.
        relative: ‖Δ‖_F / ‖W_base‖_F.
        exact: whether they were computed exactly, see :mod:`rankalloc.posthoc.dense`.
    """

    file: Path
    sigma: np.ndarray
    change: float
    relative: float
    exact: bool


def decompose(
    old: Checkpoint, new: Checkpoint, wanted: Mapping[str, tuple[int, bool]], shared: Collection[str], waiting: Path,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[dict[str, Decomposed], list[Leftover]]:
    """Decompose the changes of matrices, their factors written to the folder ``waiting``, and measure other changes.

    Args:
        old, new: base and tuned checkpoint.
        wanted: {name of a module: (the highest rank, whether its weight is stored transposed)}.
        shared: the keys to compare; both checkpoints hold them in one shape.
        progress: called with (done, all, name) before each tensor.

    Raises:
        AdapterFileError: a tensor holds NaN or inf, or a file is damaged.
    """
    keys = [key for key in old.shapes if key in shared]
    numbers = {key: number for number, key in enumerate(keys)}

    def one(key: str) -> Decomposed | Leftover:
        name = key.removesuffix(".weight")
        if name not in wanted or not key.endswith(".weight"):
            change, size = _norms(old, new, key)
            return Leftover(key, old.shapes[key], change, _relative(change, size))
        rank, turned = wanted[name]
        delta = torch.empty(old.shapes[key])
        change, size = _norms(old, new, key, delta)
        part = largest(delta.T if turned else delta, rank, name)
        file = waiting / f"{numbers[key]}.safetensors"
        save_file({"A": part.A.contiguous(), "B": part.B.contiguous()}, file)
        return Decomposed(file, part.sigma.numpy(), part.norm, _relative(change, size), part.exact)

    found: dict[str, Decomposed] = {}
    leftovers: list[Leftover] = []
    with side_by_side(one, keys) as results:
        for done, key in enumerate(keys):
            if progress is not None:
                progress(done, len(keys), key)
            result = results(key)
            if isinstance(result, Decomposed):
                found[key.removesuffix(".weight")] = result
            elif result.change:
                leftovers.append(result)
    return found, leftovers


def _relative(change: float, size: float) -> float:
    return change / size if size else float(change > 0)


def _norms(old: Checkpoint, new: Checkpoint, key: str, delta: torch.Tensor | None = None) -> tuple[float, float]:
    """‖Δ‖_F and ‖W_base‖_F; Δ itself, in float32, is written to ``delta`` if given.

    Raises:
        AdapterFileError: an entry is NaN or inf.
    """
    changes, sizes = [0.0], [0.0]
    target = None if delta is None else delta.view(-1)
    for start, before, after in _pieces(old[key], new[key]):
        sizes.append(frobenius(before))
        change = after.sub_(before)
        changes.append(frobenius(change))
        if target is not None:
            target[start : start + len(change)] = change
    size, total = math.hypot(*sizes), math.hypot(*changes)
    if not math.isfinite(total):
        holder = new.path if math.isfinite(size) else old.path
        raise AdapterFileError(f"{holder}: {key} holds NaN or inf, so no difference can be formed")
    return total, size


def _pieces(old: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (start, entries of ``old``, entries of ``new``), flat; the pieces of ``new`` are copies, in float32."""
    old, new = old.reshape(-1), new.reshape(-1)
    for start in range(0, old.numel(), _PIECE):
        stop = start + _PIECE
        yield start, old[start:stop].float(), new[start:stop].to(torch.float32, copy=True)
