"""How the ranks of a folder's layers are laid out in its weights file: each as it is, or padded to one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError, unknown

LAYOUTS = ("compact", "uniform", "one-alpha")


@dataclass(frozen=True)
class Layout:
    """One of three layouts of an adapter file. r in its configuration is the highest rank R.

    - "compact": no padding, so that the file is as small as the budget. rank_pattern = alpha_pattern = the ranks, and
      lora_alpha = R: every scale is 1, and the one global scale of tools that know no patterns is 1, too.
    - "uniform": zeros pad every module to R; lora_alpha = R and no patterns (except for grouped convolutions, whose
      ranks PEFT counts once per group). Right in tools that want one rank, and larger.
    - "one-alpha": no padding and no alpha_pattern; lora_B holds its layer's rank over R, which tools that scale by the
      file's alpha over the layer's own rank undo: llama.cpp with its converter, and PEFT.

    In the first and the last, modules of rank 0 are left out.

    Attributes:
        name: one of :data:`LAYOUTS`.
        pad_to: in the uniform layout, R is rounded up to a multiple of this. Of several numbers, to the first that is
            not smaller, and else to a multiple of the last.
        reader: for which reader it was chosen, in messages; empty where the user chose it.
    """

    name: str = "compact"
    pad_to: int | tuple[int, ...] = 1
    reader: str = ""

    @property
    def uniform(self) -> bool:
        """Whether all modules have one rank in the file."""
        return self.name == "uniform"

    def check(self) -> Layout:
        """This layout. Raises ConfigError when it does not exist or does not take the padding."""
        if self.name not in LAYOUTS:
            raise ConfigError(unknown("layout", self.name, LAYOUTS))
        steps = self.pad_to if isinstance(self.pad_to, tuple) else (self.pad_to,)
        whole = all(isinstance(step, int) and not isinstance(step, bool) and 1 <= step <= MOST for step in steps)
        if not whole or (not self.uniform and self.pad_to != 1):
            raise ConfigError(
                f"padding to a multiple of {self.pad_to!r} (pad_multiple, --pad-to) is not possible in layout "
                f"{self.name!r}: it takes a whole number from 1 to {MOST}, and above 1 the uniform layout"
            )
        return self

    def stored_rank(self, ranks: Iterable[int]) -> int:
        """r in the file of modules of these ranks: the largest, at least 1, rounded up as ``pad_to`` says.

        In the uniform layout every module has it, zero padding included.
        """
        top = max([1, *ranks])
        steps = self.pad_to if isinstance(self.pad_to, tuple) else (self.pad_to,)
        return next((step for step in steps[:-1] if top <= step), -(-top // steps[-1]) * steps[-1])

    def rank_in_file(self, rank: int, top: int) -> int:
        """The rank with which a module that is written is stored; ``top`` is :meth:`stored_rank` of all."""
        return top if self.uniform else max(1, rank)


MOST = 65_536
"""The highest rank that anything is padded to."""
