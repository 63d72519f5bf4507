"""One interval for a mean difference from both of its uncertainties: that of seeds and that of examples.

All seeds are judged on the same examples. With D[s, e] the difference of seed s on example e and crossed effects of
seeds and examples, the mean of all D has the variance

    A + max(B − AB, 0)

- A = variance of the S seeds' means / S. It holds the seeds' own part and that of the pairs of seed and example.
- B = C/(C − 1) Σ_c (Σ_{e in c} (d_e − mean))² / E², with d_e the mean over seeds and c one of C clusters, such as a
  document: the clustered variance of Miller (arXiv 2411.00640) with the usual C/(C − 1).
- AB, the part of the pairs, is in both and is subtracted once (Cameron, Gelbach & Miller, JBES 2011: two-way clusters).

B needs no bootstrap over examples: for a mean, resampling clusters has just this variance. With few seeds and many
clusters the parts have very different degrees of freedom. So the squares of the half-widths of their intervals are
added (MOVER; Zou & Donner, Statistics in Medicine 2008), not the variances alone:

    half-width² = c² A + t²(C − 1) max(B − AB, 0)

with c the quantile of t(S − 1), or the limit of a sequential test: then the interval holds at a stopping time.

Cost: O(S E). Known weakness: the metric must be a mean over examples (a loss or accuracy, not F1). With fewer than
about 20 clusters, or very unequal ones, B is too small on average. Means are taken as normal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from ...errors import DataError


class ExampleInterval(NamedTuple):
    """The mean of all differences and its interval; the standard errors of the mean by seeds and by examples alone."""

    mean: float
    low: float
    high: float
    seed_error: float
    example_error: float


def example_interval(
    differences: np.ndarray, clusters: np.ndarray | None = None, error: float = 0.025, limit: float | None = None
) -> ExampleInterval:
    """The interval for new seeds and new examples.

    Args:
        differences: method minus reference, shape (seeds, examples), at least 2 × 2.
        clusters: the cluster of each example, shape (examples,); None where examples are independent.
        error: how often each of the two limits may be wrong; 0.025 gives a 95 % interval.
        limit: the t of seeds that belongs to ``error`` where seeds were looked at several times (``Design.limit``).

    Raises:
        DataError: the shapes do not fit, a value is not finite, or there are fewer than two seeds or clusters.
    """
    values = np.asarray(differences, float)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise DataError(f"differences must be finite, of at least 2 seeds × 2 examples, got shape {values.shape}")
    seeds, count = values.shape
    names = np.arange(count) if clusters is None else np.asarray(clusters)
    if names.shape != (count,):
        raise DataError(f"clusters must name the cluster of each of {count} examples, got shape {names.shape}")
    labels, index = np.unique(names, return_inverse=True)
    groups = len(labels)
    if groups < 2:
        raise DataError("all examples are in one cluster; an interval over examples needs at least two")
    mean = float(values.mean())
    centred = values - mean
    by_cluster = np.array([np.bincount(index, row) for row in centred])  # sums
    by_seed = centred.mean(axis=1)
    crossed = by_cluster - np.outer(by_seed, np.bincount(index)) - by_cluster.mean(axis=0)
    a = by_seed.var(ddof=1) / seeds
    b = groups / (groups - 1) * (by_cluster.mean(axis=0) ** 2).sum() / count**2
    ab = groups / (groups - 1) * (crossed**2).sum() / (seeds * (seeds - 1)) / count**2
    by_seeds = stats.t.isf(error, seeds - 1) if limit is None else limit
    half = float(np.sqrt(by_seeds**2 * a + stats.t.isf(error, groups - 1) ** 2 * max(b - ab, 0)))
    return ExampleInterval(mean, mean - half, mean + half, float(np.sqrt(a)), float(np.sqrt(b)))
