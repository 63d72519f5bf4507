"""Which triplets of a pair of factors from a file are more than zero padding, and whether all are finite."""

from __future__ import annotations

import torch

from ..errors import AdapterFileError


def triplet_sizes(
    lora_a: torch.Tensor, lora_b: torch.Tensor, lam: torch.Tensor | None, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entry of each triplet's row of ``lora_a`` (r, …) and column of ``lora_b`` (d_out, r, …), (r,) each.

    One pass answers which triplets are zero padding and whether every weight is finite.

    Raises:
        AdapterFileError: a weight is NaN or infinite; ``what`` names the layer.
    """
    sizes = _largest(lora_a), _largest(lora_b.transpose(0, 1))
    if not all(bool(torch.isfinite(part).all()) for part in (*sizes, *([] if lam is None else [lam]))):
        raise AdapterFileError(f"{what} are not finite (NaN or inf): the training diverged")
    return sizes


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute entry of each row."""
    rows = rows.flatten(1)
    if rows.dtype.itemsize < 2:
        rows = rows.float()  # torch compares no 8-bit numbers
    return rows.abs().amax(1) if rows.numel() else rows.sum(1)
