"""Scores of generated answers, as the tables that are repeated score them; ``task.metric`` of the configurations.

Both take two lists of texts, answers and references, and return 1 for each answer that is right, else 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_MARKER = re.compile(r"####|the (?:final )?answer is:?", re.IGNORECASE)
_NUMBER = re.compile(r"([+-]?)(\d+(?:,\d{3})*|\d*(?=\.\d))(\.\d+)?(?:/(\d+))?")
CHOICES = (
    ("true", "false"), ("solution1", "solution2"), ("option1", "option2"),
    ("ending1", "ending2", "ending3", "ending4"), ("answer1", "answer2", "answer3", "answer4", "answer5"),
)  # fmt: skip
"""The words that answer a question, of each kind of question in the commonsense sets."""


def number_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the number after the last "####" or "The answer is" is exactly the reference's.

    An answer without such a mark, or with something else than a number behind it, is wrong.

    Raises:
        ValueError: a reference has no number.
    """
    return [float(number_in(answer) == _required(ref)) for answer, ref in zip(answers, references, strict=True)]


def number_in(text: str) -> Fraction | None:
    """The number that a text ends with, exactly; None where there is none.

    What counts is the rest of the line behind the last mark, without currency, percent and thousands' commas:
    1,234 is 1234.0, 50% is 50, 3/4 is 0.75.
    """
    parts = _MARKER.split(text)
    if len(parts) == 1:
        return None
    line = (parts[-1].strip().splitlines() or [""])[0]
    found = _NUMBER.fullmatch(re.sub(r"[\s$€£%]", "", line.replace("\N{MINUS SIGN}", "-")).rstrip(".!?"))
    if found is None:
        return None
    sign, whole, decimals, below = found.groups()
    if below is not None and not int(below):
        return None
    value = Fraction(f"{whole.replace(',', '') or 0}{decimals or ''}") / int(below or 1)
    return -value if sign == "-" else value


def _required(reference: str) -> Fraction:
    number = number_in(reference)
    if number is None:
        raise ValueError(f"the reference has no number after #### or The answer is: {reference[-60:]!r}")
    return number


def choice_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the first word of the reference's kind, such as "true" and "false", is the reference's.

    Raises:
        ValueError: a reference holds none of these words.
    """
    return [float(_first(answer, kind) == word) for answer, (word, kind) in
            zip(answers, map(choice_in, references), strict=True)]


def choice_in(reference: str) -> tuple[str, tuple[str, ...]]:
    """The word that a reference answers with, and all of its kind. Raises ValueError where there is none."""
    for kind in CHOICES:
        if (word := _first(reference, kind)) is not None:
            return word, kind
    raise ValueError(f"the reference holds none of the words that answer a question: {reference[-60:]!r}")


def _first(text: str, words: tuple[str, ...]) -> str | None:
    found = re.search("|".join(words), text)
    return None if found is None else found.group()
