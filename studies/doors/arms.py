"""The arms: three ways to have ranks chosen by ``auto``, and plain LoRA of the first and of the last size.

The scaling alpha / rank is the same in all arms of a part, and no arm adapts a layer that another leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankalloc as ra

from ..planted.training import RANK, Door, attached

ATTACH, ATTACH_LORA, DRIVEN = "attach", "attach, lora", "PEFT, driven"
EQUAL, PEAK = "LoRA, equal size", "LoRA, peak rank"
CHOOSING = (ATTACH, ATTACH_LORA, DRIVEN)
"""The arms that begin at the peak rank and choose ranks by ``auto``; the other two are plain LoRA by PEFT."""
ARMS = (*CHOOSING, EQUAL, PEAK)
INITS = {ATTACH: "svd", ATTACH_LORA: "lora"}
"""The parametrisation of the arms that attach the package's own adapters: P·Λ·Q, and plain P·Q."""
SCALING = 2
"""alpha / rank of the parts "language" and "punctuation"."""


def linear_names(model: nn.Module) -> list[str]:
    """The full names of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def peft_model(
    model: nn.Module, rank: int, alpha: float, targets: str | list[str], heads: Sequence[str] | None = None
) -> PeftModel:
    """PEFT's LoRA layers in ``model``, in place, from PEFT's own start; ``heads`` are trained whole."""
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=heads and list(heads))
    )


def _own(student: nn.Module, init: str, ranks: Mapping[str, int] | None) -> ra.Adapters:
    return attached(student, "lora", ranks)


def _driven(student: nn.Module, init: str, ranks: Mapping[str, int] | None) -> ra.Adapters:
    return ra.adopt(peft_model(student, RANK, RANK, linear_names(student)))


DOORS: dict[str, Door] = {ATTACH: attached, ATTACH_LORA: _own, DRIVEN: _driven}
"""The arms of the planted problems."""
