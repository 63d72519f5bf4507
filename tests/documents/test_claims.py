"""Every number of a claim is what the committed JSON says, and no finding stands in README and docs without its row."""

from __future__ import annotations

import functools
import re

import pytest

from .blocks import ROOT
from .claims import CLAIMS, HELP, README, SETTINGS, STUDIES, Claim, Setting
from .cost_claims import COST_CLAIMS, COST_SETTINGS, COSTS
from .other_claims import OTHER_CLAIMS
from .written import Number, is_written, numbers_of, spans_of

EVERY_CLAIM, EVERY_SETTING = [*CLAIMS, *OTHER_CLAIMS, *COST_CLAIMS], [*SETTINGS, *COST_SETTINGS]
COVERED = {
    README: r"^## Does it help\?$.*?(?=^## )", HELP: r".*", COSTS: r".*",
    STUDIES: r"(?<=^\| \[)\w+\]\([^)]*\): [^|]*\| [^|]* \|",
}
"""{document: a pattern of its parts in which every number needs a row}."""


@functools.cache
def text_of(place: str) -> str:
    return (ROOT / place).read_text(encoding="utf-8")


def settings_in(place: str, text: str) -> list[tuple[int, int]]:
    return [span for one in EVERY_SETTING if place in one.places for span in spans_of(one.words, text)]


def within(number: Number, spans: list[tuple[int, int]]) -> bool:
    return any(start <= number.start and number.end <= end for start, end in spans)


def findings_without_a_row(place: str, text: str) -> list[str]:
    """One sentence for each number of the covered parts of a document that no claim and no setting has."""
    rows = [span for claim in EVERY_CLAIM if place in claim.places for span in spans_of(claim.words, text)]
    parts = [found.span() for found in re.finditer(COVERED[place], text, re.DOTALL | re.MULTILINE)]
    assert parts, f"{place} has lost the part of which every number needs a row; change COVERED"
    return [
        f"{place} says “…{' '.join(text[max(0, number.start - 50) : number.end + 20].split())}…”: give {number.text!r} "
        "a row in tests/documents/claims.py with what computes it from a committed JSON, or name it under SETTINGS "
        "there with the reason why it is no finding."
        for number in numbers_of(text)
        if within(number, parts) and not within(number, [*rows, *settings_in(place, text)])
    ]  # fmt: skip


@pytest.mark.parametrize("claim", EVERY_CLAIM, ids=lambda claim: claim.words[:40])
def test_a_claim_says_what_the_committed_json_says(claim: Claim):
    computed = list(claim.numbers())
    for place in claim.places:
        text = text_of(place)
        spans = spans_of(claim.words, text)
        assert spans, f"{place} no longer says {claim.words!r}: change the row of this claim, or remove it"
        settings = settings_in(place, text)
        written = [n.text for n in numbers_of(text) if within(n, spans[:1]) and not within(n, settings)]
        assert len(written) == len(computed), f"{claim.words!r} has the numbers {written}, its row computes {computed}"
        wrong = [pair for pair in zip(computed, written, strict=True) if not is_written(*pair)]
        assert not wrong, f"{place}: {claim.words!r} is wrong, the JSON says " + ", ".join(
            f"{value:.6g} where the text has {number}" for value, number in wrong
        )
    assert claim.holds(), f"{claim.words!r} is not what the JSON says"


@pytest.mark.parametrize("place", COVERED)
def test_every_number_has_a_row(place):
    assert findings_without_a_row(place, text_of(place)) == []


@pytest.mark.parametrize("place, before", [
    (README, "## Does it help?\n"), (HELP, "| question | finding"), (COSTS, "The kernel and oneDNN add"),
    (STUDIES, "| [speed](speed): what does an adaptive step cost? | the ratios"),
])  # fmt: skip
def test_a_number_without_a_row_is_reported_in_a_sentence(place, before):
    assert before in text_of(place)
    (told,) = findings_without_a_row(place, text_of(place).replace(before, f"{before} 0.0123 nats "))
    assert "0.0123" in told and "tests/documents/claims.py" in told


@pytest.mark.parametrize("setting", EVERY_SETTING, ids=lambda setting: setting.words[:40])
def test_what_is_no_finding_still_stands_there(setting: Setting):
    for place in setting.places:
        spans = spans_of(setting.words, text_of(place))
        assert any(within(number, spans) for number in numbers_of(text_of(place))), f"remove {setting} from the list"


def test_numbers_are_found_as_they_are_written():
    text = "On MiniLM-L6 `r=16`, [half](a/2.md) of F1: −0.4 to +0.3 %, two thirds, 35,840, 1/8\nof 1.6e-2, AVX-512, 7B."
    assert [n.text for n in numbers_of(text)] == ["half", "−0.4", "+0.3", "two thirds", "35,840", "1/8", "1.6e-2"]


@pytest.mark.parametrize(
    "value, text, right",
    [
        (-0.036, "−0.04", True), (0.036, "−0.04", False), (0.036, "+0.04", True), (0.036, "0.04", True),
        (-0.036, "0.04", False), (-0.03, "0.0", True), (-0.03, "+0.0", False), (0.0349, "0.04", False),
        (35840, "35,840", True), (0.125, "1/8", True), (0.016, "1.6e-2", True), (3.96, "four", True),
        (0.51, "half", True), (0.68, "two thirds", True), (0.6, "two thirds", False), (0.376, "Three eighths", True),
    ],
)  # fmt: skip
def test_a_value_is_compared_as_it_is_written(value, text, right):
    assert is_written(value, text) is right
