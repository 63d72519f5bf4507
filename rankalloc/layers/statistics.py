"""Layers that training changes although they are frozen: normalisation with running statistics.

A BatchNorm updates its running mean and variance in every forward pass of training, whether its weights are frozen or
not, and in evaluation its output depends on them. An adapter's file without them belongs to another model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def with_running_statistics(model: nn.Module, heads: Sequence[str] = ()) -> list[str]:
    """Full names of the modules whose running statistics follow the training data, those inside ``heads`` apart."""
    inside = tuple(f"{head}." for head in heads)
    return [
        name for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
        and name not in heads and not name.startswith(inside)
    ]


def said_of_statistics(names: Sequence[str], saved: bool) -> list[str]:
    """What a run says about them, in one sentence; nothing where there are none."""
    if not names:
        return []
    what = f"running statistics, which training changes, are kept by {names[0]}"
    what += f" and {len(names) - 1} more" if names[1:] else ""
    if saved:
        return [f"{what}: such a layer is trained whole and saved with the adapter"]
    return [f"{what}, and no file will hold them: name such layers in modules_to_save, or keep them in evaluation"]
