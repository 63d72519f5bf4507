"""Every error that rankalloc raises on purpose, and the suggestion of a near name that they share.

A message is one sentence: what was wrong, the value, and the way out. The command line prints exactly that sentence and
exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankallocError(Exception):
    """Base of all errors raised on purpose. Exit code 1."""

    exit_code = 1


class BudgetError(RankallocError, ValueError):
    """A rank budget that is invalid, or cannot be met by the adapters it is for. Exit code 2."""

    exit_code = 2


class TargetError(RankallocError, ValueError):
    """Target modules that are missing, cannot be adapted, or are adapted already. Exit code 2."""

    exit_code = 2


class ConfigError(RankallocError, ValueError):
    """A configuration, option or name that does not exist or is not valid. Exit code 2."""

    exit_code = 2


class DataError(RankallocError, ValueError):
    """A data file of the user that is missing, empty, lacks a column, or has unusable labels. Exit code 2."""

    exit_code = 2


class AdapterFileError(RankallocError):
    """An adapter folder or checkpoint that is damaged, unsafe, or made for another model."""


class NotAdaptedError(RankallocError, RuntimeError):
    """Adaptation was requested and did not happen, which is never silently ignored."""


class NotWrittenError(RankallocError):
    """A file could not be written: no space, no permission. The place is at fault, and not the run that writes."""


class NothingFeasibleError(RankallocError):
    """No trial was feasible, or none was completed. Exit code 3."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``choices``, or an empty string."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(kind: str, word: str, choices: Iterable[str]) -> str:
    """The sentence for a ``word`` that is not a known ``kind``, with the nearest of ``choices`` and all of them."""
    choices = list(choices)
    return f"unknown {kind} {word!r}{did_you_mean(word, choices)}; known: {', '.join(choices)}"
