"""The uncertainty of a difference between two runs on the same examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean of first − second over paired examples, with a bootstrap 95 % interval and a sign-flip test.

    Args:
        first, second: losses of the same examples, in the same order, shape (n,).
        seed: seed of the resampling.

    Returns:
        {"difference", "low", "high", "p_value"}. The interval is scipy.stats.bootstrap's percentile
        interval, the p-value scipy.stats.permutation_test's with permutation_type="samples". Both
        cover the sampling of examples only, not the variation between training seeds.

    Raises:
        ValueError: the lengths differ, or there are fewer than two examples.
    """
    differences = np.asarray(first, float) - np.asarray(second, float)
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError("paired_difference needs two equally long lists of at least two losses")
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        p_value = 1.0 if mean == 0 else 2.0 ** (1 - len(differences))
        return {"difference": mean, "low": mean, "high": mean, "p_value": p_value}
    rng = np.random.default_rng(seed)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=5000, method="percentile", rng=rng
    ).confidence_interval
    test = stats.permutation_test(
        (differences, np.zeros_like(differences)), lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples", n_resamples=5000, vectorized=True, rng=rng,
    )
    return {
        "difference": mean, "low": float(interval.low), "high": float(interval.high), "p_value": float(test.pvalue)
    }
