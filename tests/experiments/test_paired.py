"""Paired differences against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from rankalloc.experiments.paired import paired_difference


def test_a_clear_difference_is_clear():
    rng = np.random.default_rng(0)
    second = rng.normal(1.0, 0.5, 200)
    found = paired_difference(second - 0.2 + rng.normal(0, 0.05, 200), second)
    assert found["high"] < 0 and found["low"] < found["difference"] < found["high"]
    assert found["difference"] == pytest.approx(-0.2, abs=0.02) and found["p_value"] < 0.01


def test_no_difference_covers_zero():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=100), rng.normal(size=100)
    found = paired_difference(first, second)
    assert found["low"] < 0 < found["high"] and found["p_value"] > 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(60):
        difference = rng.normal(0.1, 1.0, 60)
        found = paired_difference(difference, np.zeros(60), seed=trial)
        hits += found["low"] <= 0.1 <= found["high"]
    assert 50 <= hits <= 60


def test_equal_differences_and_too_few():
    assert paired_difference([1.0, 1.0], [1.0, 1.0])["p_value"] == 1.0
    assert paired_difference([2.0] * 5, [1.0] * 5)["p_value"] == 2.0**-4
    with pytest.raises(ValueError):
        paired_difference([1.0], [2.0])


def test_same_seed_same_numbers():
    first, second = np.arange(30.0), np.sin(np.arange(30.0)) + np.arange(30)
    assert paired_difference(first, second, 3) == paired_difference(first, second, 3)
