"""docs/targets.md shows what ``rankalloc ls targets`` says of every architecture of the contract."""

from __future__ import annotations

import pytest

from docs.generators import targets
from tests.contracts.test_architectures import QUICK
from tests.support.architectures import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", QUICK)
def test_a_table_of_the_page_is_what_the_command_says(name):
    tables = targets.PAGE.read_text(encoding="utf-8").partition(targets.MARK)[2]
    (section,) = (text for text in tables.split("\n### ") if name in text.partition("\n")[0].split(", "))
    assert "\n".join(targets.body(targets.found_in(ARCHITECTURES[name]))) in section


@pytest.mark.long
def test_the_whole_page_and_the_command_agree():
    assert len(ARCHITECTURES) >= 60
    written = targets.PAGE.read_text(encoding="utf-8")
    assert written == targets.page(), "python -m docs.generators.targets writes the page again"
