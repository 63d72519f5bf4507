"""How the ranks of a folder's layers are laid out in its weights file: padded to one rank, or each as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError, unknown

LAYOUTS = ("uniform", "compact")


@dataclass(frozen=True)
class Layout:
    """One of two layouts of an adapter file.

    - "uniform": zeros pad every module to one rank R; r = lora_alpha = R and no patterns (except for grouped
      convolutions, whose ranks PEFT counts once per group). Also right in tools that read one global scale and ignore
      rank_pattern.
    - "compact": no padding; rank_pattern = alpha_pattern = the ranks; modules of rank 0 are left out.

    Attributes:
        name: "uniform" or "compact".
        pad_to: in the uniform layout, R is rounded up to a multiple of this; some servers want 8 or 16.
    """

    name: str = "compact"
    pad_to: int = 1

    @property
    def uniform(self) -> bool:
        """Whether all modules have one rank in the file."""
        return self.name == "uniform"

    def check(self) -> Layout:
        """This layout. Raises ConfigError when it does not exist or does not take the padding."""
        if self.name not in LAYOUTS:
            raise ConfigError(unknown("layout", self.name, LAYOUTS))
        if not isinstance(self.pad_to, int) or self.pad_to < 1 or (not self.uniform and self.pad_to != 1):
            raise ConfigError(
                f"padding to a multiple of {self.pad_to!r} (pad_multiple, --pad-to) is not possible in layout "
                f"{self.name!r}: it takes a whole number of at least 1, and above 1 the uniform layout"
            )
        return self

    def stored_rank(self, ranks: Iterable[int]) -> int:
        """r in the file of modules of these ranks: the largest, at least 1, rounded up to a multiple of ``pad_to``.

        In the uniform layout every module has it, zero padding included.
        """
        return -(-max([1, *ranks]) // self.pad_to) * self.pad_to
