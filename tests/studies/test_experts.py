"""studies/speed/experts.py: every arm takes its steps, and ratios are to PEFT's."""

from __future__ import annotations

import pytest

from studies.speed.experts import ARMS, MODELS, measure, table


@pytest.mark.long
def test_every_arm_is_measured():
    seconds = measure(MODELS["8 experts of 256 × 512"], rounds=2)
    assert seconds.keys() == ARMS.keys() and all(len(own) == 2 and min(own) > 0 for own in seconds.values())


def test_ratios_are_taken_within_a_round():
    text = table({"a model": {"PEFT": [1.0, 2.0, 4.0], "rankalloc": [1.0, 3.0, 4.0]}})
    assert "| a model | PEFT | 2000 | 1.00 (1.00 to 1.00) |" in text
    assert "| a model | rankalloc | 3000 | 1.00 (1.00 to 1.50) |" in text
