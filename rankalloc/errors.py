"""Every error rankalloc raises on purpose, and the did-you-mean they share.

A message names what was wrong, the value it got, and the way out, in one sentence. The command
line prints exactly that sentence; ``exit_code`` is what the process then ends with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankallocError(Exception):
    """Base of all errors raised on purpose. Exit code 1."""

    exit_code = 1


class BudgetError(RankallocError, ValueError):
    """A rank budget that cannot be read or cannot be met by the adapters it is for."""

    exit_code = 2


class TargetError(RankallocError, ValueError):
    """Target modules that are missing, cannot be adapted, or are adapted already."""

    exit_code = 2


class ConfigError(RankallocError, ValueError):
    """A configuration, option or name that does not exist or does not fit. Exit code 2."""

    exit_code = 2


class DataError(RankallocError, ValueError):
    """The user's data file: missing, empty, without the named column, with unusable labels."""

    exit_code = 2


class AdapterFileError(RankallocError):
    """An adapter folder or checkpoint that is damaged, unsafe, or made for another model."""


class NotAdaptedError(RankallocError, RuntimeError):
    """Adaptation was asked for and did not happen, which is never passed over in silence."""


class NothingFeasibleError(RankallocError):
    """No trial was feasible, or none completed. Exit code 3."""

    exit_code = 3


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``choices``, or an empty string."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(kind: str, word: str, choices: Iterable[str]) -> str:
    """One sentence saying that ``word`` is no known ``kind``, with the nearest and all choices."""
    choices = list(choices)
    return f"unknown {kind} {word!r}{did_you_mean(word, choices)}; known: {', '.join(choices)}"
