"""Rules: how ranks move while training. One file each; this is their registry."""

from __future__ import annotations

from .base import Rule
from .dylora import Dylora
from .elalora import Elalora
from .increlora import Increlora
from .l1ra import L1ra
from .matryoshka import Matryoshka
from .sora import Sora

RULES: dict[str, type[Rule]] = {
    Rule.name: Rule,
    Sora.name: Sora,
    Elalora.name: Elalora,
    Increlora.name: Increlora,
    L1ra.name: L1ra,
    Dylora.name: Dylora,
    Matryoshka.name: Matryoshka,
}

__all__ = ["RULES", "Rule"]
